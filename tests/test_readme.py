"""The README stays true: its commands are executed, in its order, as a newcomer would.

`make test` is what runs this, and needs no second run; `docker compose` needs an engine, so tests/docker/ checks what
it would read, and runs the images.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from model.images import load_image

ROOT = Path(__file__).parents[1]
LONG_RUNNING = re.compile(r"^(make serve|\S*tarflow serve\b)")
READY_SECONDS = 120


def commands() -> list[str]:
    """Every command of the README's sh blocks, with continued lines joined and comments cut off."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s{2,}#.*", "", line).strip() for line in lines if line.strip()]


@contextmanager
def running(command: str, directory: Path, log: Path) -> Iterator[httpx.Client]:
    """A server that a README command starts, ready, and stopped afterwards with Ctrl-C."""
    port = int(match[1]) if (match := re.search(r"--port (\d+)", command)) else 8000
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, f"port {port}, which the README uses, is taken"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            shell=True,
            cwd=directory,
            stdout=output,
            stderr=output,
            start_new_session=True,
            # What these servers keep is not the tester's.
            env={**os.environ, "TARFLOW_STATE": str(log.with_suffix(".state"))},
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
                deadline = time.monotonic() + READY_SECONDS
                while True:
                    try:
                        if client.get("/readyz").status_code == 200:
                            break
                    except httpx.TransportError:
                        pass
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.2)
                yield client
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=60)


@contextmanager
def background(command: str, directory: Path, log: Path) -> Iterator[None]:
    """What a README command leaves running; it must still run when the last command has ended."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            f"exec {command.removesuffix('&')}",
            shell=True,
            cwd=directory,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            yield
            assert process.poll() is None, log.read_text()
        finally:
            process.terminate()
            process.wait(timeout=60)


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like the clone, so that what the commands write stays out of the real one."""
    directory = tmp_path_factory.mktemp("clone")
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", "models"):
            (directory / entry.name).symlink_to(entry)
    return directory


def test_the_commands_do_what_the_readme_says(newcomer: Path, tmp_path: Path) -> None:
    everything = commands()
    assert everything[:2] == ["make serve", "make test"]
    to_run = [c for c in everything if c != "make test" and not c.startswith("docker ")]
    assert len(to_run) >= 12
    # In the real clone: it must not install anything into a directory that will be gone.
    with running("make serve", ROOT, tmp_path / "make-serve.log"), ExitStack() as until_the_end:
        for number, command in enumerate(to_run[1:]):
            if command.endswith("&"):
                until_the_end.enter_context(background(command, newcomer, tmp_path / f"background-{number}.log"))
                continue
            if LONG_RUNNING.match(command):
                with running(command, newcomer, tmp_path / f"serve-{number}.log") as client:
                    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["tiny"]
                continue
            # -f makes curl fail on an HTTP error.
            done = subprocess.run(
                command.replace("curl -s ", "curl -sSf "), shell=True, cwd=newcomer, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    for name in ("boot.png", "blocks.png", "again.png", "clean.png", "bags.png"):
        assert load_image((newcomer / name).read_bytes()).image.mode == "L"
    assert (newcomer / "runs/clothes/bundle/manifest.json").is_file()


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text()):
        assert target.startswith("https://") or (ROOT / target).is_file(), target


def test_numbers_are_filled_in() -> None:
    assert "@@" not in (ROOT / "README.md").read_text()
