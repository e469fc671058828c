// What went wrong, said kindly: what it is, in the service's own words, and what to do about it.

import { make } from "./elements.js";
import { askForKey } from "./key.js";

const SAID = {
  0: ["The service does not answer", "It may be stopped or out of reach. Nothing is lost: try again."],
  400: ["The service could not read that", "If this page is old, reload it."],
  401: ["A key is needed", "Give one at the top of the page; tarflow keys new makes them."],
  403: ["This is not allowed", "Another key may do it; tarflow keys list shows what each may."],
  404: ["It is not there", "It may have been unloaded or have expired. Reloading the page shows what there is."],
  408: ["The upload was too slow", "Try again, or send a smaller file."],
  409: ["It has changed meanwhile", "Try again."],
  413: ["This file is too large", "Make it smaller; the model sees few pixels anyhow."],
  422: ["That cannot be done as asked", "Change what is named, and try again."],
  429: ["Too much at once", "There is more to do than may wait. Try again shortly."],
  500: ["Something broke in the service", "It is not your fault. Try again; the service's log has the details."],
  503: ["Not ready just now", "A worker is starting, busy or being replaced. Try again shortly."],
  504: ["It took too long", "Ask for fewer images, or try again when there is less to do."],
};

/** Take back what was said. */
export function clearFailure(place) {
  clearInterval(place.countdown);
  place.replaceChildren();
}

/** Say what went wrong, with a button that tries `again`, once the service would be asked. */
export function showFailure(place, failure, again = null) {
  if (failure.status === undefined) console.error(failure);
  clearFailure(place);
  const [title, hint] = SAID[failure.status] ?? SAID[500];
  const button = again && make("button", { type: "button", class: "quiet", onclick: () => void again() }, "Try again");
  place.append(
    make(
      "div",
      { class: "failure", dataset: { code: failure.code ?? "fault" } },
      make(
        "div",
        { role: "alert" },
        make("strong", {}, title),
        make("p", {}, failure.message),
        make("p", { class: "note" }, hint),
      ),
      button,
    ),
  );
  if (failure.status === 401) askForKey(failure.code === "missing_key" ? null : failure.message);
  if (button && failure.retryAfter) countDown(place, button, failure.retryAfter);
}

function countDown(place, button, seconds) {
  const ends = Date.now() + 1000 * seconds;
  const tick = () => {
    const left = Math.ceil((ends - Date.now()) / 1000);
    button.disabled = left > 0;
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left <= 0) clearInterval(place.countdown);
  };
  tick();
  place.countdown = setInterval(tick, 250);
}
