// The API key: asked for where the service wants one, kept in this tab alone.

import { hasKey, useKey } from "./api.js";
import { byId } from "./elements.js";

const NOTE = "This service asks for a key. It stays in this tab, and is gone when the tab is closed.";

/** Tells "change" when there is another key, or none. */
export const keys = new EventTarget();

/** Show the field, with what is wrong with the key that there is. */
export function askForKey(wrong = null) {
  const field = byId("key-value");
  byId("key").hidden = false;
  byId("key-note").textContent = wrong ?? NOTE;
  field.setAttribute("aria-invalid", String(wrong !== null));
  if (document.activeElement === document.body) field.focus();
}

function show() {
  byId("key").hidden = !hasKey();
  byId("key-forget").hidden = !hasKey();
  byId("key-value").placeholder = hasKey() ? "A key is in use" : "tarflow_…";
  byId("key-value").removeAttribute("aria-invalid");
  byId("key-note").textContent = NOTE;
}

function change(key) {
  useKey(key);
  byId("key-form").reset();
  show();
  keys.dispatchEvent(new Event("change"));
}

export function setUpKey() {
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    change(byId("key-value").value.trim() || null);
  });
  byId("key-forget").addEventListener("click", () => change(null));
  show();
}
