"""docker/Dockerfile as instructions, by stage."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from typing import Any

from tests.docker.compose import ROOT

PATH = ROOT / "docker" / "Dockerfile"
TARGETS = ("api", "worker", "serve")
"""What is built for users; each runs the form of its name."""


@dataclass(frozen=True)
class Stage:
    """What is between a FROM and the next."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def values(self, instruction: str) -> list[str]:
        """The texts behind an instruction, in their order."""
        return [text for word, text in self.instructions if word == instruction]


def instructions() -> list[tuple[str, str]]:
    """Every instruction with its text; continued lines are joined and comments gone."""
    lines = [line for line in PATH.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(line.split(maxsplit=1)[0].upper(), line.split(maxsplit=1)[1]) for line in joined]


def stages() -> dict[str, Stage]:
    """The stages by name, in their order."""
    found: dict[str, Stage] = {}
    for word, text in instructions():
        if word == "FROM":
            base, as_, name = text.split()
            assert as_ == "AS"
            found[name] = Stage(name, base)
        elif found:
            found[name].instructions.append((word, text))
    return found


def lineage(target: str) -> list[Stage]:
    """A stage with those that it is made from, the base first."""
    known, chain = stages(), [stages()[target]]
    while chain[0].base in known:
        chain.insert(0, known[chain[0].base])
    return chain


def last(target: str, instruction: str) -> str:
    """The text of the last such instruction of an image."""
    return [text for stage in lineage(target) for text in stage.values(instruction)][-1]


def words(target: str, instruction: str) -> list[Any]:
    """The same of one in JSON's form, behind what may stand in front of it."""
    return json.loads(re.sub(r"^[^\[]*", "", last(target, instruction)))


def variables(target: str) -> dict[str, str]:
    """The environment that an image sets."""
    pairs = (pair for stage in lineage(target) for text in stage.values("ENV") for pair in shlex.split(text))
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
