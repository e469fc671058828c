"""One training run as a person starts it: trainer, log, display, sample grids, bundle, signals."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import yaml
from rich.console import Console

from model.bundle import Bundle, BundleConfig, BundleError, read_bundle
from model.codecs.autoencoder_kl import AutoencoderKL
from model.codecs.base import Latents
from model.flow import Flow
from model.weights import update_bundle, write_bundle
from training.card import (
    RunFacts,
    calibration_note,
    evaluation_section,
    render_card,
    with_calibration,
    with_evaluation,
)
from training.classes import class_frequencies
from training.config import STARTED_FROM, TrainConfig
from training.data import Images
from training.hardware import describe_hardware
from training.log import RunLog, last_epoch_bits_per_dim
from training.processes import ALONE, Processes
from training.progress import ProgressDisplay
from training.samples import Interrupted, write_sample_grid
from training.start import Start
from training.tensorboard import DIRECTORY, TensorBoard, check_installed
from training.trainer import CHECKPOINT_SECONDS, StepReport, Trainer

BUNDLE = "bundle"
CONFIG = "config.yaml"
SAMPLES = "samples"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a run comes from, for its card; names only, no paths."""

    command: str
    """The command that repeats the run."""
    data_name: str
    """Name of the data directory."""


class Run:
    """Everything around one :class:`Trainer`; construct (which continues a checkpoint), then :meth:`execute`.

    Writes into ``out``: ``config.yaml`` (the resolved configuration, a preset file), ``checkpoint.pt``, ``log.jsonl``,
    ``samples/step_XXXXXX.png``, ``tensorboard/`` where it is asked for, and ``bundle/``, which is complete and servable
    after its first writing. Of several processes only the first one writes. Raises what the trainer raises, and
    ``ValueError`` for a name or class names that a bundle cannot have, or where TensorBoard is not installed.
    """

    def __init__(
        self,
        config: TrainConfig,
        images: Images,
        out: Path,
        device: torch.device,
        processes: Processes = ALONE,
        *,
        origin: Origin,
        console: Console,
        sample_every: int | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        codec: AutoencoderKL | None = None,
        start: Start | None = None,
        tensorboard: bool = False,
    ) -> None:
        """With a ``codec`` the images have its latents in place of their pixels; with a ``start`` it is fine-tuned."""
        self._codec, self._start, self._wants_tensorboard = codec, start, tensorboard
        if start is not None and (out / BUNDLE).resolve() == start.bundle.path.resolve():
            raise ValueError(f"out: got {out}, whose bundle the run begins with, allowed is another directory")
        if tensorboard:
            check_installed()
        # What a bundle refuses must not surface only after the first hour.
        BundleConfig(
            name=config.name,
            flow=config.flow,
            noise=config.noise,
            class_names=config.class_names,
            codec=None if codec is None else codec.config,
        )
        self.trainer = Trainer(config, images, out, device, processes=processes, start=start, codec=codec)
        self._config, self._out, self._origin, self._console = config, out, origin, console
        self._checkpoint_seconds = checkpoint_seconds
        self._samples_png: bytes | None = None
        self._sample_every = sample_every or self.trainer.steps_per_epoch
        self._display = ProgressDisplay(
            console,
            resumed_step=self.trainer.step,
            total_steps=self.trainer.total_steps,
            batch_size=config.optimization.batch_size,
        )

    def execute(self) -> bool:
        """Train until done, or until SIGTERM or SIGINT; returns whether the run is complete."""
        trainer = self.trainer
        if not trainer.processes.is_first:
            with stop_on_signals(trainer):
                return self._left_together(self._follow())
        write_config(self._out, self._config, None if self._start is None else self._start.bundle)
        with (
            RunLog(self._out, trainer.step) as log,
            self._tensorboard() as board,
            self._display,
            stop_on_signals(trainer),
        ):

            def observe(report: StepReport) -> None:
                log.record(report)
                if board is not None:
                    board.record(report)
                self._display.update(report)
                if self._is_due(report):
                    flow = trainer.averaged_flow()
                    if self._draw_samples(flow, board):
                        self.write_bundle(flow)

            complete = trainer.run(observe, self._checkpoint_seconds)
            flow = trainer.averaged_flow()
            if complete:
                self._draw_samples(flow, board)
            if trainer.has_learned:
                self.write_bundle(flow)
            return self._left_together(complete)

    def _left_together(self, complete: bool) -> bool:
        # torchrun ends all processes once one has left with an error: none goes while the first one still writes.
        if not complete:
            self.trainer.processes.gather(None)
        return complete

    def _tensorboard(self) -> AbstractContextManager[TensorBoard | None]:
        if not self._wants_tensorboard:
            return nullcontext()
        configuration = (self._out / CONFIG).read_text(encoding="utf-8")
        return TensorBoard(self._out / DIRECTORY, self.trainer.step, configuration)

    def _is_due(self, report: StepReport) -> bool:
        """Whether samples and a bundle are made after this step, before the end."""
        due = report.step % self._sample_every == 0 and report.step < report.total_steps
        return due and self.trainer.has_learned

    def _follow(self) -> bool:
        """What the other processes do: train, and give their part of the weights for what the first one writes."""

        def observe(report: StepReport) -> None:
            if self._is_due(report):
                self.trainer.averaged_weights()

        complete = self.trainer.run(observe, self._checkpoint_seconds)
        self.trainer.averaged_weights()
        return complete

    def _draw_samples(self, flow: Flow, board: TensorBoard | None) -> bool:
        """Write the present step's sample grid; ``False`` when asked to stop meanwhile."""
        trainer, config = self.trainer, self._config
        path = self._out / SAMPLES / f"step_{trainer.step:06d}.png"
        try:
            self._samples_png = write_sample_grid(
                path,
                flow,
                config.noise,
                config.sampling,
                lambda: trainer.stop_requested,
                codec=None if self._codec is None else Latents(self._codec.to(trainer.device)),
            )
        except Interrupted:
            return False
        if board is not None:
            board.show(self._samples_png, trainer.step)
        self._display.note(f"step {trainer.step}: samples in {SAMPLES}/{path.name}")
        return True

    def write_bundle(self, flow: Flow) -> None:
        """Write ``bundle/`` from the flow with averaged weights.

        Only what determines the weights goes into its configuration, so that the same weights keep
        their model id; results of an evaluation and a calibration stay as long as the id does.
        """
        trainer, config = self.trainer, self._config
        directory = self._out / BUNDLE
        facts = RunFacts(
            command=self._origin.command,
            data_name=self._origin.data_name,
            num_images=len(trainer.images),
            num_parameters=sum(p.numel() for p in flow.parameters()),
            step=trainer.step,
            total_steps=trainer.total_steps,
            images_seen=trainer.images_seen,
            skipped_steps=trainer.skipped_steps,
            seconds=trainer.seconds,
            precision=trainer.precision,
            hardware=describe_hardware(trainer.device),
            torch_version=torch.__version__,
            bits_per_dim=last_epoch_bits_per_dim(self._out),
            started_from=None if self._start is None else self._start.provenance,
        )
        bundle_config = BundleConfig(
            name=config.name,
            flow=config.flow,
            noise=config.noise,
            class_names=config.class_names,
            class_prior=class_frequencies(trainer.images, config.flow.num_classes),
            codec=None if self._codec is None else self._codec.config,
            training={
                "optimization": config.optimization.to_dict(),
                "data": {
                    **config.data.to_dict(),
                    "name": facts.data_name,
                    "num_images": facts.num_images,
                    "sha256": trainer.data_sha256,
                },
                "seed": config.seed,
                "steps": trainer.step,
                "precision": trainer.precision,
                **({} if self._start is None else {"from": self._start.provenance}),
            },
        )
        earlier = _read_earlier(directory)
        card = render_card(config, facts, has_samples=self._samples_png is not None, codec=bundle_config.codec)
        bundle = write_bundle(
            directory, bundle_config, flow, config.sampling, card, self._samples_png, codec=self._codec
        )
        if earlier and earlier.model_id == bundle.model_id:
            _carry_over(earlier, bundle)


