"""Several processes as ``torchrun`` starts them: the same training as one, and an end for all when one fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import run_command
from training.checkpoint import FILE_NAME
from training.log import read_log

ROOT = Path(__file__).parents[2]
DEADLINE = 300.0

DRIVER = '''
"""The commands of training, in a process that dies, or is shown no data, where the test wants it."""
import atexit
import os
import signal
import sys
import time

from training.run import Run
from training.trainer import Trainer

step, save, replace = Trainer._train_step, Trainer.save, os.replace
rank, renamed = os.environ.get("RANK", "0"), 0


def dying_step(self):
    if self.step == int(os.environ.get("STOPS_AT", "-1")) and rank == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    if self.step == int(os.environ.get("DIES_AT", "-1")) and rank == os.environ.get("DIES", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)


def rare_save(self):
    if os.environ.get("SAVES_AT", str(self.step)) == str(self.step):
        save(self)


def dying_replace(source, target):
    global renamed
    renamed += os.path.basename(source) == "checkpoint.pt.part"
    if renamed == int(os.environ.get("DIES_RENAMING", "-1")):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)


write = Run.write_bundle


def slow_write(self, flow):
    time.sleep(2)
    write(self, flow)


if "STOPS_AT" in os.environ:
    Run.write_bundle = slow_write
    bundle = os.path.join(sys.argv[sys.argv.index("--out") + 1], "bundle")
    atexit.register(lambda: print(f"process {rank} left, bundle: {os.path.isdir(bundle)}", flush=True))
Trainer._train_step, Trainer.save, os.replace = dying_step, rare_save, dying_replace
if rank == os.environ.get("HAS_NO_DATA"):
    sys.argv[sys.argv.index("--data") + 1] = "no-such-directory"

from training.cli import app

app()
'''


HOSTS = '''
"""One process of three on two hosts: the second host has the last two. Tells whether it has decoded anything."""
import os
import sys
from pathlib import Path

import torch

from training import data
from training.processes import joined

host, os.environ["LOCAL_RANK"] = [("a", "0"), ("b", "0"), ("b", "1")][int(os.environ["RANK"])]
decoded, decode = [], data._decode


def telling(*arguments):
    decoded.append(True)
    return decode(*arguments)


data._decode = telling
with joined(torch.device("cpu")) as processes:
    for cache in (f"disk-of-{host}", "shared-disk"):
        with processes.together(), processes.first_before_others():
            images = data.load_images(Path(sys.argv[1]), "train", 8, 3, Path(cache))
        told = processes.gather((bool(decoded), len(images)))
        if processes.is_first:
            print(*told)
        decoded.clear()
'''


def start(
    directory: Path, preset: Path, data: Path, out: Path, *options: str, processes: int = 1, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Train in so many real processes, to the end of all of them."""
    driver = directory / "driver.py"
    driver.write_text(DRIVER)
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    )
    return subprocess.run(
        [
            *(sys.executable, *launcher, str(driver), "train", str(preset), "--data", str(data), "--out", str(out)),
            *("--device", "cpu", "--checkpoint-seconds", "0", *options),
        ],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def checkpoint(out: Path) -> dict[str, Any]:
    """What a run ended with."""
    content: dict[str, Any] = torch.load(out / FILE_NAME, weights_only=True)
    return content


def losses(out: Path) -> list[float]:
    """The logged losses."""
    return [line["loss"] for line in read_log(out)]


@pytest.fixture
def straight(tmp_path: Path, preset_file: Path, idx_data: Path) -> Path:
    """A run in one process that nothing interrupts: 30 steps."""
    out = tmp_path / "straight"
    finished = start(tmp_path, preset_file, idx_data, out, "--epochs", "6")
    assert finished.returncode == 0, finished.stderr
    return out


def test_two_processes_and_parts_of_a_batch_give_the_same_curve(
    straight: Path, tmp_path: Path, preset_file: Path, idx_data: Path
) -> None:
    out = tmp_path / "two"
    options = ("--epochs", "6", "--set", "accumulation=2", "--set", "recompute=true")
    finished = start(tmp_path, preset_file, idx_data, out, *options, processes=2)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("starting of 30") == 1
    assert "2 processes" in finished.stdout
    # The same sums in another order. Weights are not compared: where a gradient is zero but for rounding, as that of
    # the keys' bias, AdamW makes steps of it that change nothing else.
    assert losses(out) == pytest.approx(losses(straight), abs=1e-4)
    assert checkpoint(out)["step"] == checkpoint(straight)["step"] == 30
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in straight.iterdir())


