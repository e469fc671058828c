"""Emoji from the npm packages: synthetic ones of the same layout here, the real ones in the long checks."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.training.conftest import run_command
from training.data import DataError, load_images
from training.emoji import fetched, prepare_emoji, read_package

CATEGORIES = ("Symbols", "Food & Drink", "Flags")


def png(colour: tuple[int, int, int, int], size: int = 64) -> bytes:
    """A square with a transparent half."""
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    image.paste(colour, (0, 0, size // 2, size))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def write_package(path: Path, style: str, count: int = 90, size: int = 64) -> Path:
    """A package as npm packs it: emoji of three categories, every third with a skin tone, and a component."""
    listed: list[dict[str, Any]] = []
    files: dict[str, bytes] = {"package.json": json.dumps({"name": f"emoji-datasource-{style}"}).encode()}
    for i in range(count):
        code = f"1F{i:03X}"
        emoji: dict[str, Any] = {"unified": code, "image": f"{code.lower()}.png", "category": CATEGORIES[i % 3]}
        emoji[f"has_img_{style}"] = True
        variants = [emoji]
        if i % 3 == 0:
            tone = {"unified": f"{code}-1F3FB", "image": f"{code.lower()}-1f3fb.png", f"has_img_{style}": True}
            variants.append(tone)
            emoji["skin_variations"] = {"1F3FB": tone}
        listed.append(emoji)
        for variant in variants:
            files[f"img/{style}/64/{variant['image']}"] = png((i, 100, 200, 255), size)
    listed.append({"unified": "1F3FB", "image": "1f3fb.png", "category": "Component", f"has_img_{style}": True})
    listed.append({"unified": "1FFFF", "image": "1ffff.png", "category": "Flags", f"has_img_{style}": False})
    files["emoji.json"] = json.dumps(listed).encode()
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def packages(tmp_path: Path) -> list[Path]:
    """Both styles."""
    return [write_package(tmp_path / f"{style}.tgz", style) for style in ("google", "twitter")]


def test_the_command_makes_folders_that_training_reads(packages: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "emoji"
    text = run_command("data", "emoji", out, "--package", packages[0], "--package", packages[1])
    train, test = (load_images(out, split, 64, 3) for split in ("train", "test"))
    assert f"{len(train)} images" in text
    assert len(train) + len(test) == 2 * (90 + 30)
    assert len(test) > 0
    assert set(train.class_names) == set(CATEGORIES)
    # On white, and otherwise unchanged.
    assert (train.pixels[:, :, :, 32:] == 255).all()
    assert (train.pixels[:, 1, :, :32] == 100).all()
    assert sorted(path.name for path in out.iterdir()) == ["LICENCES.txt", "test", "train"]
    assert "CC BY 4.0" in (out / "LICENCES.txt").read_text()


def test_an_emoji_is_on_one_side_in_both_styles_and_all_tones(packages: list[Path], tmp_path: Path) -> None:
    prepare_emoji(packages, tmp_path / "emoji")
    sides: dict[str, Counter[str]] = {}
    for path in (tmp_path / "emoji").rglob("*.png"):
        code_point = path.name.split("-")[0]
        sides.setdefault(code_point, Counter())[path.parts[-3]] += 1
    assert len(sides) == 90
    for code_point, side in sides.items():
        assert len(side) == 1
        assert side.total() == (4 if int(code_point[2:], 16) % 3 == 0 else 2)


def test_what_is_no_package_is_refused_and_leaves_nothing(packages: list[Path], tmp_path: Path) -> None:
    text = tmp_path / "text.tgz"
    text.write_text("no archive")
    other = tmp_path / "other.tgz"
    with tarfile.open(other, "w:gz") as archive:
        archive.add(text, "package/readme")
    missing = tmp_path / "missing.tgz"
    wrong = write_package(tmp_path / "wrong.tgz", "google", size=32)
    for package in (text, other, missing):
        with pytest.raises(DataError, match=package.name):
            read_package(package)
    with pytest.raises(DataError, match="32x32, allowed is 64x64"):
        prepare_emoji([wrong], tmp_path / "emoji")
    assert not [path for path in tmp_path.iterdir() if "emoji" in path.name]
    prepare_emoji(packages, tmp_path / "emoji")
    with pytest.raises(DataError, match="is there already"):
        prepare_emoji(packages, tmp_path / "emoji")


@pytest.fixture
def registry(packages: list[Path], tmp_path: Path) -> Iterator[str]:
    """A real server with both packages where npm's registry has them."""
    root = tmp_path / "registry"
    for package in packages:
        name = f"emoji-datasource-{package.stem}"
        path = root / name / "-" / f"{name}-16.0.0.tgz"
        path.parent.mkdir(parents=True)
        shutil.copy(package, path)

    class Quiet(SimpleHTTPRequestHandler):
        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Say nothing."""

        def log_error(self, *arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=root)) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def integrity(package: Path) -> str:
    """A file's hash as npm writes it."""
    return "sha512-" + base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()


def test_packages_are_fetched_and_removed(packages: list[Path], registry: str, tmp_path: Path) -> None:
    with fetched(registry, {path.stem: integrity(path) for path in packages}) as paths:
        assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in packages]
        counts = prepare_emoji(paths, tmp_path / "emoji")
    assert sum(counts.values()) == 240
    assert not any(path.exists() for path in paths)


def test_what_cannot_be_fetched_is_named_and_leaves_nothing(
    packages: list[Path], registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "emoji"
    # The server's file is another than the one whose hash is known.
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", registry)
    error = run_command("data", "emoji", out, status=2)
    assert f"emoji-datasource-google-16.0.0.tgz: got a file with {integrity(packages[0])}, allowed is sha512-" in error
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"{registry}/nothing")
    # What is there is refused before anything is fetched.
    assert "is there already" in run_command("data", "emoji", tmp_path, status=2)
    assert "404" in run_command("data", "emoji", out, status=2)
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "file:///etc")
    assert "NPM_CONFIG_REGISTRY: got 'file:///etc/" in run_command("data", "emoji", out, status=2)
    assert not out.exists()


@pytest.mark.long
def test_the_real_packages(tmp_path: Path) -> None:
    run_command("data", "emoji", tmp_path / "emoji")
    train, test = (load_images(tmp_path / "emoji", split, 64, 3) for split in ("train", "test"))
    assert len(train.class_names) == 9
    assert len(train) > 6000
    assert 0.04 < len(test) / (len(train) + len(test)) < 0.14
    assert np.unique(train.labels).size == 9
