// The way from noise to an image: a place for each block, filled as its state comes.

import { make } from "./elements.js";

/** A row of places over a list element; `pick(place)` is told which one the reader wants to see. */
export class Strip {
  constructor(list, pick) {
    this.list = list;
    this.pick = pick;
  }

  /** So many empty places. */
  reset(count) {
    this.places = Array.from({ length: count }, (_, place) => {
      const said = place === count - 1 ? "the image" : `after block ${place + 1}`;
      return make(
        "button",
        { type: "button", disabled: true, "aria-label": `Show ${said}`, onclick: () => this.pick(place) },
        make("span", { class: "number", "aria-hidden": "true" }, place === count - 1 ? "image" : String(place + 1)),
      );
    });
    this.list.replaceChildren(...this.places.map((button) => make("li", {}, button)));
  }

  /** The picture of a place. */
  fill(place, source) {
    const button = this.places[place];
    const picture = button.querySelector("img") ?? button.insertBefore(make("img", { alt: "" }), button.firstChild);
    picture.src = source;
    button.disabled = false;
  }

  /** Mark the place that is shown. */
  select(place) {
    this.places.forEach((button, i) => button.setAttribute("aria-pressed", String(i === place)));
  }
}
