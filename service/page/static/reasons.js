// Why: every score of an image beside those of the calibration's normal images.

import { make } from "./elements.js";
import { histogram, shareBelow } from "./histogram.js";
import { percent, short } from "./numbers.js";

const MEANING = {
  combined: "all views together",
  combined_without_codes: "all views but code lengths",
  nll: "bits per dimension: how unlikely",
  typicality: "how far from the usual likelihood, either way",
  complexity: "how much worse than a lossless code",
  latent: "how far the latent is from white noise",
  gradient: "how steep the likelihood is here",
  max_patch: "the most unusual patches for their place",
};

function standing(share, value) {
  if (value === null) return "beyond all";
  if (share === 1) return "above all";
  return share === 0 ? "among the lowest" : `above ${percent(Math.floor(1000 * share) / 1000, 3)}`;
}

/** A table of the features; the one that decided comes first, with the threshold. */
export function reasons(features, scores, decided, threshold) {
  const names = Object.keys(features).filter((name) => name in scores && (name in MEANING || name === decided));
  names.sort((a, b) => (b === decided) - (a === decided));
  const rows = names.map((name) => {
    const value = features[name];
    const said = standing(shareBelow(scores[name].histogram, value), value);
    const label = `${name.replaceAll("_", " ")}: ${said} of the normal images`;
    const options = { label, threshold: name === decided ? threshold : null };
    return make(
      "tr",
      { dataset: { decided: String(name === decided) } },
      make("th", { scope: "row" }, name.replaceAll("_", " "), make("span", {}, MEANING[name] ?? "")),
      make("td", { class: "picture" }, histogram(scores[name].histogram, value, options)),
      make("td", {}, short(value), make("span", {}, said)),
    );
  });
  return make(
    "table",
    { class: "reasons" },
    make("caption", {}, "Each score (▼) among those of the calibration’s normal images; larger is more unusual."),
    make("thead", { class: "unseen" }, make("tr", {}, ...["Score", "Normal images", "This one"].map(column))),
    make("tbody", {}, ...rows),
  );
}

const column = (title) => make("th", { scope: "col" }, title);
