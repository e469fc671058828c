"""What a query of Prometheus speaks of: as much of its language as ours use."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

WORDS = frozenset(
    [
        "abs",
        "and",
        "by",
        "changes",
        "count",
        "histogram_quantile",
        "increase",
        "max",
        "max_over_time",
        "min",
        "offset",
        "or",
        "rate",
        "sum",
        "unless",
        "vector",
    ]
)
"""Functions, operators and keywords that our queries use; any other name is a metric's."""
EVERYWHERE = frozenset({"instance", "job"})
"""Labels that Prometheus itself gives to all that it scrapes."""
GENERATED = {"up": EVERYWHERE}
_TEXT = re.compile(r'"[^"]*"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_RANGE = re.compile(r"\[[^\]]*\]|\boffset\s+\w+")
_SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\s*(?:\{([^}]*)\})?")
_LABEL = re.compile(r"[a-zA-Z_]\w*")

Exported = Mapping[str, frozenset[str]]
"""The labels of every metric by its name."""


@dataclass(frozen=True)
class Query:
    """Metrics with the labels that they are chosen by, and the labels that are grouped by."""

    selected: tuple[tuple[str, frozenset[str]], ...]
    grouped: frozenset[str]

    @classmethod
    def of(cls, expression: str) -> Query:
        """Read one."""
        bare = _RANGE.sub(" ", _TEXT.sub('""', expression))
        grouped = frozenset(label for labels in _GROUPING.findall(bare) for label in _LABEL.findall(labels))
        rest = _GROUPING.sub(" ", bare)
        found = [(name, frozenset(_LABEL.findall(labels))) for name, labels in _SELECTOR.findall(rest)]
        return cls(tuple((name, labels) for name, labels in found if name not in WORDS), grouped)

    def unknown(self, exported: Exported) -> Iterator[str]:
        """What of it does not exist."""
        known = {**GENERATED, **exported}
        labels: frozenset[str] = EVERYWHERE
        for name, chosen in self.selected:
            if name not in known:
                yield f"no metric {name}"
                continue
            labels |= known[name]
            yield from (f"{name} has no label {label}" for label in chosen - known[name] - EVERYWHERE)
        yield from (f"no label {label}" for label in self.grouped - labels)


def exported(*texts: str) -> dict[str, frozenset[str]]:
    """Every sample's name, with its labels, of what processes tell Prometheus."""
    found: dict[str, frozenset[str]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, frozenset()) | sample.labels.keys()
    return found
