"""The table of an ablation beside the paper's order, as Markdown and JSON, and loss against distance as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal
from xml.sax.saxutils import escape

import numpy as np

from training.ablations.plan import Claim, Study
from training.ablations.run import Ablation, Measured

Outcome = Literal["agrees", "disagrees", "within noise", "not measured"]
BEYOND_DOUBT = 2.0
"""Standard errors of the difference beyond which an order counts."""
LOSS_PAPER = "loss and FID fall together"
NO_CHECKPOINTS = 8
"""Points that the claim about loss and distance needs."""
LEAST_POINTS = 3
"""Points that a correlation and a picture need."""


def outcome(claim: Claim, rows: dict[str, Measured]) -> tuple[Outcome, str]:
    """Whether the samples of ``claim.better`` are nearer to real images, and by how much."""
    if claim.better not in rows or claim.worse not in rows:
        return "not measured", ""
    better, worse = rows[claim.better].figure, rows[claim.worse].figure
    if better is None or worse is None:
        if better is worse:
            return "not measured", "neither has enough finite samples"
        which = claim.worse if worse is None else claim.better
        return ("agrees" if worse is None else "disagrees"), f"{which} has too few finite samples to measure"
    difference = worse - better
    errors = difference.value / max(difference.standard_error, 1e-12)
    text = f"{difference.value:+.1f} ± {difference.standard_error:.1f}"
    if abs(errors) <= BEYOND_DOUBT:
        return "within noise", text
    return ("agrees" if errors > 0 else "disagrees"), text


def study_outcome(outcomes: Sequence[Outcome]) -> str:
    """One verdict on all claims of a study."""
    found = set(outcomes)
    if len(found) == 1:
        return outcomes[0]
    if "not measured" in found:
        return "not all measured"
    if "disagrees" in found:
        return "disagrees in part"
    return "agrees in part, the rest within noise"


def spearman(points: Sequence[Measured]) -> float | None:
    """Spearman's rank correlation of loss and distance; None for fewer than three points, or where one is constant."""
    loss, distance = _series(points)
    if len(loss) < LEAST_POINTS or _constant(points):
        return None
    return float(np.corrcoef(_ranks(loss), _ranks(distance))[0, 1])


def comparable(points: Sequence[Measured]) -> list[Measured]:
    """The points that have both a finite loss and a distance."""
    return [point for point in points if point.figure is not None and point.content["bits_per_dim"] is not None]


def _series(points: Sequence[Measured]) -> tuple[np.ndarray, np.ndarray]:
    """Loss and distance of the points that have both."""
    pairs = [(float(p.content["bits_per_dim"]), p.figure.value) for p in comparable(points) if p.figure is not None]
    loss, distance = np.array(pairs, np.float64).reshape(-1, 2).T
    return loss, distance


def _constant(points: Sequence[Measured]) -> str:
    """Which of the two has the same value at all points, so that it has no ranks; empty for neither."""
    loss, distance = _series(points)
    names = {"bits/dim": loss, "distance": distance}
    return " and ".join(name for name, values in names.items() if len(values) and np.ptp(values) == 0)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    ranks = np.empty(len(values))
    ranks[np.argsort(values)] = np.arange(len(values))
    for value in np.unique(values):
        ranks[values == value] = ranks[values == value].mean()
    return ranks


def loss_outcome(points: Sequence[Measured]) -> str:
    """The verdict on the claim that loss and distance fall together."""
    rho, count = spearman(points), len(comparable(points))
    if rho is None or count < NO_CHECKPOINTS:
        return "not measured"
    # For ten points the two-sided 5% point of Spearman's ρ is 0.65 (Zar 1972); for eight 0.74.
    critical = 0.74 if count < 10 else 0.65
    if abs(rho) < critical:
        return "within noise"
    return "agrees" if rho > 0 else "disagrees"


def markdown(ablation: Ablation) -> str:
    """The whole report."""
    scale = ablation.options.scale
    intro = (
        f"Every flow was trained on {scale.steps * scale.batch_size:,} images of {ablation.data_name} "
        f"({scale.steps:,} steps of {scale.batch_size}), with the same seed, order of images and recipe; the base has "
        f"{scale.depth} blocks of {scale.depth} layers, width {scale.width}, patches of {scale.patch_size}×"
        f"{scale.patch_size}. Distances are the {ablation.features}. An order counts beyond {BEYOND_DOUBT:g} standard "
        "errors of the difference; these are of the choice of the samples: each flow was trained once. "
        f"Bits/dim are of {ablation.num_scored:,} test images and comparable between equal kinds and sizes of noise "
        "only."
    )
    sections = ["# The paper's ablations in miniature", intro, _summary(ablation)]
    for study in ablation.plan.studies:
        sections += [f"## {study.title}", f"Paper: {study.paper}.", _table(ablation, study), _claims(ablation, study)]
    sections += ["## Loss and distance over training", _loss_table(ablation)]
    if has_plot(ablation):
        sections += ["![Loss and distance of the base run's checkpoints](loss.svg)"]
    return "\n\n".join(section for section in sections if section) + "\n"


def _summary(ablation: Ablation) -> str:
    lines = ["| study | paper | here |", "|---|---|---|"]
    for study in ablation.plan.studies:
        verdict = study_outcome([outcome(claim, ablation.rows)[0] for claim in study.claims])
        lines.append(f"| {study.title} | {study.paper} | {verdict} |")
    verdict, shown = loss_outcome(ablation.points), _correlation(ablation.points)
    lines.append(f"| Loss and distance over training | {LOSS_PAPER} | {verdict}{shown} |")
    return "\n".join(lines)


