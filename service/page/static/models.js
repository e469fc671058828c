// The models that are served, and the one that is chosen for both panels.

import { ask } from "./api.js";
import { byId, setOptions } from "./elements.js";
import { clearFailure, showFailure } from "./failures.js";
import { counted } from "./numbers.js";

/** Tells "change" when another model is chosen. */
export const models = new EventTarget();
const MOST_SQUARES = 64;
let all = [];
let chosen = null;
let asking = new AbortController();
let refused = false;

/** Everything that is known of the chosen model, as the API describes it; null while there is none. */
export const chosenModel = () => chosen;

/** All models, as the API lists them. */
export const allModels = () => all;

/** Whether nothing is known yet and asking again may help: not where the key is what is wrong. */
export const areAwaited = () => all.length === 0 && !refused;

/** A side and colours, as people say it. */
export const shapeOf = ({ size, channels }) => `${size}×${size} ${channels === 1 ? "grey" : "colour"}`;

function show() {
  const { image, class_names: names, anomaly } = chosen;
  const classes = names.length ? counted(names.length, "class", "classes") : "no classes";
  const calibrated = anomaly.calibrated ? "calibrated" : "not calibrated";
  byId("model-facts").textContent = `${shapeOf(image)} · ${classes} · ${calibrated}`;
  // Small pixels are shown as squares of one size; many are shown smoothly.
  const isSmall = image.size <= MOST_SQUARES;
  const style = document.documentElement.style;
  style.setProperty("--step", isSmall ? `${image.size}px` : "1px");
  style.setProperty("--rendering", isSmall ? "pixelated" : "auto");
}

async function choose(name, signal) {
  chosen = await ask({ path: `v1/models/${encodeURIComponent(name)}` }, { signal });
  show();
  models.dispatchEvent(new Event("change"));
}

async function guarded(work, again) {
  asking.abort();
  asking = new AbortController();
  clearFailure(byId("model-failure"));
  try {
    await work(asking.signal);
    refused = false;
  } catch (error) {
    refused = error.status === 401 || error.status === 403;
    if (error.name !== "AbortError") showFailure(byId("model-failure"), error, again);
  }
}

/** Ask which there are; keeps the choice where it is still served. */
export function loadModels() {
  return guarded(async (signal) => {
    all = [];
    all = (await ask({ path: "v1/models" }, { signal })).data;
    if (all.length === 0) {
      byId("model-facts").textContent = "No model is known yet; a worker is being started.";
      return;
    }
    const usual = all.find((model) => model.default) ?? all[0];
    const kept = all.find((model) => model.id === chosen?.id);
    setOptions(byId("model"), all.map((model) => [model.id, model.id]), (kept ?? usual).id);
    await choose(byId("model").value, signal);
  }, loadModels);
}

export function setUpModels() {
  const pick = () => guarded((signal) => choose(byId("model").value, signal), pick);
  byId("model").addEventListener("change", pick);
}
