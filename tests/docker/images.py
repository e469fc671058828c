"""Builds and runs the images for real: with Docker where its engine runs, else with buildah, which needs none.

buildah works in a store of its own, which is removed in the end; its base is a small Debian, made for it.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.docker import dockerfile
from tests.docker.compose import ROOT
from tests.service.processes import Process, wait_until

USER = 10001
DEBIAN = "bookworm"
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
"""What the base needs, as python:3-slim has it."""


def run(*command: str | Path) -> str:
    """What a command prints; its errors go with the test's."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-5000:]}"
    return done.stdout.strip()


def offspring(pid: int) -> Iterator[int]:
    """A process and those that it has started, they and theirs, nearest first."""
    found = [pid]
    for parent in found:
        yield parent
        with suppress(FileNotFoundError):
            # Any thread may have started one.
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                found += map(int, children.read_text().split())


class Container(Process):
    """A container that runs in the foreground of a command."""

    def __init__(self, builder: Builder, name: str, log: Path, command: Sequence[str]) -> None:
        super().__init__(log, list(command), os.environ)
        self._builder, self.name = builder, name

    def healthy(self) -> bool:
        """What the image's own healthcheck says, asked inside."""
        return self._builder.exec(self.name, self._builder.healthcheck(self.name)).returncode == 0

    def service(self) -> int:
        """Process id, here, of what an engine would call the container's first process."""
        wait_until(lambda: self.process.poll() is not None or self._builder.pid(self) is not None, "it runs")
        pid = self._builder.pid(self)
        assert pid is not None, self.log
        return pid

    def user(self) -> int:
        """Whose that process is."""
        return Path(f"/proc/{self.service()}").stat().st_uid

    def stop(self, sent: signal.Signals = signal.SIGTERM) -> int:
        """As an engine stops it; returns the exit status."""
        if self.process.poll() is None:
            os.kill(self.service(), sent)
        return self.wait()

    def kill(self) -> None:
        """Make sure that nothing is left, within and here."""
        pid = None if self.process.poll() is not None else self._builder.pid(self)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        super().kill()


class Builder(ABC):
    """Builds the targets of the Dockerfile, and runs them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._targets: dict[str, str] = {}

    @abstractmethod
    def build(self, target: str) -> None:
        """Build an image, named after its target."""

    @abstractmethod
    def config(self, target: str) -> dict[str, Any]:
        """Configuration of an image, as Docker has it."""

    @abstractmethod
    def added_bytes(self, target: str) -> int:
        """Size of an image beyond its base."""

    @abstractmethod
    def start(self, target: str, environment: Mapping[str, str]) -> Container:
        """Run what an image runs, in the network of this host."""

    @abstractmethod
    def exec(self, name: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command in a container that runs."""

    @abstractmethod
    def pid(self, container: Container) -> int | None:
        """Process id of a container's first process, if it runs."""

    @abstractmethod
    def output(self, target: str, command: Sequence[str]) -> str:
        """What a command prints in an image, instead of what the image runs."""

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind."""

    def healthcheck(self, name: str) -> list[str]:
        """The command of a container's healthcheck."""
        kind, *command = self.config(self._targets[name])["Healthcheck"]["Test"]
        assert kind == "CMD"
        return command

    def name(self, target: str) -> str:
        """A new name for a container of a target."""
        name = f"tarflow-test-{os.getpid()}-{target}-{len(self._targets)}"
        self._targets[name] = target
        return name


class Docker(Builder):
    """With Docker's engine, as users do."""

    @staticmethod
    def runs() -> bool:
        """Whether there is an engine."""
        return (
            shutil.which("docker") is not None
            and not subprocess.run(["docker", "info"], capture_output=True).returncode
        )

    def _tag(self, target: str) -> str:
        return f"tarflow-test-{os.getpid()}:{target}"

    def build(self, target: str) -> None:
        run("docker", "build", "--target", target, "-f", dockerfile.PATH, "-t", self._tag(target), ROOT)

    def _inspect(self, image: str) -> dict[str, Any]:
        [found] = json.loads(run("docker", "image", "inspect", image))
        return found

    def config(self, target: str) -> dict[str, Any]:
        return self._inspect(self._tag(target))["Config"]

    def added_bytes(self, target: str) -> int:
        base = dockerfile.instructions()[0][1].partition("=")[2]
        run("docker", "pull", "--quiet", base)
        return self._inspect(self._tag(target))["Size"] - self._inspect(base)["Size"]

    def start(self, target: str, environment: Mapping[str, str]) -> Container:
        name = self.name(target)
        given = [word for pair in environment.items() for word in ("--env", "=".join(pair))]
        command = ["docker", "run", "--rm", "--network", "host", "--name", name, *given, self._tag(target)]
        container = Container(self, name, self.directory / f"{name}.log", command)
        inspect = ["docker", "container", "inspect", name]
        wait_until(lambda: subprocess.run(inspect, capture_output=True).returncode == 0, f"{name} runs")
        return container

    def exec(self, name: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["docker", "exec", name, *command], capture_output=True, text=True, check=False)

    def pid(self, container: Container) -> int | None:
        return int(run("docker", "container", "inspect", "--format", "{{.State.Pid}}", container.name)) or None

    def output(self, target: str, command: Sequence[str]) -> str:
        return run("docker", "run", "--rm", "--entrypoint", command[0], self._tag(target), *command[1:])

    def close(self) -> None:
        for name in self._targets:
            subprocess.run(["docker", "rm", "--force", name], capture_output=True, check=False)
        for target in dockerfile.TARGETS:
            subprocess.run(["docker", "rmi", self._tag(target)], capture_output=True, check=False)