def _correlation(points: Sequence[Measured]) -> str:
    rho, count = spearman(points), len(comparable(points))
    if rho is not None:
        return f": Spearman's ρ {rho:.2f} over {count} checkpoints"
    if count >= LEAST_POINTS:
        return f": no Spearman's ρ, since all {count} checkpoints have the same {_constant(points)}"
    return ""


def _table(ablation: Ablation, study: Study) -> str:
    lines = [
        "| row | what | parameters | bits/dim | distance | samples not finite | training |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name in study.rows:
        text = ablation.plan.rows[name].text
        found = ablation.rows.get(name)
        if found is None:
            lines.append(f"| {name} | {text} | | | not measured | | |")
        elif "diverged" in found.content:
            lines.append(f"| {name} | {text} | | | diverged at step {found.content['diverged']['step']} | | |")
        else:
            content, figure = found.content, found.figure
            distance = "none" if figure is None else f"{figure.value:.1f} ± {figure.standard_error:.1f}"
            lines.append(
                f"| {name} | {text} | {content['parameters']:,} | {_bits(content)} | {distance} | "
                f"{content['samples_not_finite']:,} of {content['samples']:,} | "
                f"{content['training']['seconds']:.0f} s |"
            )
    return "\n".join(lines)


def _bits(content: dict[str, Any]) -> str:
    if content["bits_per_dim"] is None or content["bits_standard_error"] is None:
        return "none"
    missing = content["bits_not_finite"]
    rest = f", {missing} images not finite" if missing else ""
    return f"{content['bits_per_dim']:.3f} ± {content['bits_standard_error']:.3f}{rest}"


def _claims(ablation: Ablation, study: Study) -> str:
    lines = []
    for claim in study.claims:
        verdict, text = outcome(claim, ablation.rows)
        difference = f" (difference {text})" if text else ""
        lines.append(f"- {claim.better} better than {claim.worse}: **{verdict}**{difference}")
    return "\n".join(lines)


def _loss_table(ablation: Ablation) -> str:
    if not ablation.points:
        return "Not measured."
    lines = ["| step | bits/dim | distance |", "|---:|---:|---:|"]
    for point in ablation.points:
        figure = point.figure
        distance = "none" if figure is None else f"{figure.value:.1f} ± {figure.standard_error:.1f}"
        lines.append(f"| {point.content['step']:,} | {_bits(point.content)} | {distance} |")
    return "\n".join(lines)


def to_json(ablation: Ablation) -> dict[str, Any]:
    """Everything that the Markdown says."""
    studies = []
    for study in ablation.plan.studies:
        claims = []
        for claim in study.claims:
            verdict, text = outcome(claim, ablation.rows)
            claims.append({**asdict(claim), "outcome": verdict, "difference": text or None})
        verdicts = [outcome(claim, ablation.rows)[0] for claim in study.claims]
        studies.append({**asdict(study), "claims": claims, "outcome": study_outcome(verdicts)})
    return {
        "data": ablation.data_name,
        "distance": ablation.features,
        "scale": asdict(ablation.options.scale),
        "rows": {name: found.content for name, found in ablation.rows.items()},
        "studies": studies,
        "loss": {
            "paper": LOSS_PAPER,
            "spearman": spearman(ablation.points),
            "outcome": loss_outcome(ablation.points),
            "points": [point.content for point in ablation.points],
        },
    }


WIDTH, HEIGHT, LEFT, LOWER = 640, 420, 80, 60


def has_plot(ablation: Ablation) -> bool:
    """Whether there are points enough for :func:`loss_plot`."""
    return len(comparable(ablation.points)) >= LEAST_POINTS


def loss_plot(ablation: Ablation) -> str:
    """Distance over bits/dim of the base run's checkpoints, as SVG; in the order of training, joined by a line."""
    steps = [point.content["step"] for point in comparable(ablation.points)]
    x, y = _series(ablation.points)
    places = list(zip(_scale(x, LEFT, WIDTH - 30), _scale(y, HEIGHT - LOWER, 40), strict=True))
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    rho = spearman(ablation.points)
    title = f"Checkpoints of the base run: Spearman's ρ {rho:.2f}" if rho is not None else "Checkpoints of the base run"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13" fill="#333">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{escape(title)}</text>',
        f'<path d="M{LEFT} 40V{HEIGHT - LOWER}H{WIDTH - 20}" fill="none" stroke="#888"/>',
        f'<polyline points="{line}" fill="none" stroke="#0072b2"/>',
    ]
    for (a, b), step in zip(places, steps, strict=True):
        parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="#0072b2"><title>step {step}</title></circle>')
        parts.append(f'<text x="{a + 7:.1f}" y="{b - 6:.1f}" font-size="11">{step}</text>')
    for value, place in zip((x.min(), x.max()), (LEFT, WIDTH - 30), strict=True):
        parts.append(f'<text x="{place}" y="{HEIGHT - LOWER + 18}" text-anchor="middle">{value:.2f}</text>')
    for value, place in zip((y.min(), y.max()), (HEIGHT - LOWER, 40), strict=True):
        parts.append(f'<text x="{LEFT - 8}" y="{place + 4}" text-anchor="end">{value:.0f}</text>')
    parts += [
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 14}" text-anchor="middle">test bits/dim</text>',
        f'<text transform="translate(22 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">distance of samples</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _scale(values: np.ndarray, first: float, last: float) -> list[float]:
    spread = float(values.max() - values.min()) or 1.0
    return [float(first + (value - values.min()) / spread * (last - first)) for value in values]
