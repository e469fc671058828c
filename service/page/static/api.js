// Calls of the service that this page came from. A request is plain data, so that it can be sent and shown alike:
// {path, method, headers, json} or {path, form: [[name, text or file, file name]]}.

/** The page's own place, wherever a proxy has put it. */
const BASE = new URL("./", document.baseURI);
const KEY = "tarflow-key";
let key = stored();

/** Why a call came to nothing. `status` is 0 where there was no answer. */
export class Failure extends Error {
  constructor({ status, code, message, param = null, retryAfter = null }) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }
}

function stored() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}

export const hasKey = () => key !== null;

/** Send this key from now on, or none; it is kept as long as the tab. */
export function useKey(value) {
  key = value;
  try {
    if (value === null) sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, value);
  } catch {
    // Without storage it is kept as long as the page.
  }
}

/** The address of a path, such as the API writes into links. */
export const addressOf = (path) => new URL(path.replace(/^\//, ""), BASE).href;

/** Send a request; returns the answer, or throws a `Failure` (an `AbortError` where the signal says so). */
export async function send(request, { signal, keyless = false } = {}) {
  const { path, json, form, method = json || form ? "POST" : "GET" } = request;
  const headers = new Headers(request.headers);
  if (key !== null && !keyless) headers.set("Authorization", `Bearer ${key}`);
  let body;
  if (json) {
    headers.set("Content-Type", "application/json");
    body = JSON.stringify(json);
  } else if (form) {
    body = new FormData();
    for (const field of form) body.append(...field);
  }
  let answer;
  try {
    answer = await fetch(addressOf(path), { method, headers, body, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure({ status: 0, code: "unreachable", message: "No answer came back." });
  }
  if (!answer.ok) throw await failureOf(answer);
  return answer;
}

/** The JSON that answers a request. */
export async function ask(request, options) {
  const answer = await send(request, options);
  try {
    return await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    // It broke off on the way, or is that of a proxy.
    throw new Failure({ status: 0, code: "unreadable", message: "What came back cannot be read." });
  }
}

async function failureOf(answer) {
  const after = Number.parseFloat(answer.headers.get("Retry-After") ?? "");
  const retryAfter = Number.isFinite(after) ? after : null;
  let error = {};
  try {
    error = (await answer.json()).error ?? {};
  } catch {
    // Not the service's own words: those of a proxy before it.
  }
  const { code = "unexpected", message = `The answer was ${answer.status} ${answer.statusText}.`, param = null } = error;
  return new Failure({ status: answer.status, code, message, param, retryAfter });
}

const STATUS = {
  invalid_request_error: 422,
  rate_limit_error: 429,
  server_error: 500,
  unavailable_error: 503,
  timeout_error: 504,
};

/** The failure that an event or a document of a job tells of, with the status that it would have had at once. */
export const failureIn = (error) => new Failure({ ...error, status: STATUS[error.type] ?? 500 });