def test_on_every_host_one_process_decodes_and_on_a_shared_disk_one_of_all(tmp_path: Path, folder_data: Path) -> None:
    driver = tmp_path / "hosts.py"
    driver.write_text(HOSTS)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3")
    finished = subprocess.run(
        [sys.executable, *launcher, str(driver), str(folder_data)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert finished.returncode == 0, finished.stderr
    # In the order of their ranks.
    assert finished.stdout.splitlines() == ["(True, 12) (True, 12) (False, 12)", "(True, 12) (False, 12) (False, 12)"]
    for disk in ("disk-of-a", "disk-of-b", "shared-disk"):
        assert len(list((tmp_path / disk).iterdir())) == 1


@pytest.mark.long
@pytest.mark.parametrize("shard", ["false", "true"])
def test_the_discriminative_term_is_that_of_the_whole_batch(
    shard: str, tmp_path: Path, preset_file: Path, idx_data: Path
) -> None:
    # Half of the labels are dropped: processes have different numbers of labelled images.
    values = ("discriminative_weight=50.0", "wrong_classes=1", "label_drop=0.5", "learning_rate=1.0e-3")
    options = [word for value in values for word in ("--set", value)]
    alone, two = tmp_path / "alone", tmp_path / "two"
    assert start(tmp_path, preset_file, idx_data, alone, *options).returncode == 0
    spread = ("--set", "accumulation=2", "--set", f"shard={shard}")
    finished = start(tmp_path, preset_file, idx_data, two, *options, *spread, processes=2)
    assert finished.returncode == 0, finished.stderr
    for name in ("loss", "bits_per_dim", "label_nats"):
        assert [line[name] for line in read_log(two)] == pytest.approx([line[name] for line in read_log(alone)], 1e-4)


@pytest.mark.long
def test_a_killed_run_ends_with_the_very_weights(
    straight: Path, tmp_path: Path, preset_file: Path, idx_data: Path
) -> None:
    out = tmp_path / "killed"
    killed = start(tmp_path, preset_file, idx_data, out, "--epochs", "6", DIES_AT="17")
    assert killed.returncode == -9
    resumed = start(tmp_path, preset_file, idx_data, out, "--epochs", "6")
    assert "continuing at step 17 of 30" in resumed.stdout
    ours, theirs = checkpoint(out), checkpoint(straight)
    for part in ("model", "average"):
        assert [name for name in theirs[part] if not torch.equal(ours[part][name], theirs[part][name])] == []
    for index, values in theirs["optimizer"]["state"].items():
        assert all(torch.equal(ours["optimizer"]["state"][index][name], value) for name, value in values.items())
    assert losses(out) == losses(straight)


@pytest.mark.parametrize(
    ("death", "logged", "continues_at"),
    [
        # Ten steps after the last checkpoint: they are done again, and the line of step 10 is cut off and written anew.
        ({"SAVES_AT": "7", "DIES_AT": "17"}, [10], 7),
        # The checkpoint of step 12 is written, and has not its name yet: the one before it counts.
        ({"DIES_RENAMING": "12"}, [10], 11),
    ],
)
def test_what_a_killed_run_did_since_its_checkpoint_is_done_again(
    death: dict[str, str], logged: list[int], continues_at: int, tmp_path: Path, preset_file: Path, idx_data: Path
) -> None:
    out, whole = tmp_path / "killed", tmp_path / "whole"
    options = ("--data", idx_data, "--device", "cpu", "--epochs", "6")
    killed = start(tmp_path, preset_file, idx_data, out, *map(str, options[4:]), **death)
    assert killed.returncode == -9
    assert [line["step"] for line in read_log(out)] == logged
    assert (out / f"{FILE_NAME}.part").exists() == ("DIES_RENAMING" in death)
    resumed = run_command("train", preset_file, "--out", out, *options)
    assert f"continuing at step {continues_at} of 30" in resumed
    run_command("train", preset_file, "--out", whole, *options)
    ours, theirs = checkpoint(out), checkpoint(whole)
    for part in ("model", "average"):
        assert [name for name in theirs[part] if not torch.equal(ours[part][name], theirs[part][name])] == []
    assert losses(out) == losses(whole)
    assert [line["step"] for line in read_log(out)] == [10, 20, 30]
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.long
def test_when_one_dies_all_end_and_any_number_continues(
    straight: Path, tmp_path: Path, preset_file: Path, idx_data: Path
) -> None:
    whole, same, other = (tmp_path / name for name in ("whole", "same", "other"))
    assert start(tmp_path, preset_file, idx_data, whole, "--epochs", "6", processes=2).returncode == 0
    killed = start(tmp_path, preset_file, idx_data, same, "--epochs", "6", processes=2, DIES_AT="17", DIES="1")
    assert killed.returncode != 0
    assert "process 0 of 2 lost another one" in killed.stderr
    shutil.copytree(same, other)
    for out, processes in ((same, 2), (other, 1)):
        resumed = start(tmp_path, preset_file, idx_data, out, "--epochs", "6", processes=processes)
        assert resumed.returncode == 0, resumed.stderr
        assert "continuing at step 17 of 30" in resumed.stdout
    assert losses(same) == pytest.approx(losses(whole), abs=1e-6)
    assert losses(other) == pytest.approx(losses(straight), abs=1e-4)


@pytest.mark.long
def test_what_one_is_refused_with_the_first_one_says(tmp_path: Path, preset_file: Path, idx_data: Path) -> None:
    refused = start(tmp_path, preset_file, idx_data, tmp_path / "run", processes=2, HAS_NO_DATA="1")
    assert refused.returncode != 0
    assert refused.stderr.count("process 1 of 2: no-such-directory: no such directory") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_shards_of_the_weights_give_the_same_curve_and_whole_checkpoints(
    straight: Path, tmp_path: Path, preset_file: Path, idx_data: Path
) -> None:
    out, again = tmp_path / "shards", tmp_path / "again"
    options = ("--epochs", "6", "--set", "shard=true", "--set", "accumulation=2")
    killed = start(tmp_path, preset_file, idx_data, out, *options, processes=2, DIES_AT="17", DIES="0")
    assert killed.returncode != 0
    shutil.copytree(out, again)
    # From the shards of two processes to more shards, and to none at all.
    for where, processes in ((out, 2), (again, 1)):
        resumed = start(tmp_path, preset_file, idx_data, where, *options, processes=processes)
        assert resumed.returncode == 0, resumed.stderr
        assert "continuing at step 17 of 30" in resumed.stdout
        assert losses(where) == pytest.approx(losses(straight), abs=1e-4)
        ours, theirs = checkpoint(where), checkpoint(straight)
        for part in ("model", "average"):
            assert {k: v.shape for k, v in ours[part].items()} == {k: v.shape for k, v in theirs[part].items()}
        assert sorted(path.name for path in where.iterdir()) == sorted(path.name for path in straight.iterdir())


def test_processes_that_are_stopped_leave_together(tmp_path: Path, preset_file: Path, idx_data: Path) -> None:
    """Any of them may be told to stop, and none goes while the first one still writes: torchrun would end it, too."""
    out = tmp_path / "run"
    stopped = start(tmp_path, preset_file, idx_data, out, "--epochs", "6", processes=2, STOPS_AT="7")
    assert stopped.returncode == 1, stopped.stderr
    assert "stopped after step 8, checkpoint written" in stopped.stdout
    for rank in range(2):
        assert f"process {rank} left, bundle: True" in stopped.stdout
    assert checkpoint(out)["step"] == 8


@pytest.mark.long
def test_muon_takes_the_same_steps_with_any_number_of_processes(
    tmp_path: Path, preset_file: Path, idx_data: Path
) -> None:
    alone, two, shards = (tmp_path / name for name in ("alone", "two", "shards"))
    muon = ("--epochs", "6", "--set", "optimizer=muon", "--set", "precision=float32")
    assert start(tmp_path, preset_file, idx_data, alone, *muon).returncode == 0
    for out, shard in ((two, "false"), (shards, "true")):
        options = (*muon, "--set", f"shard={shard}")
        killed = start(tmp_path, preset_file, idx_data, out, *options, processes=2, DIES_AT="17", DIES="0")
        assert killed.returncode != 0
        resumed = start(tmp_path, preset_file, idx_data, out, *options, processes=2)
        assert resumed.returncode == 0, resumed.stderr
        assert "continuing at step 17 of 30" in resumed.stdout
        # Its iterations are in bf16: a sum in another order is a step's last digits.
        assert losses(out) == pytest.approx(losses(alone), abs=2e-3)
        ours, theirs = (checkpoint(run)["optimizer"]["muon"]["state"] for run in (out, alone))
        assert ours.keys() == theirs.keys()
        for key, state in theirs.items():
            difference = ours[key]["momentum_buffer"] - state["momentum_buffer"]
            assert difference.norm() < 0.02 * state["momentum_buffer"].norm(), key
