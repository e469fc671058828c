// A request of this page as the command that sends the same.

import { addressOf } from "./api.js";

const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

/** A field as curl sends it: text as it is, where curl would read signs in it; the name of a file in its own quotes. */
function fieldOf(name, value, file) {
  if (!(value instanceof Blob)) return `${/^[\w.-]*$/.test(value) ? "-F" : "--form-string"} ${quoted(`${name}=${value}`)}`;
  const isPlain = /^\w[\w. -]*$/.test(file);
  return `-F ${quoted(`${name}=@${isPlain ? file : `"${file.replace(/["\\]/g, "\\$&")}"`}`)}`;
}

/** The command, with a key in its place but not the key itself. */
export function curlOf({ path, headers = {}, json, form }, withKey) {
  const streams = headers.Accept === "text/event-stream";
  const parts = [`curl -s${streams ? "N" : ""} ${quoted(addressOf(path))}`];
  if (withKey) parts.push('-H "Authorization: Bearer $TARFLOW_KEY"');
  for (const [name, value] of Object.entries(headers)) parts.push(`-H ${quoted(`${name}: ${value}`)}`);
  if (json) parts.push("-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(json))}`);
  for (const field of form ?? []) parts.push(fieldOf(...field));
  return parts.join(" \\\n  ");
}
