// Buttons that copy a text.

import { hasKey } from "./api.js";
import { curlOf } from "./curl.js";
import { make } from "./elements.js";

const SHOWN_MILLISECONDS = 1600;

async function copy(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  // Without TLS browsers have this only, except on the own host.
  const area = make("textarea", { value: text, class: "unseen" });
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  if (!isCopied) throw new Error("refused");
}

/** A button that copies what `text()` gives, and says so. */
export function copyButton(label, text) {
  const said = make("span", { class: "unseen", role: "status" });
  const button = make("button", { type: "button", class: "quiet", onclick }, label);
  async function onclick() {
    try {
      await copy(text());
      button.textContent = said.textContent = "Copied";
    } catch {
      button.textContent = said.textContent = "Could not copy: select it by hand";
    }
    setTimeout(() => {
      button.textContent = label;
      said.textContent = "";
    }, SHOWN_MILLISECONDS);
  }
  return make("span", { class: "copying" }, button, said);
}

/** A request as a command to look at and to copy. */
export function commandOf(request) {
  const text = curlOf(request, hasKey());
  return make(
    "details",
    { class: "command" },
    make("summary", {}, "The same with curl"),
    make("pre", { tabIndex: 0, "aria-label": "curl command" }, make("code", {}, text)),
    copyButton("Copy as curl", () => text),
  );
}