class Buildah(Builder):
    """Without an engine: as root, isolated by chroot, in the network of this host."""

    BASE = "localhost/base"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._store = Path(tempfile.mkdtemp(prefix="tarflow-images-"))
        self._command = ["buildah", "--root", f"{self._store}/root", "--runroot", f"{self._store}/run"]
        self._given: dict[str, list[str]] = {}
        try:
            self._make_base()
        except BaseException:
            self.close()
            raise

    def _buildah(self, *arguments: str | Path) -> str:
        return run(*self._command, *arguments)

    def _make_base(self) -> None:
        """A Debian with Python, from where this machine gets its packages."""
        uris = run("apt-get", "indextargets", "--format", "$(REPO_URI)").splitlines()
        root = self._store / "debian"
        run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", DEBIAN, root, self._mirror(uris))
        container = self._buildah("from", "scratch")
        self._buildah("add", "--quiet", container, root, "/")
        self._buildah("commit", "--quiet", container, self.BASE)
        self._buildah("rm", container)
        shutil.rmtree(root)

    @staticmethod
    def _mirror(uris: Sequence[str]) -> str:
        return next((uri for uri in sorted(set(uris)) if "security" not in uri), "")

    def _mounts(self) -> list[str]:
        """What lets pip reach its packages from inside as it does outside."""
        listed = run(shutil.which("python3") or "python3", "-m", "pip", "config", "list")
        settings: dict[str, str] = {}
        for line in listed.splitlines():
            # Those of the environment come last, and win.
            name, _, value = line.partition("=")
            settings[re.sub(r"^(:env:|\w+)\.", "", name)] = ast.literal_eval(value)
        settings.pop("constraint", None)
        file = self._store / "pip.conf"
        lines = [f"{name} = {' '.join(value.split())}" for name, value in settings.items()]
        file.write_text("\n".join(["[global]", *lines]) + "\n")
        words = [word for value in settings.values() for word in value.split()]
        # An index of files refers to what lies beside it.
        places = [Path(word.removeprefix("file://")).parent for word in words if word.startswith("file:///")]
        places = [place for place in [*places, *map(Path, words)] if place.is_dir()]
        pairs = [(file, "/etc/pip.conf"), (Path("/etc/ssl/certs"), "/etc/ssl/certs"), *((p, str(p)) for p in places)]
        return [f"--volume={source}:{target}:ro" for source, target in pairs]

    def build(self, target: str) -> None:
        self._buildah(
            *("bud", "--isolation", "chroot", "--network", "host", "--format", "docker", "--layers"),
            *(*self._mounts(), "--build-arg", f"BASE_IMAGE={self.BASE}", "--target", target),
            *("-f", dockerfile.PATH, "-t", f"localhost/{target}", ROOT),
        )

    def config(self, target: str) -> dict[str, Any]:
        return json.loads(self._buildah("inspect", "--type", "image", f"localhost/{target}"))["Docker"]["config"]

    def _container(self, image: str) -> str:
        return self._buildah("from", "--pull=never", image)

    def _bytes(self, image: str) -> int:
        """Of all files, each once however many names it has."""
        root = Path(self._buildah("mount", self._container(image)))
        seen: dict[tuple[int, int], int] = {}
        for path, _, files in os.walk(root):
            for file in files:
                status = os.lstat(os.path.join(path, file))
                seen[status.st_dev, status.st_ino] = status.st_size
        return sum(seen.values())

    def added_bytes(self, target: str) -> int:
        return self._bytes(f"localhost/{target}") - self._bytes(self.BASE)

    def start(self, target: str, environment: Mapping[str, str]) -> Container:
        name, config = self._container(f"localhost/{target}"), self.config(target)
        self._targets[name] = target
        given = [f"--env={name}={value}" for name, value in environment.items()]
        command = [*self._command, "run", "--isolation", "chroot", *given, name, "--"]
        log = self.directory / f"{name}.log"
        container = Container(self, name, log, [*command, *config["Entrypoint"], *config["Cmd"]])
        # Its variables are those of a healthcheck, too.
        self._given[name] = given
        return container

    def exec(self, name: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        words = [*self._command, "run", "--isolation", "chroot", *self._given[name], name, "--", *command]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    def pid(self, container: Container) -> int | None:
        for pid in offspring(container.process.pid):
            with suppress(FileNotFoundError):
                # buildah starts itself several times on the way.
                if Path(f"/proc/{pid}/exe").readlink().name.startswith("python"):
                    return pid
        return None

    def output(self, target: str, command: Sequence[str]) -> str:
        return self._buildah("run", "--isolation", "chroot", self._container(f"localhost/{target}"), "--", *command)

    def close(self) -> None:
        subprocess.run([*self._command, "rm", "--all"], capture_output=True, check=False)
        # Those of containers that were being built, and the store's own.
        mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for place in sorted((place for place in mounted if place.startswith(f"{self._store}/")), reverse=True):
            run("umount", place)
        shutil.rmtree(self._store)


@contextmanager
def builder(directory: Path) -> Iterator[Builder]:
    """What this machine builds with."""
    made = Docker(directory) if Docker.runs() else Buildah(directory)
    try:
        yield made
    finally:
        made.close()
