// A request of this page as the command that sends the same.

import { addressOf } from "./api.js";

const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

/** The command, with a key in its place but not the key itself. */
export function curlOf({ path, headers = {}, json, form }, withKey) {
  const streams = headers.Accept === "text/event-stream";
  const parts = [`curl -s${streams ? "N" : ""} ${quoted(addressOf(path))}`];
  if (withKey) parts.push('-H "Authorization: Bearer $TARFLOW_KEY"');
  for (const [name, value] of Object.entries(headers)) parts.push(`-H ${quoted(`${name}: ${value}`)}`);
  if (json) parts.push("-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(json))}`);
  for (const [name, value, file] of form ?? []) {
    parts.push(value instanceof Blob ? `-F ${quoted(`${name}=@${file}`)}` : `-F ${quoted(`${name}=${value}`)}`);
  }
  return parts.join(" \\\n  ");
}
