"""Every example of docs/inference-protocol.md works as it is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from service.api.inference_protocol.functions import FUNCTIONS
from service.broker.memory import MemoryBroker
from tests.service.processes import PATIENCE, ServerProcess
from tests.service.test_app import connect, make

PAGE = (Path(__file__).parents[4] / "docs" / "inference-protocol.md").read_text()
WRITTEN = "127.0.0.1:8000"


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(server: ServerProcess, command: list[str], directory: Path) -> str:
    done = subprocess.run(
        [*command[:-1], command[-1].replace(WRITTEN, server.url.removeprefix("http://"))],
        capture_output=True,
        text=True,
        cwd=directory,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_python(server: ServerProcess, tmp_path: Path) -> None:
    [program] = examples("python")
    said = run(server, [sys.executable, "-c", program], tmp_path)
    assert "'name': 'fashion-mnist:sample'" in said
    assert len(re.findall(r"False|True", said)) == 4


def test_shell(server: ServerProcess, tmp_path: Path) -> None:
    asked, binary = examples("sh")
    said = run(server, ["sh", "-ec", asked], tmp_path)
    about, end = json.JSONDecoder().raw_decode(said)
    answer = json.loads(said[end:])
    assert about["name"] == answer["model_name"] == "fashion-mnist:sample"
    run(server, ["sh", "-ec", binary], tmp_path)
    answer = (tmp_path / "answer").read_bytes()
    assert answer.startswith(b'{"model_name":"fashion-mnist:sample"')
    assert (tmp_path / "pixels").read_bytes() == answer[-784:]
    assert len(set(answer[-784:])) > 10


@pytest.mark.anyio
async def test_the_table_of_functions(models: Path) -> None:
    """It has what the metadata say."""
    rows = dict(re.findall(r"^\| `NAME:?(\w*)` \| (.*) \|$", PAGE, re.MULTILINE))
    assert list(rows) == list(FUNCTIONS)
    app = make(models, MemoryBroker)
    async with connect(app) as client:
        for name, row in rows.items():
            about = (await client.get(f"/v2/models/tiny-cond{':' if name else ''}{name}")).json()
            inputs, outputs, parameters = (set(re.findall(r"`(\w+)`", cell)) for cell in row.split(" | "))
            assert inputs == {spec["name"] for spec in about["inputs"]}
            told = {spec["name"] for spec in about["outputs"]}
            assert outputs == ({"map"} if name == "anomaly_map" else told)
            if parameters:
                assert parameters == FUNCTIONS[name].parameters
