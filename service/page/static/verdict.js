// A verdict in words: normal or not, how sure that is, where, and why.

import { OWN } from "./calibrations.js";
import { classButton } from "./classes.js";
import { commandOf } from "./copying.js";
import { byId, facts, make } from "./elements.js";
import { counted, fixed, percent, short } from "./numbers.js";
import { reasons } from "./reasons.js";

const MOST_REGIONS = 3;

function headline(result) {
  const word = result.is_anomaly ? "Unusual" : "Normal";
  const said = `at most ${percent(result.p_value, 2)} of normal images score this high`;
  return make(
    "div",
    { class: "headline", dataset: { anomaly: String(result.is_anomaly) } },
    make("h3", {}, word),
    make("p", {}, make("strong", {}, `p = ${short(result.p_value, 2)}`), `: ${said}.`),
  );
}

function scoreOf({ score, threshold, is_anomaly: isAnomaly }) {
  return `${short(score)}, ${isAnomaly ? "above" : "not above"} the threshold ${short(threshold)}`;
}

function rateOf({ alpha, expected_false_positive_rate: rate }) {
  return rate && `${percent(alpha)}; with this calibration ${percent(rate.low)} to ${percent(rate.high)} of normal images`;
}

function regionsOf(regions) {
  if (regions.length === 0) return "nowhere in particular";
  const shown = regions.slice(0, MOST_REGIONS).map(({ bbox: [x, y, width, height] }) => `${width}×${height} at (${x}, ${y})`);
  const more = regions.length - shown.length;
  return `${counted(regions.length, "region")}: ${shown.join(", ")}${more ? `, and ${more} more` : ""}`;
}

const directionOf = ({ direction }) =>
  direction === "too_unlikely" ? "less likely than the median normal image" : "more likely than the median normal image";

function likelihoodOf({ log_likelihood: nats, log_likelihood_std: spread, bits_per_dim: bits, protocol }) {
  const steady = spread === null ? "" : ` ± ${fixed(spread, 1)}`;
  const value = nats === null ? "not finite" : `${fixed(nats, 1)}${steady} nats, ${fixed(bits, 3)} bits per dimension`;
  return make("span", { title: protocol.meaning }, value);
}

/** Choose between the image and its map. */
function views() {
  const stage = byId("judge-stage");
  const buttons = [["image", "Image"], ["map", "Map"]].map(([view, text]) =>
    make("button", { type: "button", dataset: { view }, onclick: () => show(view) }, text),
  );
  function show(view) {
    stage.dataset.view = view;
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.view === view));
  }
  show(stage.dataset.view);
  const legend = make(
    "p",
    { class: "legend note" },
    make("span", {}, "usual"),
    make("span", { class: "colours", role: "img", "aria-label": "from yellow over orange to magenta" }),
    make("span", {}, "twice the threshold"),
  );
  return make("div", { class: "views" }, make("div", { class: "switch", role: "group", "aria-label": "Show" }, ...buttons), legend);
}

/** Fill the verdict of one image. */
export function showVerdict({ answer, result, request, model, image, calibration }) {
  const judged = result.is_anomaly !== null;
  const used = answer.calibration;
  byId("verdict").replaceChildren(
    ...(judged ? [views(), headline(result)] : []),
    facts([
      ["Score", judged ? scoreOf(result) : null],
      ["Where", judged ? regionsOf(result.regions) : null],
      ["Likelihood", likelihoodOf(result)],
      ["That is", judged ? directionOf(result) : null],
      ["False alarms", judged ? rateOf(result) : null],
      ["Normal is", used && `${used.name === OWN ? "the model’s own calibration" : used.name}, ${counted(used.num_calibration, "image")}`],
    ]),
    ...result.warnings.map(({ message }) => make("p", { class: "note warning" }, message)),
    ...(judged && calibration ? [reasons(result.features, calibration.scores, used.score, result.threshold)] : []),
    ...(model.num_classes > 0 ? [classButton(model, image)] : []),
    commandOf(request),
  );
  byId("verdict").hidden = false;
}
