// Where images to judge come from: dropped, pasted, chosen, the examples, or just drawn.

import { byId } from "./elements.js";

/** Tells "image", whose `detail` is {blob, name}. */
export const sources = new EventTarget();
let drawn = null;

function give(blob, name) {
  sources.dispatchEvent(new CustomEvent("image", { detail: { blob, name } }));
}

/** Offer the image that was drawn last, or looked at. */
export function useDrawn(blob, name, url) {
  drawn = { blob, name };
  const picture = byId("judge-drawn-picture");
  picture.src = url;
  picture.hidden = false;
  byId("judge-drawn").disabled = false;
}

const firstImage = (files) => [...files].find((file) => file.type.startsWith("image/")) ?? files[0];

function acceptDrops(place) {
  const hasFiles = (event) => event.dataTransfer.types.includes("Files");
  place.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    place.dataset.over = "";
  });
  place.addEventListener("dragleave", (event) => {
    if (!place.contains(event.relatedTarget)) delete place.dataset.over;
  });
  place.addEventListener("drop", (event) => {
    delete place.dataset.over;
    const file = firstImage(event.dataTransfer.files);
    if (file === undefined) return;
    event.preventDefault();
    give(file, file.name);
  });
}

export function setUpSources() {
  for (const button of document.querySelectorAll("[data-example]")) {
    button.addEventListener("click", async () => {
      const answer = await fetch(button.querySelector("img").src);
      give(await answer.blob(), button.dataset.name);
    });
  }
  byId("judge-drawn").addEventListener("click", () => {
    give(drawn.blob, drawn.name);
    byId("judge").scrollIntoView({ block: "nearest" });
  });
  byId("file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    if (file !== undefined) give(file, file.name);
    event.target.value = ""; // so that the same file can be chosen again
  });
  document.addEventListener("paste", (event) => {
    const file = firstImage(event.clipboardData.files);
    if (file === undefined) return;
    event.preventDefault();
    give(file, file.name);
  });
  acceptDrops(byId("judge"));
}
