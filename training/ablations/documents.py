"""The JSON documents in an ablation's directory: written whole or not at all, and named when they are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_document(path: Path, advice: str, field: str = "") -> dict[str, Any]:
    """What is in a document; raises ``ValueError`` with the file and ``advice`` where it is not one with ``field``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"got {type(content).__name__}, allowed is an object")
        if field and field not in content:
            raise ValueError(f"it has no {field!r}")
    except ValueError as error:
        raise ValueError(f"{path}: damaged, or not of this program: {error}; {advice}") from error
    return content


def write_document(path: Path, content: dict[str, Any]) -> None:
    """Write a document so that a crash leaves either the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)
