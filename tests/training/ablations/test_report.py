"""What the report says of an ablation: outcomes, the correlation of loss and distance, and its picture."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from training.ablations.plan import Claim, Scale, make_plan
from training.ablations.report import (
    LEAST_POINTS,
    has_plot,
    loss_outcome,
    loss_plot,
    markdown,
    outcome,
    spearman,
    study_outcome,
    to_json,
)
from training.ablations.run import Ablation, AblationOptions, Measured


def measured(value: float | None, bits: float | None = 1.0) -> Measured:
    """A row whose distance has a standard error of about one."""
    spread = np.linspace(-1, 1, 20)
    pseudo = [] if value is None else (value + spread * np.sqrt(20) / spread.std(ddof=1)).tolist()
    content = {"value": value, "uncorrected": value, "pseudo_values": pseudo}
    return Measured(name="row", content={"bits_per_dim": bits, "distance": None if value is None else content})


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [(10, 30, "agrees"), (30, 10, "disagrees"), (10, None, "agrees"), (None, 10, "disagrees"),
     (None, None, "not measured")],
)  # fmt: skip
def test_outcomes_follow_the_difference(better: float | None, worse: float | None, expected: str) -> None:
    rows = {"a": measured(better), "b": measured(worse)}
    assert outcome(Claim(better="a", worse="b"), rows)[0] == expected
    assert outcome(Claim(better="a", worse="c"), rows)[0] == "not measured"


def test_an_order_counts_beyond_two_standard_errors_only() -> None:
    random = np.random.default_rng(0)
    base = measured(0)
    for gap, expected in ((1.5, "within noise"), (-1.5, "within noise"), (2.5, "agrees"), (-2.5, "disagrees")):
        noise = random.permutation(np.linspace(-1, 1, 20))
        pseudo = noise * np.sqrt(20) / noise.std(ddof=1) + gap
        own = np.array(base.content["distance"]["pseudo_values"])
        content = {"uncorrected": gap, "pseudo_values": (own + pseudo).tolist()}
        other = Measured(name="row", content={"distance": content})
        assert outcome(Claim(better="a", worse="b"), {"a": base, "b": other})[0] == expected


def test_a_study_is_judged_by_all_its_claims() -> None:
    assert study_outcome(["agrees", "agrees"]) == "agrees"
    assert study_outcome(["agrees", "within noise"]) == "agrees in part, the rest within noise"
    assert study_outcome(["agrees", "disagrees"]) == "disagrees in part"
    assert study_outcome(["disagrees"]) == "disagrees"
    assert study_outcome(["agrees", "not measured"]) == "not all measured"


def test_spearmans_correlation_is_of_ranks() -> None:
    together = [measured(value**3, bits=value) for value in range(1, 11)]
    assert spearman(together) == pytest.approx(1)
    assert loss_outcome(together) == "agrees"
    apart = [measured(-value, bits=value) for value in range(1, 11)]
    assert (spearman(apart), loss_outcome(apart)) == (pytest.approx(-1), "disagrees")
    assert loss_outcome(together[:7]) == "not measured"
    assert spearman(together[:2]) is None
    # Ties: scipy.stats.spearmanr([1, 2, 2, 3], [1, 3, 2, 4]).
    tied = [measured(d, bits=b) for b, d in ((1, 1), (2, 3), (2, 2), (3, 4))]
    assert spearman(tied) == pytest.approx(0.9486832980505138)


def checkpoints(*values: tuple[float | None, float | None]) -> Ablation:
    """An ablation with nothing but these bits/dim and distances of the base run's checkpoints."""
    points = []
    for step, (bits, distance) in enumerate(values, 1):
        content = measured(distance, bits).content
        rest = {"step": step, "bits_standard_error": None if bits is None else 0.1, "bits_not_finite": 0}
        points.append(Measured(name=f"step_{step}", content={**content, **rest}))
    return Ablation(
        plan=make_plan(Scale(), image_size=28, channels=1, class_names=(), num_images=64),
        options=AblationOptions(),
        data_name="squares",
        num_scored=20,
        features="distance",
        rows={},
        points=tuple(points),
    )


def test_the_picture_has_the_checkpoints_that_have_both_figures() -> None:
    ablation = checkpoints((4, 40), (None, 35), (3, None), (None, None), (2, 20), (1, 10))
    picture = ElementTree.fromstring(loss_plot(ablation))  # noqa: S314 - our own
    titles = [title.text for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == ["step 1", "step 5", "step 6"]
    assert "Spearman's ρ 1.00 over 3 checkpoints" in markdown(ablation)
    assert "loss.svg" in markdown(ablation)
    assert not has_plot(checkpoints((4, 40), (None, 35), (2, 20)))
    assert "loss.svg" not in markdown(checkpoints((4, 40), (None, 35), (2, 20)))


@pytest.mark.parametrize(
    ("values", "same"),
    [
        ([(3, 7)] * 8, "bits/dim and distance"),
        ([(3, distance) for distance in range(8)], "bits/dim"),
        ([(bits, 7) for bits in range(8)], "distance"),
    ],
)
def test_what_is_the_same_at_all_checkpoints_has_no_correlation(values: list[tuple[float, float]], same: str) -> None:
    ablation = checkpoints(*values)
    assert spearman(ablation.points) is None
    assert loss_outcome(ablation.points) == "not measured"
    says = f"not measured: no Spearman's ρ, since all 8 checkpoints have the same {same} |"
    assert says in markdown(ablation)
    document = json.loads(json.dumps(to_json(ablation), allow_nan=False))
    assert document["loss"]["spearman"] is None
    # The picture needs no correlation.
    assert loss_plot(ablation).count("<circle") == 8 >= LEAST_POINTS
