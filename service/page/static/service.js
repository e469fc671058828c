// What the service is doing: its workers, its queue, its models. Asked now and then, and never while nobody looks.

import { ask, Failure, hasKey, send } from "./api.js";
import { byId, make } from "./elements.js";
import { keys } from "./key.js";
import { allModels, areAwaited, chosenModel, loadModels, models, shapeOf } from "./models.js";
import { counted, percent, short } from "./numbers.js";

const OFTEN_MILLISECONDS = 4000;
/** With a key every question counts for its rate. */
const SELDOM_MILLISECONDS = 20000;
const MOST_JOBS = 5;
const FIGURE = /^(tarflow_queue_depth|tarflow_jobs_running)\{[^}]*\} ([0-9.e+]+)$/gm;

const mayAsk = { metrics: true, jobs: true };
let timer = null;
let asked = 0;

function setHealth(state, text) {
  const pill = byId("health");
  pill.dataset.state = state;
  if (pill.textContent !== text) pill.textContent = text;
}

const isRefusal = (error) => error.status === 401 || error.status === 403;
const list = (id, ...items) => byId(id).replaceChildren(...items);
const item = (title, ...said) => make("li", {}, make("strong", {}, title), ...said.map((text) => make("span", {}, text)));

/** Ready or not, and who works; open to anyone. */
async function watchWorkers() {
  let answer;
  try {
    answer = await ask({ path: "readyz" }, { keyless: true });
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    const isThere = error.status === 503;
    setHealth(isThere ? "waiting" : "away", isThere ? "Not ready yet" : "No answer");
    list("workers", item(isThere ? "None is ready" : "Unknown", isThere ? "one is starting, busy or being replaced" : ""));
    return false;
  }
  const { workers } = answer;
  setHealth("ready", workers.length ? `Ready · ${counted(workers.length, "worker")}` : "Ready");
  const age = ({ heartbeat_age: seconds }) => (seconds < 2 ? "heard just now" : `heard ${short(seconds, 2)} s ago`);
  const said = workers.map((each) => item(each.id, each.device, counted(each.models.length, "model"), age(each)));
  list("workers", ...(said.length ? said : [item("At least one is ready", "their names are shown to administrators")]));
  return true;
}

/** Jobs that wait and that run, of everybody, where this may be known. */
async function queueFigures() {
  if (!mayAsk.metrics) return null;
  try {
    const text = await (await send({ path: "metrics" })).text();
    const sums = { tarflow_queue_depth: 0, tarflow_jobs_running: 0 };
    for (const [, name, value] of text.matchAll(FIGURE)) sums[name] += Number(value);
    return sums;
  } catch (error) {
    mayAsk.metrics = !isRefusal(error);
    return null;
  }
}

function jobItem({ op, model, state, progress, position }) {
  const stands = state === "running" ? percent(progress) : state === "queued" && position ? `${position} go first` : null;
  return item(op, model, stands === null ? state : `${state}, ${stands}`);
}

async function watchQueue() {
  const figures = await queueFigures();
  const items = [];
  if (figures !== null) {
    items.push(item(`${figures.tarflow_queue_depth} waiting`, `${figures.tarflow_jobs_running} running`));
  }
  try {
    if (!mayAsk.jobs) return;
    const jobs = (await ask({ path: `v1/jobs?limit=${MOST_JOBS}` })).data;
    items.push(...jobs.map(jobItem));
    if (jobs.length === 0) items.push(make("li", { class: "note" }, "Streams and asynchronous jobs are listed here."));
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    mayAsk.jobs = !isRefusal(error);
    items.push(make("li", { class: "note" }, mayAsk.jobs ? error.message : "Shown with a key that may ask for it."));
  }
  list("queue", ...items);
}

function showModels() {
  const chosen = chosenModel();
  const said = allModels().map((model) => {
    const card = model.id === chosen?.id && chosen.card.trim();
    const classes = model.num_classes ? counted(model.num_classes, "class", "classes") : "no classes";
    const line = item(model.id, shapeOf(model.image), classes, model.default ? "the default" : "");
    if (card) line.append(make("details", {}, make("summary", {}, "Card"), make("pre", { tabIndex: 0 }, card)));
    return line;
  });
  list("models", ...(said.length ? said : [make("li", { class: "note" }, "None is known yet.")]));
}

async function look() {
  clearTimeout(timer);
  const round = ++asked;
  const isReady = await watchWorkers();
  if (isReady && areAwaited()) await loadModels();
  await watchQueue();
  if (round === asked && !document.hidden) timer = setTimeout(look, hasKey() ? SELDOM_MILLISECONDS : OFTEN_MILLISECONDS);
}

export function setUpService() {
  models.addEventListener("change", showModels);
  keys.addEventListener("change", () => {
    Object.assign(mayAsk, { metrics: true, jobs: true });
    void loadModels().then(look);
  });
  document.addEventListener("visibilitychange", () => {
    clearTimeout(timer);
    if (!document.hidden) void look();
  });
  showModels();
  void loadModels().then(look);
}
