"""A detector in one picture: how the scores of normal and anomalous images lie, and a ROC curve for each set.

Everything is drawn at twice the size and averaged, which smooths lines and letters alike. The colours are those of
Okabe and Ito, "Color Universal Design" (2008), which people with any kind of colour vision can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from training.detection import Floats, detection_figures, roc_curve

Colour = tuple[int, int, int]
Point = tuple[float, float]

BLUE, VERMILLION, GREEN, ORANGE = (0, 114, 178), (213, 94, 0), (0, 158, 115), (230, 159, 0)
SKY, PURPLE, BLACK, WHITE = (86, 180, 233), (204, 121, 167), (0, 0, 0), (255, 255, 255)
CURVES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
"""Colours of the ROC curves; once they are used up, the next round of them is dashed, the one after it dotted."""
DASHES: tuple[tuple[float, float] | None, ...] = (None, (9, 5), (2, 4))
"""Length and distance of the strokes of a line, for each round of the colours."""
MAX_SETS = 14
"""Sets whose names fit in the legend."""
TEXT, GREY, FAINT = (60, 60, 60), (140, 140, 140), (228, 228, 228)

WIDTH, HEIGHT, SCALE = 1240, 560, 2
"""Size of the picture, and how many times larger it is drawn."""
TITLE_SIZE, TEXT_SIZE, LEGEND_SIZE = 19, 15, 14
BINS, FILLING = 60, 110
"""Bins of the histogram, and how opaque their filling is, of 255."""
TAIL, REACH = 0.005, 3.0
"""Share of scores that may lie beyond either end of the axis, and how far it goes beyond the normal ones at most."""


def detection_plot(
    normal_N: ArrayLike,
    anomalous: Mapping[str, ArrayLike],
    *,
    threshold: float | None = None,
    alpha: float | None = None,
) -> NDArray[np.uint8]:
    """The picture (3, H, W): a histogram of all scores, and ROC curves of the sets, on white.

    ``normal_N`` are the scores of normal images, ``anomalous`` those of each named set, larger being more anomalous;
    ``threshold`` is what a score must exceed to be flagged, and ``alpha`` its level. Raises ``ValueError`` for no sets
    or more than :data:`MAX_SETS`, a threshold that is NaN, and as :func:`training.detection.detection_figures`.
    """
    if not 1 <= len(anomalous) <= MAX_SETS:
        raise ValueError(f"anomalous: got {len(anomalous)} sets, allowed is 1 to {MAX_SETS}")
    if threshold is not None and math.isnan(threshold):
        raise ValueError("threshold: got NaN, allowed is any number")
    curves = {name: roc_curve(normal_N, scores) for name, scores in anomalous.items()}
    areas = {name: detection_figures(normal_N, scores).auroc for name, scores in anomalous.items()}
    normal = np.asarray(normal_N, np.float64)
    sets = {name: np.asarray(scores, np.float64) for name, scores in anomalous.items()}
    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), WHITE)
    _draw_histogram(image, normal, sets, threshold, alpha)
    _draw_curves(image, curves, areas)
    if threshold is not None:
        _draw_working_points(image, normal, sets, threshold)
    return np.asarray(image.reduce(SCALE)).transpose(2, 0, 1).copy()


@dataclass(frozen=True)
class _Panel:
    """A rectangle with two axes on a picture; its own coordinates are those of the data."""

    image: Image.Image
    box: tuple[float, float, float, float]
    """Left, upper, right and lower edge in pixels of the finished picture."""
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def place(self, x: float, y: float) -> Point:
        """Where a point of the data lies, in pixels of the finished picture."""
        left, upper, right, lower = self.box
        across = (x - self.x_range[0]) / (self.x_range[1] - self.x_range[0])
        up = (y - self.y_range[0]) / (self.y_range[1] - self.y_range[0])
        return left + across * (right - left), lower - up * (lower - upper)

    def line(self, points: list[Point], colour: Colour, width: float, dash: tuple[float, float] | None = None) -> None:
        """A line through points of the data."""
        _stroke(self.image, [self.place(*point) for point in points], colour, width, dash)

    def axes(self, x_label: str, y_label: str, title: str) -> None:
        """Grid, ticks, labels and title; goes below what is drawn after it."""
        left, upper, right, lower = self.box
        for y in _ticks(*self.y_range):
            _, at = self.place(self.x_range[0], y)
            _stroke(self.image, [(left, at), (right, at)], FAINT, 1)
            _text(self.image, (left - 8, at), _number(y, self.y_range), "rm")
        for x in _ticks(*self.x_range):
            at, _ = self.place(x, self.y_range[0])
            _stroke(self.image, [(at, lower), (at, lower + 5)], GREY, 1.5)
            _text(self.image, (at, lower + 9), _number(x, self.x_range), "ma")
        _stroke(self.image, [(left, lower), (right, lower)], GREY, 1.5)
        middle = (left + right) / 2, (upper + lower) / 2
        _text(self.image, (middle[0], lower + 34), x_label, "ma")
        _text_upwards(self.image, (left - 56, middle[1]), y_label)
        _text(self.image, (left, upper - 18), title, "ls", BLACK, TITLE_SIZE)


def _draw_histogram(
    image: Image.Image, normal: Floats, sets: Mapping[str, Floats], threshold: float | None, alpha: float | None
) -> None:
    pooled = np.concatenate(list(sets.values()))
    low, high = _axis(normal, pooled, threshold)
    edges = np.linspace(low, high, BINS + 1)
    groups = {f"normal ({len(normal):,})": (normal, BLUE), f"anomalous ({len(pooled):,})": (pooled, VERMILLION)}
    # What lies beyond the axis stands in its outermost bins.
    bars = {
        name: (np.histogram(np.clip(scores, low, high), edges)[0] / len(scores), colour)
        for name, (scores, colour) in groups.items()
    }
    top = 1.18 * 100 * max(float(heights.max()) for heights, _ in bars.values())
    panel = _Panel(image, (90, 62, 650, HEIGHT - 66), (low, high), (0.0, top))
    panel.axes("anomaly score", "images in a bin (%)", "Scores")
    for heights, colour in bars.values():
        _draw_bars(panel, edges, 100 * heights, colour)
    beyond = int(sum(np.count_nonzero((scores < low) | (scores > high)) for scores, _ in groups.values()))
    rows = [_Entry(name, colour) for name, (_, colour) in groups.items()]
    if threshold is not None:
        level = "" if alpha is None else f" (alpha = {alpha:g})"
        rows.append(_Entry(f"threshold {threshold:.4g}{level}", BLACK, (6, 4)))
        if low <= threshold <= high:
            panel.line([(threshold, 0), (threshold, top)], BLACK, 2, (6, 4))
    _legend(image, (panel.box[2] - 6, panel.box[1] + 4), rows, from_top=True)
    if beyond:
        note = f"{beyond:,} score{'s' if beyond > 1 else ''} beyond the axis in its outermost bins"
        _text(image, (panel.box[2], panel.box[1] - 18), note, "rs", GREY, LEGEND_SIZE - 1)


def _draw_bars(panel: _Panel, edges: Floats, heights: Floats, colour: Colour) -> None:
    """A histogram as filled outlines; the filling lets what is behind it show."""
    # Empty bins have no outline: it would hide the axis.
    change = np.flatnonzero(np.diff(np.concatenate([[False], heights > 0, [False]]).astype(np.int8)))
    mask, outlines = Image.new("L", panel.image.size, 0), []
    for start, stop in change.reshape(-1, 2).tolist():
        x = edges[start : stop + 1].repeat(2).tolist()
        y = [0.0, *heights[start:stop].repeat(2).tolist(), 0.0]
        outlines.append(list(zip(x, y, strict=True)))
        ImageDraw.Draw(mask).polygon([_scaled(panel.place(*point)) for point in outlines[-1]], fill=FILLING)
    panel.image.paste(colour, mask=mask)
    for outline in outlines:
        panel.line(outline, colour, 1.5)


def _roc_panel(image: Image.Image) -> _Panel:
    side = HEIGHT - 66 - 62
    return _Panel(image, (WIDTH - 36 - side, 62, WIDTH - 36, HEIGHT - 66), (0.0, 1.0), (0.0, 1.0))


def _draw_curves(image: Image.Image, curves: Mapping[str, tuple[Floats, Floats]], areas: Mapping[str, float]) -> None:
    panel = _roc_panel(image)
    panel.axes("normal images flagged", "anomalous images flagged", "ROC curves, AUROC")
    panel.line([(0, 0), (1, 1)], GREY, 1.5, (3, 5))
    rows = []
    for number, (name, (false, true)) in enumerate(curves.items()):
        colour, dash = _style(number)
        panel.line(list(zip(false.tolist(), true.tolist(), strict=True)), colour, 2.2, dash)
        rows.append(_Entry(name, colour, dash, f"{areas[name]:.3f}"))
    _legend(image, (panel.box[2] - 6, panel.box[3] - 8), rows, from_top=False)


def _draw_working_points(image: Image.Image, normal: Floats, sets: Mapping[str, Floats], threshold: float) -> None:
    """A dot on every curve where the threshold lies."""
    panel, draw = _roc_panel(image), ImageDraw.Draw(image)
    false = float(np.mean(normal > threshold))
    for number, scores in enumerate(sets.values()):
        centre = _scaled(panel.place(false, float(np.mean(scores > threshold))))
        draw.circle(centre, 5 * SCALE, fill=_style(number)[0], outline=WHITE, width=SCALE)
    _text(image, (panel.box[2], panel.box[1] - 18), "dots: at the threshold", "rs", GREY, LEGEND_SIZE - 1)


def _style(number: int) -> tuple[Colour, tuple[float, float] | None]:
    return CURVES[number % len(CURVES)], DASHES[number // len(CURVES)]


def _axis(normal: Floats, pooled: Floats, threshold: float | None) -> tuple[float, float]:
    """A range with nearly all normal scores, and the anomalous ones unless they lie far beyond those."""
    finite = [scores[np.isfinite(scores)] for scores in (normal, pooled)]
    known = [scores for scores in finite if len(scores)]
    if not known:
        return -1.0, 1.0
    spans = [np.quantile(scores, [TAIL, 1 - TAIL]) for scores in known]
    low, high = (float(bound) for bound in spans[0])
    # A group without any spread says nothing about how far is far.
    reach = REACH * (high - low) or math.inf
    low = max(min(float(span[0]) for span in spans), low - reach)
    high = min(max(float(span[1]) for span in spans), high + reach)
    if threshold is not None and math.isfinite(threshold) and low - reach <= threshold <= high + reach:
        low, high = min(low, threshold), max(high, threshold)
    # Equal scores still need an axis, and one that floating point can divide.
    margin, largest = 0.04 * (high - low), max(abs(low), abs(high))
    if high - low <= 1e-9 * largest or not margin:
        margin = 0.1 * largest or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """About six round numbers from ``low`` to ``high``: multiples of 1, 2 or 5 times a power of ten."""
    step = _step(low, high)
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _step(low: float, high: float) -> float:
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    return min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))


def _number(value: float, within: tuple[float, float]) -> str:
    """A tick with as many digits as tell it from its neighbours."""
    # 10 ** -1 need not be the power whose logarithm is exactly -1.
    last = math.floor(math.log10(_step(*within)) + 1e-9)
    first = math.floor(math.log10(max(abs(bound) for bound in within)))
    if -4 <= first < 6 or not value:
        return f"{value:,.{max(0, -last)}f}"
    return f"{value:.{max(0, first - last)}e}"


def _scaled(point: Point) -> Point:
    return point[0] * SCALE, point[1] * SCALE


def _stroke(
    image: Image.Image, points: list[Point], colour: Colour, width: float, dash: tuple[float, float] | None = None
) -> None:
    """A line in pixels of the finished picture."""
    draw, thick = ImageDraw.Draw(image), round(width * SCALE)
    for piece in [points] if dash is None else _dashed(points, dash):
        draw.line([_scaled(point) for point in piece], fill=colour, width=thick, joint="curve")


def _dashed(points: list[Point], dash: tuple[float, float]) -> list[list[Point]]:
    """The strokes of a dashed line, which go around its corners."""
    xy = np.array(points, np.float64)
    along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(xy, axis=0).T))])
    pieces = []
    for start in np.arange(0, along[-1], sum(dash)):
        stop = min(start + dash[0], along[-1])
        inner = along[(along > start) & (along < stop)]
        at = np.concatenate([[start], inner, [stop]])
        pieces.append(list(zip(*(np.interp(at, along, xy[:, axis]).tolist() for axis in (0, 1)), strict=True)))
    return pieces


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SCALE)


def _text(image: Image.Image, at: Point, text: str, anchor: str, colour: Colour = TEXT, size: int = TEXT_SIZE) -> None:
    ImageDraw.Draw(image).text(_scaled(at), text, fill=colour, font=_font(size), anchor=anchor)


def _text_upwards(image: Image.Image, centre: Point, text: str) -> None:
    """Text that is read from below, around a point."""
    left, upper, right, lower = _font(TEXT_SIZE).getbbox(text)
    mask = Image.new("L", (math.ceil(right - left), math.ceil(lower - upper)), 0)
    ImageDraw.Draw(mask).text((-left, -upper), text, fill=255, font=_font(TEXT_SIZE))
    mask = mask.transpose(Image.Transpose.ROTATE_90)
    x, y = _scaled(centre)
    image.paste(TEXT, (round(x - mask.width / 2), round(y - mask.height / 2)), mask)


@dataclass(frozen=True)
class _Entry:
    """A line of a legend."""

    name: str
    colour: Colour
    dash: tuple[float, float] | None = None
    value: str = ""


def _legend(image: Image.Image, corner: Point, rows: list[_Entry], *, from_top: bool) -> None:
    """Names and values beside a piece of their lines, in a box whose right upper (or lower) corner is given."""
    row_height, stroke, inner, gap = LEGEND_SIZE + 7, 26, 10, 8
    names, values = (
        max(_font(LEGEND_SIZE).getlength(text) for text in texts) / SCALE
        for texts in ([row.name for row in rows], [row.value for row in rows])
    )
    width = inner + stroke + gap + names + (values and 1.5 * gap + values) + inner
    height = len(rows) * row_height + 2 * inner - 6
    right, upper = corner[0], corner[1] if from_top else corner[1] - height
    left = right - width
    # Curves and bars behind it stay faintly visible.
    mask = Image.new("L", image.size, 0)
    box = (*_scaled((left, upper)), *_scaled((right, upper + height)))
    ImageDraw.Draw(mask).rounded_rectangle(box, 6 * SCALE, fill=225)
    image.paste(WHITE, mask=mask)
    ImageDraw.Draw(image).rounded_rectangle(box, 6 * SCALE, outline=FAINT, width=SCALE)
    for number, row in enumerate(rows):
        y = upper + inner - 3 + (number + 0.5) * row_height
        _stroke(image, [(left + inner, y), (left + inner + stroke, y)], row.colour, 3, row.dash)
        _text(image, (left + inner + stroke + gap, y), row.name, "lm", TEXT, LEGEND_SIZE)
        _text(image, (right - inner, y), row.value, "rm", BLACK, LEGEND_SIZE)
