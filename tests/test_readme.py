"""The README and the guides that go on from it stay true: their commands are executed, in order, as a newcomer would.

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


def commands(page: str) -> list[str]:
    """Every command of a page's sh blocks, with continued lines joined and comments cut off."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
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


def anchors(page: Path) -> set[str]:
    """What links can lead to within a page: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def clone(directory: Path) -> Path:
    """A directory that looks like the clone, so that what the commands write stays out of the real one."""
    directory.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", "models"):
            (directory / entry.name).symlink_to(entry)
    return directory


def execute(page: str, to_run: list[str], directory: Path, logs: Path) -> None:
    """Run a page's commands in a clone, in their order; each must succeed."""
    with ExitStack() as until_the_end:
        for number, command in enumerate(to_run):
            log = logs / f"{Path(page).stem}-{number}.log"
            if command.endswith("&"):
                until_the_end.enter_context(background(command, directory, log))
            elif LONG_RUNNING.match(command):
                with running(command, directory, log) as client:
                    assert client.get("/v1/models").json()["data"]
            else:
                # -f makes curl fail on an HTTP error.
                strict = command.replace("curl -s ", "curl -sSf ")
                done = subprocess.run(strict, shell=True, cwd=directory, capture_output=True, text=True)
                assert done.returncode == 0, f"{page}: {command}\n{done.stdout}\n{done.stderr}"


def test_the_commands_do_what_the_pages_say(tmp_path: Path) -> None:
    first, second, *readme = [c for c in commands("README.md") if not c.startswith("docker ")]
    assert (first, second) == ("make serve", "make test")
    assert len(readme) >= 12
    # What one page has done is there for the next, and is not done again.
    directory, api = clone(tmp_path / "clone"), [c for c in commands("docs/api.md") if c not in readme]
    # In the real clone: it must not install anything into a directory that will be gone.
    with running("make serve", ROOT, tmp_path / "make-serve.log"):
        execute("README.md", readme, directory, tmp_path)
        execute("docs/api.md", api, directory, tmp_path)
    for name in ("boot.png", "bags.png", "blocks.png", "again.png", "clean.png"):
        assert load_image((directory / name).read_bytes()).image.mode == "L"
    assert load_image((directory / "where.png").read_bytes()).image.mode == "RGB"
    assert (directory / "runs/clothes/bundle/manifest.json").is_file()


@pytest.mark.long
def test_the_guide_to_training_does_what_it_says(tmp_path: Path) -> None:
    directory = clone(tmp_path / "clone")
    execute("docs/training.md", commands("docs/training.md"), directory, tmp_path)
    assert load_image((directory / "runs/odd/bags.png").read_bytes()).image.mode == "L"
    assert (directory / "runs/clothes/bundle/manifest.json").is_file()


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_and_pictures_exist(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", (ROOT / page).read_text()):
        if target.startswith("https://"):
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.is_file(), target
        if anchor:
            assert anchor in anchors(path), (target, anchor)


def test_numbers_are_filled_in() -> None:
    assert "@@" not in (ROOT / "README.md").read_text()