def write_config(directory: Path, config: TrainConfig, start: Bundle | None) -> None:
    """The resolved configuration as a preset file, from which the same run can be started anywhere.

    That of a fine-tuned run says so, and is refused without weights to begin with.
    """
    part, content = directory / f"{CONFIG}.part", config.to_dict()
    if start is not None:
        content[STARTED_FROM] = f"{start.name} ({start.model_id})"
    part.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    part.replace(directory / CONFIG)


def _carry_over(earlier: Bundle, bundle: Bundle) -> None:
    """Give a bundle what was measured with the same weights before: results in the card, and a calibration."""
    card, results = bundle.card, evaluation_section(earlier.card)
    note = None if earlier.calibration is None else calibration_note(earlier.card)
    if results:
        card = with_evaluation(card, results)
    if note:
        card = with_calibration(card, note)
    if card != bundle.card or earlier.calibration is not None:
        update_bundle(bundle, card=card, calibration=earlier.calibration)


def _read_earlier(directory: Path) -> Bundle | None:
    """The bundle that is about to be replaced, if it is one."""
    try:
        return read_bundle(directory)
    except BundleError:
        return None


@contextmanager
def stop_on_signals(trainer: Trainer) -> Iterator[None]:
    """SIGTERM and SIGINT ask the trainer to stop after its step; a second SIGINT interrupts at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        trainer.stop_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
