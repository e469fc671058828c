// What happens to a job, as server-sent events: read as the HTML standard says, and across broken connections.

import { Failure, send } from "./api.js";

const FINAL = new Set(["completed", "failed", "canceled"]);
const MOST_TRIES = 5;
const PAUSE_MILLISECONDS = 1000;

async function* read(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let fields = {};
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (fields.data !== undefined) yield { kind: fields.event, id: fields.id, data: JSON.parse(fields.data) };
          fields = {};
        } else if (!line.startsWith(":")) {
          const [, name, text] = /^([^:]*):? ?(.*)$/.exec(line);
          fields[name] = name === "data" && fields.data !== undefined ? `${fields.data}\n${text}` : text;
        }
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

/** Whether a connection that broke so may be taken up again. */
const isPassing = (error) => !(error instanceof Failure) || error.status === 0 || error.status === 503;

/** Send a request and yield every event of its job, {kind, id, data}, to the last; throws a `Failure`. */
export async function* follow(request, { signal }) {
  let response = await send(request, { signal });
  let links = null;
  let last = null;
  for (let tries = 0; tries <= MOST_TRIES; tries++) {
    try {
      response ??= await send({ path: links.events, headers: last === null ? {} : { "Last-Event-ID": last } }, { signal });
      if (response.status === 204) break;
      for await (const event of read(response)) {
        links = event.data.links ?? links;
        if (event.kind === "reconnect") break;
        last = event.id ?? last;
        tries = 0;
        yield event;
        if (FINAL.has(event.kind)) return;
      }
    } catch (error) {
      if (signal.aborted || !isPassing(error)) throw error;
    }
    if (links === null) break;
    response = null;
    await new Promise((resolve) => setTimeout(resolve, PAUSE_MILLISECONDS));
    signal.throwIfAborted();
  }
  throw new Failure({ status: 0, code: "unreachable", message: "The connection broke, and could not be taken up again." });
}
