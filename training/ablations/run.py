"""Train and measure what a plan says, row by row; what is finished is not done again.

In the directory of an ablation every training has a run directory, with a checkpoint from which it continues, and in
its ``rows/`` a JSON document for every row that is measured on it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from model.config import NoiseProtocol, SamplingDefaults, check
from model.flow import Flow
from training.ablations.documents import read_document, write_document
from training.ablations.measure import Ruler, draw_samples, figure_from_json, figure_json, make_ruler, sample_labels
from training.ablations.plan import BASE, Plan, Row, Scale, Training, check_trainings, make_plan
from training.baselines.channel_coupling import ChannelCouplingFlow
from training.checkpoint import data_fingerprint
from training.classes import class_names
from training.data import Images, epoch_order
from training.evaluate import estimate, finite, score_images
from training.features import load_extractor
from training.frechet import COMPONENTS, GROUPS, Figure
from training.log import RunLog
from training.run import stop_on_signals
from training.tensors import read_tensors, write_tensors
from training.trainer import StepReport, Trainer, TrainingDiverged

ROWS, SNAPSHOT_ROWS, SNAPSHOTS = "rows", "snapshots/rows", "snapshots"
TRAINED, DIVERGED = "training.json", "diverged.json"
LOSS = "loss"
"""Name under which ``--rows`` knows the snapshots of the base run."""
SECONDS_PER_LINE = 60.0
MEASURE_AGAIN = "delete it, and the same command measures it again"


class Stopped(Exception):
    """The ablation was asked to end; the same command continues it."""


@dataclass(frozen=True, kw_only=True)
class AblationOptions:
    """What is measured; see :class:`~training.ablations.plan.Scale` for what is trained."""

    scale: Scale = field(default_factory=Scale)
    """Size and budget of every training."""
    rows: tuple[str, ...] = ()
    """Names of the rows, ``loss`` for the snapshots, or names of studies; everything if empty."""
    num_samples: int = 500
    """Samples of every row."""
    scored_images: int = 1000
    """Test images whose bits/dim are measured."""
    reference_images: int = 5000
    """Real test images that samples are compared with, at most."""
    components: int = COMPONENTS
    """Principal components of the features that distances are measured in."""
    extractor: str = "efficientnet-lite0"
    """Name of the features' extractor."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A row of the table, or a point of the base run."""

    name: str
    content: dict[str, Any]
    """What its JSON document says."""

    @property
    def figure(self) -> Figure | None:
        """Distance of its samples; None where the training diverged or too few samples are finite."""
        return figure_from_json(self.content.get("distance"))


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Everything that is measured so far."""

    plan: Plan
    options: AblationOptions
    data_name: str
    num_scored: int
    """Test images that bits/dim are of."""
    features: str
    """How the distances are called."""
    rows: dict[str, Measured]
    """By name."""
    points: tuple[Measured, ...]
    """The base run's snapshots, the first steps first."""


def chosen_rows(plan: Plan, names: Sequence[str]) -> tuple[list[Row], bool]:
    """The rows with these names, and whether the snapshots are among them; ``ValueError`` for an unknown name."""
    studies = {study.name: study.rows for study in plan.studies}
    wanted: set[str] = set()
    for name in names:
        allowed = ", ".join([*studies, LOSS, *plan.rows])
        check(name in plan.rows or name in studies or name == LOSS, "rows", name, allowed)
        wanted.update(studies.get(name, (name,)))
    rows = [row for row in plan.rows.values() if not names or row.name in wanted]
    return rows, not names or LOSS in wanted


def run_ablation(
    data_name: str,
    train: Images,
    test: Images,
    out: Path,
    options: AblationOptions,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
    report: Callable[[Ablation], None] = lambda ablation: None,
) -> Ablation:
    """Train and measure; ``report`` is given what there is after every row.

    Raises ``ValueError`` for options that do not fit, :class:`Stopped` when a signal asked for it.
    """
    shape = train.pixels.shape
    names = class_names(train)
    plan = make_plan(
        options.scale,
        image_size=shape[2],
        channels=shape[1],
        class_names=names if len(names) > 1 else (),
        num_images=len(train),
    )
    rows, with_points = chosen_rows(plan, options.rows)
    needed = {row.training for row in rows} | ({BASE} if with_points else set())
    check_trainings(options.scale, needed)
    _check_counts(options, len(test))
    out.mkdir(parents=True, exist_ok=True)
    _check_scale(out / "scale.json", options.scale)
    bench = _Bench(options, plan, train, test, out, device, say)
    report(bench.collected(data_name))
    for training in plan.trainings.values():
        if training.name not in needed:
            continue
        flow = bench.train(training)
        for row in rows:
            if row.training == training.name:
                bench.measure(row, flow)
                report(bench.collected(data_name))
        if training.name == BASE and with_points and flow is not None:
            for step in snapshot_steps(options.scale.steps, training.snapshots):
                bench.measure_snapshot(training, step)
            report(bench.collected(data_name))
    return bench.collected(data_name)


