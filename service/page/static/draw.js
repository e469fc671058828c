// The panel that draws: what is asked, what comes block by block, and what is known of the images in the end.

import { ask, failureIn, send } from "./api.js";
import { byId, dataUrl } from "./elements.js";
import { follow } from "./events.js";
import { clearFailure, showFailure } from "./failures.js";
import { Gallery } from "./gallery.js";
import { showImageFacts } from "./image_facts.js";
import { chosenModel, models } from "./models.js";
import { counted, fixed, seconds } from "./numbers.js";

const NONE = "";
const MOST_PREVIEWS = 100;
const POSITION_MILLISECONDS = 2000;
const SEEDS = 2 ** 32;

let running = null;
let gallery;

const say = (text) => (byId("draw-state").textContent = text);

function setProgress(fraction) {
  const bar = byId("draw-progress");
  if (fraction === null) bar.removeAttribute("value");
  else bar.value = fraction;
}

// What is asked

function freshSeed() {
  return Math.floor(Math.random() * SEEDS);
}

function requestOf(model) {
  const index = byId("class").value;
  const name = model.class_names[index];
  const isUnique = model.class_names.filter((other) => other === name).length === 1;
  const json = {
    model: model.id,
    class: index === NONE ? null : isUnique ? name : Number(index),
    num_images: Number(byId("count").value),
    seed: byId("seed").valueAsNumber,
    guidance_scale: byId("guidance").valueAsNumber,
    attention_temperature: byId("temperature").valueAsNumber,
    previews: Math.min(model.architecture.num_blocks - 1, MOST_PREVIEWS),
  };
  if (byId("certify").checked) json.certify = true;
  return { path: "v1/sample", headers: { Accept: "text/event-stream" }, json };
}

function noteGuidance() {
  const model = chosenModel();
  byId("guidance-value").value = fixed(byId("guidance").valueAsNumber, 1);
  byId("temperature-value").value = fixed(byId("temperature").valueAsNumber, 1);
  if (model === null) return;
  const { guidance_scale: scale, attention_temperature: temperature } = model.recommended;
  const idle = byId("class").value === NONE && byId("temperature").valueAsNumber === 1;
  byId("guidance-note").textContent = idle
    ? "Without a class, guidance needs a temperature other than 1."
    : `This model recommends guidance ${fixed(scale, 1)} at temperature ${fixed(temperature, 1)}.`;
}

function setRange(input, value) {
  input.max = Math.max(4, Math.ceil(2 * value));
  input.value = value;
}

function useModel() {
  const model = chosenModel();
  const select = byId("class");
  const options = model.class_names.map((name, index) => new Option(name, index));
  select.replaceChildren(...options, new Option("no class", NONE));
  select.selectedIndex = 0;
  setRange(byId("guidance"), model.recommended.guidance_scale);
  setRange(byId("temperature"), model.recommended.attention_temperature);
  noteGuidance();
  if (running !== null) return;
  byId("draw-facts").hidden = true;
  gallery.empty(model, Number(byId("count").value));
}

/** As many places as there will be images, as long as there are none. */
function usePlaces() {
  if (chosenModel() !== null && gallery.isEmpty) gallery.empty(chosenModel(), Number(byId("count").value));
}

// What comes

function saidOf(answer) {
  const { class: name, num_images: count, seed } = answer.parameters;
  const what = name === null ? "without a class" : `of “${name}”`;
  const seeds = count === 1 ? `seed ${seed}` : `seeds ${seed} to ${seed + count - 1}`;
  return `${counted(count, "image")} ${what}, ${seeds}, in ${seconds(answer.timing.total_ms)}.`;
}

/** Say how many go first, as long as the job waits. */
async function watchQueue(links, signal) {
  while (!signal.aborted) {
    try {
      const job = await ask({ path: links.self }, { signal });
      if (signal.aborted || job.state !== "queued") return;
      const first = job.position ? `${counted(job.position, "job goes", "jobs go")} first` : "next in line";
      say(`Waiting for a worker: ${first}.`);
    } catch {
      return; // The stream tells what matters.
    }
    await new Promise((resolve) => setTimeout(resolve, POSITION_MILLISECONDS));
  }
}

async function resultOf({ result, error, links }) {
  if (error) throw failureIn(error);
  // A large one is kept where the link says.
  return result ?? (await ask({ path: links.self })).result;
}

async function run(request, model, signal) {
  const waiting = new AbortController();
  const count = model.architecture.num_blocks;
  gallery.begin(model, request.json);
  setProgress(null);
  say("Asking …");
  try {
    for await (const { kind, data } of follow(request, { signal })) {
      if (kind !== "queued" && kind !== "progress") waiting.abort();
      switch (kind) {
        case "queued":
          running.links = data.links;
          say("Waiting for a worker.");
          void watchQueue(data.links, waiting.signal);
          break;
        case "started":
          setProgress(0);
          say(`Drawing: ${counted(count, "block")} to go.`);
          break;
        case "requeued":
          setProgress(null);
          say("A worker was lost; another one begins again.");
          break;
        case "progress":
          setProgress(data.fraction);
          break;
        case "preview":
          for (const image of data.images) gallery.fill(data.block - 1, image.index, dataUrl(image.b64));
          gallery.show(data.block - 1);
          say(`Block ${data.block} of ${data.blocks} is done.`);
          break;
        case "completed": {
          const answer = await resultOf(data);
          gallery.finish(answer, (index) => showImageFacts(answer, index, request));
          say(saidOf(answer));
          break;
        }
        case "canceled":
          say("Canceled.");
          gallery.empty(model, request.json.num_images);
          break;
        case "failed":
          throw failureIn(data.error);
      }
    }
  } finally {
    waiting.abort();
  }
}

function setRunning(value) {
  running = value;
  byId("draw-go").hidden = value !== null;
  byId("draw-cancel").hidden = value === null;
  byId("draw-progress").dataset.active = String(value !== null);
  const focused = document.activeElement;
  if (focused === document.body || focused?.hidden) byId(value === null ? "draw-go" : "draw-cancel").focus();
}

async function draw() {
  const model = chosenModel();
  if (model === null || running !== null) return;
  if (byId("fresh").checked) byId("seed").value = freshSeed();
  const request = requestOf(model);
  clearFailure(byId("draw-failure"));
  byId("draw-facts").hidden = true;
  setRunning({ controller: new AbortController(), links: null });
  try {
    await run(request, model, running.controller.signal);
  } catch (error) {
    gallery.empty(model, request.json.num_images);
    say(error.name === "AbortError" ? "Canceled." : "Nothing was drawn.");
    if (error.name !== "AbortError") showFailure(byId("draw-failure"), error, draw);
  } finally {
    setProgress(0);
    setRunning(null);
  }
}

/** Give the job up; where the service cannot be told so, leaving its stream does the same. */
async function cancel() {
  const { controller, links } = running;
  try {
    if (links === null) throw new Error("not accepted yet");
    await send({ path: links.self, method: "DELETE" });
  } catch {
    controller.abort();
  }
}

export function setUpDraw() {
  gallery = new Gallery(byId("draw-stage"), byId("draw-strip"));
  byId("seed").value = freshSeed();
  byId("draw-form").addEventListener("submit", (event) => {
    event.preventDefault();
    void draw();
  });
  byId("draw-cancel").addEventListener("click", cancel);
  byId("seed").addEventListener("input", () => (byId("fresh").checked = false));
  for (const id of ["class", "guidance", "temperature"]) byId(id).addEventListener("input", noteGuidance);
  byId("count").addEventListener("change", usePlaces);
  models.addEventListener("change", useModel);
  noteGuidance();
}
