// What counts as normal: the calibrations of the chosen model, and what the chosen one allows.

import { ask } from "./api.js";
import { byId, setOptions } from "./elements.js";
import { chosenModel, models } from "./models.js";
import { counted, percent, whole } from "./numbers.js";

/** Name of the calibration that comes with a model. */
export const OWN = "default";
/** Score that decides where none is named. */
export const USUAL_SCORE = "combined";
const ALPHAS = [0.001, 0.01, 0.05, 0.1];

/** Tells "change" when something else is asked for, and "failure" with the reason as `detail`. */
export const calibrations = new EventTarget();
let details = null;
let asking = new AbortController();

/** Everything that is known of the chosen calibration; null where the model has none. */
export const chosenCalibration = () => details;

const pathOf = (name) => `v1/calibrations${name}?model=${encodeURIComponent(chosenModel().id)}`;

function show() {
  const note = byId("calibration-note");
  if (details === null) {
    setOptions(byId("alpha"), []);
    setOptions(byId("score"), []);
    note.textContent = "This model has no calibration, so there are likelihoods, but no verdicts.";
    return;
  }
  const { num_calibration: count, smallest_alpha: smallest, default_alpha: usual, source } = details.record;
  const allowed = [...new Set([...ALPHAS.filter((alpha) => alpha >= smallest), usual])].sort((a, b) => a - b);
  const kept = byId("alpha").value;
  setOptions(byId("alpha"), allowed.map((alpha) => [String(alpha), percent(alpha)]), kept || String(usual));
  const scores = Object.keys(details.scores).filter((name) => !name.endsWith("_without_codes"));
  setOptions(byId("score"), scores.map((name) => [name, name.replaceAll("_", " ")]), byId("score").value || USUAL_SCORE);
  note.textContent = `Judged by ${counted(count, "normal image")}${source ? ` (${source})` : ""}; the smallest p-value is 1/${whole(count + 1)}.`;
}

async function guarded(work) {
  asking.abort();
  asking = new AbortController();
  try {
    await work(asking.signal);
    show();
    calibrations.dispatchEvent(new Event("change"));
  } catch (error) {
    if (error.name !== "AbortError") calibrations.dispatchEvent(new CustomEvent("failure", { detail: error }));
  }
}

async function describe(signal) {
  const name = byId("calibration").value;
  details = name ? await ask({ path: pathOf(`/${encodeURIComponent(name)}`) }, { signal }) : null;
}

/** Ask which there are. */
export function loadCalibrations() {
  details = null;
  return guarded(async (signal) => {
    const usable = (await ask({ path: pathOf("") }, { signal })).data.filter((each) => each.usable);
    const said = ({ name, num_images: count }) => `${name === OWN ? "the model’s own" : name} (${whole(count)} images)`;
    setOptions(byId("calibration"), usable.map((each) => [each.name, said(each)]));
    await describe(signal);
  });
}

export function setUpCalibrations() {
  models.addEventListener("change", loadCalibrations);
  byId("calibration").addEventListener("change", () => guarded(describe));
  for (const id of ["alpha", "score"]) {
    byId(id).addEventListener("change", () => calibrations.dispatchEvent(new Event("change")));
  }
}
