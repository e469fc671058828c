// What is known of a drawn image, and what can be done with it.

import { commandOf, copyButton } from "./copying.js";
import { blobOf, byId, facts, make } from "./elements.js";
import { useDrawn } from "./source.js";
import { seconds, short } from "./numbers.js";

function exactnessOf({ backward_error: error, certified, redone }) {
  if (certified === null) return "decoded patch by patch, which is exact but for rounding; not measured";
  const measured = `backward error ${short(error)}`;
  const how = redone === null ? "" : ", done again patch by patch";
  return certified ? `certified: ${measured}${how}` : `not within the tolerance: ${measured}${how}`;
}

function planOf(plan) {
  const steps = plan.filter((step, i) => step !== plan[i - 1]);
  return `${plan.length} blocks, ${steps.join(", then ")}`;
}

const fileName = (model, image) =>
  `${[model, image.class ?? "no class", image.seed].join("-").replace(/[^\w.-]+/g, "-").toLowerCase()}.png`;

/** Fill the facts of one image of an answer. */
export function showImageFacts(answer, index, request) {
  const image = answer.images[index];
  const blob = blobOf(image.b64, `image/${image.format}`);
  const name = fileName(answer.model, image);
  const place = byId("draw-facts");
  URL.revokeObjectURL(place.dataset.url);
  place.dataset.url = URL.createObjectURL(blob);
  useDrawn(blob, name, place.dataset.url);
  const seed = make("span", {}, make("code", {}, String(image.seed)), " ", copyButton("Copy", () => String(image.seed)));
  place.replaceChildren(
    facts([
      ["Seed", seed],
      ["Class", image.class ?? "none"],
      ["Exactness", exactnessOf(image)],
      ["How", answer.plan && planOf(answer.plan)],
      ["Time", `${seconds(answer.timing.inference_ms)}, after ${seconds(answer.timing.queue_ms)} in the queue`],
    ]),
    ...image.warnings.map(({ message }) => make("p", { class: "note warning" }, message)),
    make(
      "div",
      { class: "row" },
      make("a", { class: "button", href: place.dataset.url, download: name }, "Download"),
      make("button", { type: "button", onclick: () => byId("judge-drawn").click() }, "Is it normal?"),
    ),
    commandOf(request),
  );
  place.hidden = false;
}
