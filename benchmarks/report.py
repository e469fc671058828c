"""What every benchmark says besides its figures: on what machine they were taken, as table or JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

WIDTH = 140
"""Columns of a table that goes to a file."""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """The hardware and software that figures hold for."""
    return {
        "device": str(device),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def print_report(title: str, document: dict[str, Any], columns: Sequence[str], rows: list[list[str]]) -> None:
    """A table for people, under the environment that the document names."""
    console = Console()
    if not console.is_terminal:
        # In a file nothing is cut off.
        console = Console(width=WIDTH)
    where = document["environment"]
    console.print(f"{where['hardware']} ({where['device']}), {where['threads']} threads, torch {where['torch']}")
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_json(document: dict[str, Any]) -> None:
    """The one JSON document of a run with --json."""
    print(json.dumps(document, indent=2))