def snapshot_steps(total: int, count: int) -> list[int]:
    """Steps with equal ratios, the last one the whole run: loss falls fastest at first."""
    first = max(1.0, total / 2 ** ((count - 1) / 2))
    return sorted({round(first * (total / first) ** (i / max(1, count - 1))) for i in range(count)})


def _check_counts(options: AblationOptions, num_real: int) -> None:
    """Refuse before the first training what the distances would refuse after it."""
    most, least = min(options.reference_images, num_real) - 1, max(2 * options.components, 2 * GROUPS)
    check(options.components <= most, "components", options.components, f"1 to {most} for {most + 1} real images")
    check(options.num_samples >= least, "num_samples", options.num_samples, f"an integer >= {least}")


def _check_scale(path: Path, scale: Scale) -> None:
    """Rows of different budgets do not belong in one table."""
    content = asdict(scale)
    if path.is_file():
        advice = "delete it if the options are those that the ablation was begun with, or choose another --out"
        found = read_document(path, advice)
        differing = [f"{k} ({found.get(k)!r} there, {v!r} here)" for k, v in content.items() if found.get(k) != v]
        if differing:
            raise ValueError(
                f"{path.parent}: holds an ablation with another {', '.join(differing)}; choose another --out"
            )
    else:
        write_document(path, content)


