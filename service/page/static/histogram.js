// How the scores of normal images are spread, and where one image stands among them.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 240;
const BEYOND = 0.3;
/** Share of the width that a score beyond all others may take. */

function shape(name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

/**
 * A picture of a histogram ({edges, counts}) with a marker at a value (null: beyond everything), and a line at the
 * threshold where there is one.
 */
export function histogram({ edges, counts }, value, { threshold = null, height = 36, label }) {
  const [low, high] = [edges[0], edges.at(-1)];
  const room = BEYOND * (high - low || 1);
  const place = value === null ? high + room : value;
  const from = Math.max(Math.min(low, place, threshold ?? low), low - room);
  const to = Math.min(Math.max(high, place, threshold ?? high), high + room);
  const x = (at) => 4 + (WIDTH - 8) * Math.min(1, Math.max(0, (at - from) / (to - from || 1)));
  const most = Math.sqrt(Math.max(...counts));
  const picture = shape("svg", { viewBox: `0 0 ${WIDTH} ${height}`, class: "histogram", role: "img", "aria-label": label });
  counts.forEach((count, i) => {
    if (count === 0) return;
    // Square roots, so that rare scores are seen.
    const size = ((height - 8) * Math.sqrt(count)) / most;
    const width = Math.max(1, x(edges[i + 1]) - x(edges[i]) - 0.6);
    picture.append(shape("rect", { x: x(edges[i]), y: height - 1 - size, width, height: size }));
  });
  picture.append(shape("line", { x1: 0, x2: WIDTH, y1: height - 0.5, y2: height - 0.5, class: "ground" }));
  if (threshold !== null) {
    picture.append(shape("line", { x1: x(threshold), x2: x(threshold), y1: 0, y2: height, class: "threshold" }));
  }
  const at = x(place);
  picture.append(shape("path", { d: `M${at} ${height - 1}V7M${at - 4} 1h8l-4 6z`, class: "marker" }));
  return picture;
}

/** The share of the histogram's images that certainly scored less. */
export function shareBelow({ edges, counts }, value) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  if (value === null || value > edges.at(-1)) return 1;
  return counts.reduce((sum, count, i) => sum + (edges[i + 1] <= value ? count : 0), 0) / total;
}
