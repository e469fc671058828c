// Numbers as people read them.

const RAISED = { "-": "⁻", "+": "", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
const WHOLE = new Intl.NumberFormat("en");

export const whole = (value) => WHOLE.format(value);

/** Three significant digits, without needless zeros; what is not finite, or null in the API's JSON, as words. */
export function short(value, digits = 3) {
  if (value === null || !Number.isFinite(value)) return "not finite";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.0001 || size >= 1e6)) {
    const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
    return `${minus(mantissa)} × 10${exponent.replace(/./g, (sign) => RAISED[sign])}`;
  }
  return minus(String(Number(value.toPrecision(digits))));
}

/** A number with so many decimals. */
export const fixed = (value, decimals) => minus(value.toFixed(decimals));

/** A share as a percentage. */
export const percent = (share, digits = 2) => `${Number((100 * share).toPrecision(digits))}%`;

/** A probability, where the first per mille and the last are all the same to a reader. */
export function probable(share) {
  if (share < 0.001) return "< 0.1%";
  return share > 0.999 ? "> 99.9%" : percent(share, 3);
}

export const seconds = (milliseconds) =>
  milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;

export const counted = (count, one, many = `${one}s`) => `${whole(count)} ${count === 1 ? one : many}`;

const minus = (text) => text.replace(/^-/, "−");
