"""The settings that a sweep compares: guidance weights, schedules, rules and attention temperatures, combined."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from model.config import SamplingDefaults

Mode = Literal["conditional", "unconditional"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Values that are combined; no guidance is always measured beside them."""

    scales: tuple[float, ...]
    """Guidance weights w."""
    schedules: tuple[str, ...]
    """Schedules of the weight over the patches."""
    rules: tuple[str, ...]
    """Guidance rules."""
    temperatures: tuple[float, ...]
    """Attention temperatures τ of the unguided pass."""


DEFAULT_GRIDS: Mapping[Mode, Grid] = {
    "conditional": Grid(
        scales=(0.5, 1.0, 2.0),
        schedules=("constant", "linear"),
        rules=("linear", "closed_form"),
        temperatures=(1.0, 2.0),
    ),
    "unconditional": Grid(
        scales=(0.5, 1.0, 2.0),
        schedules=("constant", "linear"),
        rules=("linear", "closed_form"),
        temperatures=(2.0, 3.0),
    ),
}
"""τ > 1 flattens the attention of the pass that samples are led away from: a vaguer model, as one without class is.
With τ < 1 the samples of an earlier bundled model got no better (measured for τ 0.3 to 0.9, w 0.1 to 2)."""


def make_grids(
    modes: Sequence[Mode],
    *,
    scales: str | None = None,
    schedules: str | None = None,
    rules: str | None = None,
    temperatures: str | None = None,
) -> dict[Mode, Grid]:
    """The default grids of these modes, with the axes that are given as text (``0.5,1,2``) replaced.

    Raises ``ValueError`` for text that is no list.
    """
    given: dict[str, tuple[float, ...] | tuple[str, ...]] = {}
    for name, text in (("scales", scales), ("temperatures", temperatures)):
        if text is not None:
            try:
                given[name] = tuple(float(word) for word in text.split(","))
            except ValueError as error:
                raise ValueError(f"{name}: got {text!r}, allowed is numbers with commas between them") from error
    for name, text in (("schedules", schedules), ("rules", rules)):
        if text is not None:
            given[name] = tuple(word.strip() for word in text.split(","))
    return {mode: replace(DEFAULT_GRIDS[mode], **given) for mode in modes}  # type: ignore[arg-type]


def mode_settings(base: SamplingDefaults, grid: Grid, mode: Mode) -> list[SamplingDefaults]:
    """The settings of a grid, no guidance first and none twice; what the grid does not name is as in ``base``.

    ``base`` itself is among them. Without a class, guidance compares with tempered attention: τ = 1 would be no
    guidance. Raises ``ValueError`` for a value that is not allowed.
    """
    found = [replace(base, guidance_scale=0.0, attention_temperature=1.0)]
    axes = itertools.product(grid.rules, grid.schedules, grid.temperatures, grid.scales)
    # replace() checks the values, which may be any strings and numbers until then.
    candidates = [
        replace(
            base,
            guidance_rule=rule,  # type: ignore[arg-type]
            guidance_schedule=schedule,  # type: ignore[arg-type]
            guidance_scale=scale,
            attention_temperature=temperature,
            guidance_target=base.guidance_target if rule == "linear" else "both",
        )
        for rule, schedule, temperature, scale in axes
    ]
    for setting in [base, *candidates]:
        guides = setting.guidance_scale != 0 and (mode == "conditional" or setting.attention_temperature != 1)
        if guides and setting not in found:
            found.append(setting)
    return found
