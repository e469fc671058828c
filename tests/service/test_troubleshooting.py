"""docs/troubleshooting.md quotes only what the service really says, with the status that it really has."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from service import errors
from service.api.envelope import STATUS
from service.errors import ServiceError
from service.settings import ApiSettings, ServeSettings, WorkerSettings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
HOLE = "\0"
"""What stands in a text of the source for what is filled in."""
OTHERS = {'could not select device driver "nvidia"'}
"""Words of other programs."""


@cache
def sources() -> list[ast.Module]:
    """Every module that may say something to people."""
    paths = [path for room in ("service", "model") for path in sorted((ROOT / room).rglob("*.py"))]
    return [ast.parse(path.read_text()) for path in paths]


@cache
def texts() -> frozenset[str]:
    """Every text of the source, with holes where something is filled in."""
    found = set()
    for node in (node for module in sources() for node in ast.walk(module)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(re.sub(r"%[-.\w]*[sdgf]", HOLE, node.value))
        elif isinstance(node, ast.JoinedStr):
            parts = (str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
            found.add("".join(parts))
    return frozenset(found)


@cache
def statuses() -> dict[str, set[int]]:
    """By code, the HTTP statuses of the errors that are made with it."""
    kinds = {kind.__name__: kind for kind in STATUS}
    found: dict[str, set[int]] = defaultdict(set)
    for kind, status in STATUS.items():
        found[kind.default_code].add(status)
    for node in (node for module in sources() for node in ast.walk(module)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        for keyword in node.keywords:
            if keyword.arg == "code" and isinstance(keyword.value, ast.Constant) and name in kinds:
                found[str(keyword.value.value)].add(STATUS[kinds[name]])
    return found


CODES = re.findall(r"^\| `([a-z_]+)`, (\d{3}) \|", PAGE, re.MULTILINE)
QUOTED = [
    text
    for line in PAGE.splitlines()
    for text in re.findall(r"`([^`]+)`", line)
    if (line.startswith("| `") and text == line[3:].partition("`")[0] and " " in text) or ("…" in text and " " in text)
]


def test_there_is_something_to_check() -> None:
    assert len(CODES) > 40
    assert len(QUOTED) > 15
    assert issubclass(errors.Unavailable, ServiceError)


@pytest.mark.parametrize(("code", "status"), CODES)
def test_codes_are_the_service_s(code: str, status: str) -> None:
    assert code in texts()
    if code in statuses():
        assert int(status) in statuses()[code]


@pytest.mark.parametrize("quoted", sorted(set(QUOTED) - OTHERS))
def test_words_are_the_service_s(quoted: str) -> None:
    pattern = re.compile(".*?".join(re.escape(part.strip()) for part in quoted.split("…")), re.DOTALL)
    assert any(pattern.search(text) for text in texts()), quoted


def test_settings_exist() -> None:
    commands = {"gpus", "rm", "entrypoint", "keys", "data", "samples"}
    known = {
        name.replace("_", "-") for form in (ServeSettings, ApiSettings, WorkerSettings) for name in form.model_fields
    }
    assert set(re.findall(r"(?<![-\w])--([a-z][a-z-]*)", PAGE)) - commands <= known
