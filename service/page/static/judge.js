// The panel that judges: an image in, a verdict with its map and its reasons out.

import { ask } from "./api.js";
import { calibrations, chosenCalibration, loadCalibrations, OWN, USUAL_SCORE } from "./calibrations.js";
import { byId, dataUrl, make } from "./elements.js";
import { clearFailure, showFailure } from "./failures.js";
import { chosenModel } from "./models.js";
import { fixed, percent, short } from "./numbers.js";
import { setUpSources, sources } from "./source.js";
import { showVerdict } from "./verdict.js";

const DRAWS_WITHOUT_VERDICT = 4;

let image = null;
let asking = new AbortController();

const say = (text) => (byId("judge-state").textContent = text);

function requestOf(model, { blob, name }) {
  const form = [["files", blob, name], ["model", model.id]];
  if (chosenCalibration() === null) {
    form.push(["draws", String(DRAWS_WITHOUT_VERDICT)]);
  } else {
    const [calibration, alpha, score] = ["calibration", "alpha", "score"].map((id) => byId(id).value);
    if (calibration !== OWN) form.push(["calibration", calibration]);
    form.push(["alpha", alpha]);
    if (score !== USUAL_SCORE) form.push(["score", score]);
    form.push(["maps", "overlay"]);
  }
  return { path: "v1/score", form };
}

function saidOf(result) {
  if (result.is_anomaly === null) {
    const bits = result.bits_per_dim;
    return `Scored: ${bits === null ? "the likelihood is not finite" : `${fixed(bits, 3)} bits per dimension`}.`;
  }
  const verdict = result.is_anomaly ? "Unusual" : "Normal";
  return `${verdict}: p-value ${short(result.p_value, 2)}, at a level of ${percent(result.alpha)}.`;
}

/** Lay the image, as the model will see it: the middle square. */
function lay({ blob, name }) {
  const stage = byId("judge-stage");
  URL.revokeObjectURL(stage.dataset.url);
  stage.dataset.url = URL.createObjectURL(blob);
  delete stage.dataset.empty;
  const unseen = () => picture.replaceWith(make("p", { class: "invitation" }, "This browser cannot show this file."));
  const picture = make("img", { class: "picture", src: stage.dataset.url, alt: `To judge: ${name}`, onerror: unseen });
  const isSmall = () => (picture.dataset.small = String(picture.naturalWidth <= 128));
  picture.addEventListener("load", isSmall);
  stage.replaceChildren(picture);
  stage.dataset.view = "image";
}

function layMap(result) {
  if (!result.map) return;
  const stage = byId("judge-stage");
  const alt = `Map: ${result.regions.length || "no"} unusual ${result.regions.length === 1 ? "region" : "regions"}`;
  stage.append(make("img", { class: "map", src: dataUrl(result.map.b64), alt }));
  stage.dataset.view = result.regions.length ? "map" : "image";
}

/** Judge the image once more, with what is chosen now. */
async function judge() {
  const model = chosenModel();
  if (model === null || image === null) return;
  asking.abort();
  asking = new AbortController();
  const { signal } = asking;
  const request = requestOf(model, image);
  clearFailure(byId("judge-failure"));
  lay(image);
  byId("judge-stage").dataset.running = "";
  byId("verdict").setAttribute("aria-busy", "true");
  say("Judging …");
  try {
    const answer = await ask(request, { signal });
    const [result] = answer.images;
    layMap(result);
    showVerdict({ answer, result, request, model, image, calibration: chosenCalibration() });
    say(saidOf(result));
  } catch (error) {
    if (error.name === "AbortError") return;
    byId("verdict").hidden = true;
    say("No verdict.");
    showFailure(byId("judge-failure"), error, judge);
  }
  delete byId("judge-stage").dataset.running;
  byId("verdict").removeAttribute("aria-busy");
}

export function setUpJudge() {
  setUpSources();
  sources.addEventListener("image", (event) => {
    image = event.detail;
    void judge();
  });
  calibrations.addEventListener("change", () => {
    clearFailure(byId("judge-failure"));
    void judge();
  });
  calibrations.addEventListener("failure", (event) => {
    showFailure(byId("judge-failure"), event.detail, loadCalibrations);
  });
  byId("judge-form").addEventListener("submit", (event) => event.preventDefault());
}
