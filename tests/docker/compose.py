"""docker-compose.yml as Compose reads it: merged, and with variables filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docker-compose.yml"
_VARIABLE = re.compile(r"\$\{(\w+):-([^${}]*)\}")


def filled(value: Any, variables: Mapping[str, str]) -> Any:
    """A document with its variables, in the one form that ours uses: ``${NAME:-default}``."""
    if isinstance(value, dict):
        return {key: filled(entry, variables) for key, entry in value.items()}
    if isinstance(value, list):
        return [filled(entry, variables) for entry in value]
    if not isinstance(value, str):
        return value
    text = _VARIABLE.sub(lambda match: variables.get(match[1]) or match[2], value)
    assert "$" not in text, f"{value!r} has a variable in another form, or one without a default"
    return text


def raw() -> dict[str, Any]:
    """The file with anchors resolved, and nothing filled in."""
    return yaml.safe_load(PATH.read_text())


def deployment(**variables: str) -> dict[str, Any]:
    """What Compose makes of the file where these variables are set."""
    return filled(raw(), variables)


def seconds(text: str) -> float:
    """A duration such as ``50s``."""
    match = re.fullmatch(r"(\d+)s", text)
    assert match is not None, text
    return float(match[1])


def mounts(service: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Source and target of each of a service's mounts, in either spelling."""
    found = []
    for volume in service.get("volumes", ()):
        if isinstance(volume, str):
            source, target, *_ = volume.split(":")
        else:
            source, target = volume["source"], volume["target"]
        found.append((source, target))
    return found
