// Which class an image is of, by Bayes' rule: asked for only when somebody wants to know, for it takes a pass a class.

import { ask } from "./api.js";
import { make } from "./elements.js";
import { showFailure } from "./failures.js";
import { probable } from "./numbers.js";

const MOST_SHOWN = 5;

/** A button that becomes the most probable classes of an image. */
export function classButton(model, { blob, name }) {
  const place = make("div", { class: "classes", role: "status" });
  const failed = make("div", {});
  const form = [["files", blob, name], ["model", model.id]];
  const button = make("button", { type: "button", onclick: classify }, "Which class?");
  async function classify() {
    button.disabled = true;
    failed.replaceChildren();
    try {
      const [result] = (await ask({ path: "v1/classify", form })).images;
      place.replaceChildren(...result.probabilities.slice(0, MOST_SHOWN).map(bar));
      button.remove();
    } catch (error) {
      button.disabled = false;
      showFailure(failed, error);
    }
  }
  return make("div", {}, button, place, failed);
}

function bar({ class: name, probability }) {
  return make(
    "div",
    { class: "bar-row" },
    make("span", {}, name),
    make("meter", { min: 0, max: 1, value: probability ?? 0, "aria-label": `Probability of ${name}` }),
    make("span", { class: "figure" }, probability === null ? "not finite" : probable(probability)),
  );
}