@dataclass
class _Bench:
    """What all rows share."""

    options: AblationOptions
    plan: Plan
    train_images: Images
    test: Images
    out: Path
    device: torch.device
    say: Callable[[str], None]
    _ruler: Ruler | None = None

    def __post_init__(self) -> None:
        self.test_sha256 = data_fingerprint(self.test)

    def ruler(self) -> Ruler:
        """Made when first asked for: a run whose rows are all finished needs none."""
        if self._ruler is None:
            options = self.options
            kept = epoch_order(len(self.test), seed=0, epoch=0)[: options.reference_images]
            real = Images(self.test.pixels[kept], self.test.labels[kept])
            self.say(f"features of {len(real):,} real images")
            extractor = load_extractor(options.extractor, self.device)
            cache = self.out / "reference.safetensors"
            self._ruler = make_ruler(extractor, real, options.components, cache, self.device)
        return self._ruler

    def train(self, training: Training) -> Flow | None:
        """The averaged flow at the end of the run, which is finished first; None for one that diverged."""
        directory = self.out / training.name
        if (directory / DIVERGED).is_file():
            return None
        build = ChannelCouplingFlow if training.architecture == "channel" else Flow
        trainer = Trainer(training.config, self.train_images, directory, self.device, build)
        if trainer.step < trainer.total_steps:
            self.say(f"{training.name}: step {trainer.step} of {trainer.total_steps}")
            try:
                complete = self._train(trainer, training, directory)
            except TrainingDiverged as error:
                write_document(directory / DIVERGED, {"step": trainer.step, "why": str(error)})
                return None
            if not complete:
                raise Stopped
        facts = {"steps": trainer.step, "skipped_steps": trainer.skipped_steps, "seconds": round(trainer.seconds, 1)}
        write_document(directory / TRAINED, facts)
        return trainer.averaged_flow()

    def _train(self, trainer: Trainer, training: Training, directory: Path) -> bool:
        steps = set(snapshot_steps(trainer.total_steps, training.snapshots)) if training.snapshots else set()
        last_line = time.monotonic()
        with RunLog(directory, trainer.step) as log, stop_on_signals(trainer):

            def observe(report: StepReport) -> None:
                nonlocal last_line
                log.record(report)
                if report.step in steps:
                    path = _snapshot(directory, report.step)
                    path.parent.mkdir(exist_ok=True)
                    weights = trainer.averaged_flow().state_dict()
                    write_tensors(path, {name: value.contiguous() for name, value in weights.items()})
                if time.monotonic() - last_line > SECONDS_PER_LINE:
                    last_line = time.monotonic()
                    self.say(
                        f"{training.name}: step {report.step} of {report.total_steps}, "
                        f"{report.bits_per_dim:.3f} bits/dim, {report.images_per_second:.0f} images/s"
                    )

            return trainer.run(observe)

    def measure(self, row: Row, flow: Flow | None) -> None:
        """Measure a row, unless that is done."""
        training = self.plan.trainings[row.training]
        key = self._key(training, row.sampling)
        path = self.out / training.name / ROWS / f"{row.name}.json"
        if self._is_done(path, key):
            return
        if flow is None:
            advice = "delete it, and the same command trains its flow again"
            content = {"key": key, "diverged": read_document(self.out / training.name / DIVERGED, advice, "step")}
        else:
            facts = read_document(self.out / training.name / TRAINED, MEASURE_AGAIN)
            content = {"key": key, **self._measured(flow, training.noise, row.sampling), "training": facts}
        self._write(path, row.name, content)

    def measure_snapshot(self, training: Training, step: int) -> None:
        """Measure the base run as it was after this step, unless that is done."""
        directory = self.out / training.name
        key = self._snapshot_key(step)
        path = directory / SNAPSHOT_ROWS / f"step_{step:06d}.json"
        if self._is_done(path, key):
            return
        flow = Flow(training.config.flow).to(self.device)
        advice = f"delete {directory}, and the same command trains that flow again"
        flow.load_state_dict(read_tensors(_snapshot(directory, step), advice))
        flow.eval().requires_grad_(False)
        sampling = self.plan.rows[training.name].sampling
        content = {"key": key, "step": step, **self._measured(flow, training.noise, sampling)}
        self._write(path, f"{training.name} after {step} steps", content)

    def _measured(self, flow: Flow, noise: NoiseProtocol, sampling: SamplingDefaults) -> dict[str, Any]:
        options, ruler = self.options, self.ruler()
        scored = self.test.part(None, options.scored_images)
        bits = score_images(flow, scored, noise, conditional=bool(flow.config.num_classes))
        labels = sample_labels(flow, self.test.labels, options.num_samples)
        drawn = draw_samples(flow, noise, sampling, range(options.num_samples), labels)
        bits_per_dim = estimate(finite(bits))
        return {
            "parameters": sum(p.numel() for p in flow.parameters()),
            "bits_per_dim": _number(bits_per_dim.mean),
            "bits_standard_error": _number(bits_per_dim.standard_error),
            "bits_not_finite": len(bits) - len(finite(bits)),
            "distance": figure_json(ruler.measure(drawn.pixels)),
            "samples": options.num_samples,
            "samples_not_finite": drawn.not_finite,
            "sampling_seconds": round(drawn.seconds, 2),
        }

    def _key(self, training: Training, sampling: SamplingDefaults) -> dict[str, Any]:
        """What a measurement depends on, beside the scale that the whole directory has."""
        options = self.options
        return {
            "noise": training.noise.to_dict(),
            "sampling": sampling.to_dict(),
            "num_samples": options.num_samples,
            "scored_images": options.scored_images,
            "reference_images": options.reference_images,
            "features": f"{options.extractor}/pca{options.components}",
            "test_sha256": self.test_sha256,
        }

    def _snapshot_key(self, step: int) -> dict[str, Any]:
        return {**self._key(self.plan.trainings[BASE], self.plan.rows[BASE].sampling), "step": step}

    @staticmethod
    def _is_done(path: Path, key: dict[str, Any]) -> bool:
        return path.is_file() and read_document(path, MEASURE_AGAIN, "key")["key"] == key

    def _write(self, path: Path, name: str, content: dict[str, Any]) -> None:
        write_document(path, content)
        distance = content.get("distance")
        shown = "none" if distance is None else f"{distance['value']:.1f} ± {distance['standard_error']:.1f}"
        self.say(f"{name}: distance {shown}")

    def collected(self, data_name: str) -> Ablation:
        """Everything that is measured so far, whichever rows were chosen this time."""
        rows = {}
        for row in self.plan.rows.values():
            path = self.out / row.training / ROWS / f"{row.name}.json"
            if self._is_done(path, self._key(self.plan.trainings[row.training], row.sampling)):
                rows[row.name] = Measured(name=row.name, content=read_document(path, MEASURE_AGAIN))
        snapshots = sorted((self.out / BASE / SNAPSHOT_ROWS).glob("step_*.json"))
        contents = [read_document(path, MEASURE_AGAIN, "key") for path in snapshots]
        points = [
            Measured(name=f"step_{content['step']:06d}", content=content)
            for content in contents
            if content["key"] == self._snapshot_key(content["step"])
        ]
        options = self.options
        real = min(options.reference_images, len(self.test))
        features = (
            f"Fréchet distance ({options.extractor}/pca{options.components}, {options.num_samples:,} samples against "
            f"{real:,} real images); not comparable with FID"
        )
        return Ablation(
            plan=self.plan,
            options=options,
            data_name=data_name,
            num_scored=min(options.scored_images, len(self.test)),
            features=features,
            rows=rows,
            points=tuple(points),
        )


def _snapshot(directory: Path, step: int) -> Path:
    return directory / SNAPSHOTS / f"step_{step:06d}.safetensors"


def _number(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None
