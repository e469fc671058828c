// The images of a request, each a tile, in every state that they went through.

import { dataUrl, make } from "./elements.js";
import { noise } from "./noise.js";
import { Strip } from "./strip.js";

export class Gallery {
  constructor(stage, list) {
    this.stage = stage;
    this.strip = new Strip(list, (place) => this.show(place));
  }

  /** Noise, where nothing was drawn yet. */
  empty(model, count) {
    this.#lay(model, count, (index) => `Noise ${index + 1}`);
    this.stage.dataset.empty = "";
  }

  get isEmpty() {
    return "empty" in this.stage.dataset;
  }

  /** Noise that is about to become the images of a request. */
  begin(model, { num_images: count, seed, class: name }) {
    this.#lay(model, count, (index) => `${name ?? "Image"}, seed ${seed + index}`);
    delete this.stage.dataset.empty;
    this.stage.dataset.running = "";
  }

  /** The state of an image after a block, counted from 0. */
  fill(place, index, source) {
    this.frames[place][index] = source;
    if (index === this.selected) this.strip.fill(place, source);
  }

  /** Show all images as they were after a block; where one is not known, it stays as it is. */
  show(place) {
    this.place = place;
    this.frames[place].forEach((source, index) => (this.tiles[index].firstChild.src = source));
    this.strip.select(place);
  }

  /** The images of an answer; `told(index)` is called for the one that is looked at. */
  finish({ images }, told) {
    delete this.stage.dataset.running;
    const last = this.frames.length - 1;
    for (const image of images) this.fill(last, image.index, dataUrl(image.b64, `image/${image.format}`));
    this.told = told;
    this.show(last);
    this.#select(0);
  }

  #lay(model, count, said) {
    delete this.stage.dataset.running;
    this.told = null;
    this.selected = 0;
    this.frames = Array.from({ length: model.architecture.num_blocks }, () => []);
    this.tiles = Array.from({ length: count }, (_, index) => {
      const picture = make("img", { src: noise(model.image), alt: said(index), draggable: false });
      return make("button", { type: "button", class: "tile", onclick: () => this.#select(index) }, picture);
    });
    this.stage.style.setProperty("--columns", Math.ceil(Math.sqrt(count)));
    this.stage.replaceChildren(...this.tiles);
    for (const tile of this.tiles) tile.disabled = true;
    this.strip.reset(model.architecture.num_blocks);
  }

  #select(index) {
    this.selected = index;
    this.tiles.forEach((tile, i) => {
      tile.disabled = this.tiles.length === 1; // there is nothing to choose
      tile.setAttribute("aria-pressed", String(i === index));
    });
    this.frames.forEach((frame, place) => frame[index] && this.strip.fill(place, frame[index]));
    this.told?.(index);
  }
}
