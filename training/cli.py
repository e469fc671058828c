"""The commands ``train``, ``sweep`` and ``tune``: options in, one clear line per error out.

``evaluate`` is in :mod:`training.evaluate_cli`, ``ablate`` in :mod:`training.ablations.cli`, ``calibrate`` and
``anomaly`` are in :mod:`training.anomaly_cli`.

Importing this module is cheap; torch is imported when a command runs. The console script mounts
the same functions.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from model.bundle import open_bundle
from training.ablations.cli import ablate
from training.anomaly_cli import anomaly, calibrate
from training.commands import STOPPED, Cache, Device, clear_errors, progress_bar
from training.config import TrainConfig, load_preset, needs_start, preset_names, with_settings
from training.data_cli import app as data_app
from training.destinations import check_directory, held
from training.evaluate_cli import evaluate

if TYPE_CHECKING:
    from model.config import SamplingDefaults

app = typer.Typer(
    help="Train and evaluate TarFlow models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _list_presets(requested: bool) -> None:
    if not requested:
        return
    from training.listing import fine_tuning_lines, preset_lines

    for name in preset_names():
        lines = fine_tuning_lines(name) if needs_start(name) else preset_lines(load_preset(name))
        typer.echo("\n    ".join(lines))
    raise typer.Exit


@app.command()
def train(
    preset: Annotated[str, typer.Argument(help="Name of a preset (see --list) or path of a preset file.")],
    data: Annotated[Path, typer.Option(help="Directory with IDX files, or with a folder of images per class.")],
    out: Annotated[Path, typer.Option(help="Directory of the run; one with a checkpoint is continued.")],
    from_: Annotated[
        str | None,
        typer.Option("--from", help="Fine-tune: begin with the weights of this bundle, or model of the package."),
    ] = None,
    codec: Annotated[
        Path | None,
        typer.Option(help="For a preset of latents: the directory of an AutoencoderKL that diffusers has saved."),
    ] = None,
    device: Device = "auto",
    epochs: Annotated[float | None, typer.Option(help="Passes over the data; may change when continuing.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, bf16 or float32.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random in the run.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model; the preset's if not given.")] = None,
    sample_every: Annotated[int | None, typer.Option(min=1, help="Steps between sample grids; an epoch.")] = None,
    cache: Cache = None,
    checkpoint_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds between checkpoints: what a killed run does again, at most.")
    ] = 120.0,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write OUT/tensorboard, too (extra tensorboard).")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Any field of the preset, as in flow.width=256 or ema_decay=0.999; may be given several times.",
        ),
    ] = None,
    list_presets: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_list_presets, help="Print the presets and stop.")
    ] = False,
) -> None:
    """Train a model, or continue the run in --out. OUT/bundle is servable after the first epoch.

    SIGTERM and Ctrl-C write a checkpoint and end the command with status 1; the same command continues the run. On
    several GPUs or hosts, torchrun starts it: torchrun --nproc-per-node 8 -m training train …; each process takes its
    part of a batch.
    """
    del list_presets
    options = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "precision": precision,
        "seed": seed,
        "name": name,
    }
    overrides = {key: value for key, value in options.items() if value is not None}
    with clear_errors():
        fine_tuned = None
        if from_ is not None:
            from training.start import Start

            fine_tuned = Start(open_bundle(from_))
        defaults = None if fine_tuned is None else fine_tuned.defaults

        def resolve(defaults: dict[str, Any] | None) -> TrainConfig:
            return with_settings(load_preset(preset, defaults), settings or ()).with_overrides(**overrides)

        config = resolve(defaults)
        from model.device import resolve_device
        from training.classes import resolve_classes
        from training.data import data_name
        from training.latents import encode_once, load_training_images, open_codec
        from training.processes import joined, local_device
        from training.run import Origin, Run

        torch_device = local_device(resolve_device(device))
        autoencoder = open_codec(config, codec)
        origin = Origin(
            command=_command(preset, data_name(data), out, from_, codec, overrides, settings or ()),
            data_name=data_name(data),
        )
        with joined(torch_device) as processes, ExitStack() as until_the_end:
            with processes.together():
                if processes.is_first:
                    check_directory("out", out)
                    until_the_end.enter_context(held(out))
            say: Callable[[str], None] = typer.echo if processes.is_first else _silent
            # What the first process of a host writes while it prepares the data, the others only read.
            alone_first = cache is not None or autoencoder is not None
            in_turn: AbstractContextManager[None] = processes.first_before_others() if alone_first else nullcontext()
            with processes.together(), in_turn:
                images = load_training_images(data, config, autoencoder, cache, say)
                config, images = resolve_classes(config, images)
                if fine_tuned is not None and not fine_tuned.knows(images):
                    # What a bundle kept out of its own images is no part of other ones.
                    holdout = resolve({**fine_tuned.defaults, "data": {}}).data.holdout
                    config = config.with_overrides(holdout=holdout)
                if autoencoder is not None:
                    images = encode_once(images, autoencoder, out, torch_device)
            run = Run(
                *(config, images, out, torch_device, processes),
                origin=origin,
                console=Console(quiet=not processes.is_first),
                sample_every=sample_every,
                checkpoint_seconds=checkpoint_seconds,
                codec=autoencoder,
                start=fine_tuned,
                tensorboard=tensorboard,
            )
            trainer = run.trainer
            start = f"continuing at step {trainer.step}" if trainer.step else "starting"
            where = f"{processes.size} processes, " if processes.size > 1 else ""
            say(
                f"{config.name}: {start} of {trainer.total_steps}, {len(trainer.images)} images, "
                f"{trainer.steps_per_epoch} steps an epoch, {where}{torch_device} in {trainer.precision}"
            )
            if trainer.warmup_steps > trainer.total_steps:
                say(
                    f"warm-up takes the whole run ({trainer.total_steps:,} of {trainer.warmup_steps:,} steps): the "
                    f"learning rate never reaches {config.optimization.learning_rate:g}"
                )
            complete = run.execute()
    if complete:
        say(f"finished {trainer.step} steps; the model is in {out / 'bundle'}")
    else:
        say(f"stopped after step {trainer.step}, checkpoint written; the same command continues the run")
        raise typer.Exit(STOPPED)


def _silent(text: str) -> None:
    """What the other processes of a run say: the first one speaks for all."""
    del text


def _command(
    preset: str,
    data: str,
    out: Path,
    start: str | None,
    codec: Path | None,
    overrides: dict[str, Any],
    settings: Sequence[str],
) -> str:
    """The command that repeats a run, with the last names of its paths."""
    words = ["tarflow", "train", Path(preset).name, "--data", data, "--out", out.resolve().name]
    words += [] if start is None else ["--from", Path(start).name]
    words += [] if codec is None else ["--codec", codec.resolve().name]
    for key, value in overrides.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    for setting in settings:
        words += ["--set", setting]
    return shlex.join(words)


app.command()(evaluate)


@app.command()
def sweep(
    bundle: Annotated[str, typer.Argument(help="Bundle directory, or name of a model in the package.")],
    data: Annotated[Path, typer.Option(help="Directory with the data, as for train.")],
    out: Annotated[
        Path, typer.Option(help="Directory for sweep.md, sweep.json and the contact sheet sweep.png.")
    ] = Path("sweep"),
    conditional: Annotated[
        bool | None,
        typer.Option("--conditional/--unconditional", help="Only with or only without classes; both."),
    ] = None,
    scales: Annotated[str | None, typer.Option(help="Guidance weights, as in 0.5,1,2.")] = None,
    temperatures: Annotated[str | None, typer.Option(help="Attention temperatures of the unguided pass.")] = None,
    schedules: Annotated[str | None, typer.Option(help="Of constant,linear,cosine.")] = None,
    rules: Annotated[str | None, typer.Option(help="Of linear,closed_form.")] = None,
    num_samples: Annotated[int, typer.Option(help="Samples of each setting.")] = 200,
    confirm_samples: Annotated[
        int, typer.Option(min=0, help="Samples from fresh seeds of the chosen settings and of no guidance; 0: none.")
    ] = 500,
    reference_images: Annotated[int, typer.Option(min=1, help="Real images to compare with, at most.")] = 5000,
    split: Annotated[str, typer.Option(help="Split of the real images: test or train.")] = "test",
    cache: Cache = None,
    seed: Annotated[int, typer.Option(min=0, help="Sample i has the seed SEED + i.")] = 0,
    device: Device = "auto",
    save: Annotated[
        str | None,
        typer.Option(help="conditional, unconditional or both: recommend the best setting for it in the bundle."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare guidance settings by the Fréchet distance of their samples from real images, in a table and on a
    contact sheet. What is not given is as in the default grids; the rest of the sampling is as the bundle recommends.

    evaluate --report measures on the test split, too: a setting that was chosen on it looks a little better there than
    it is; --split train chooses on other images.
    """
    with clear_errors():
        from model.device import resolve_device
        from model.images import encode_image
        from model.weights import update_bundle
        from training.card import with_recommendation
        from training.sweep import SweepOptions, run_sweep
        from training.sweep_grid import MODES, make_grids
        from training.sweep_report import contact_sheet, describe, markdown, to_json

        model = open_bundle(bundle)
        modes = MODES if model.config.flow.num_classes else MODES[1:]
        if conditional is not None:
            modes = (MODES[0] if conditional else MODES[1],)
        savable = [*modes, *(["both"] if len(modes) > 1 else [])]
        if save is not None and save not in savable:
            raise ValueError(f"save: got {save!r}, allowed is what is swept: {', '.join(savable)}")
        options = SweepOptions(
            grids=make_grids(modes, scales=scales, schedules=schedules, rules=rules, temperatures=temperatures),
            num_samples=num_samples,
            confirm_samples=confirm_samples,
            reference_images=reference_images,
            split=split,
            seed=seed,
        )
        check_directory("out", out)
        out.mkdir(parents=True, exist_ok=True)
        with progress_bar() as progress:
            task = progress.add_task("real images", total=None)

            def show(text: str, done: int, total: int) -> None:
                progress.update(task, description=text, completed=done, total=total)

            result = run_sweep(model, data, options, resolve_device(device), show, cache)
        report, document = markdown(result), json.dumps(to_json(result), indent=2) + "\n"
        (out / "sweep.md").write_text(report)
        (out / "sweep.json").write_text(document)
        (out / "sweep.png").write_bytes(encode_image(contact_sheet(result), "png"))
        typer.echo(document if as_json else report, nl=False)
        # Beside a JSON document on stdout, sentences go to stderr.
        say = partial(typer.echo, err=as_json)
        say(f"written to {out}: sweep.md, sweep.json and the contact sheet sweep.png")
        found: dict[str, SamplingDefaults] = {mode.mode: mode.best.setting for mode in result.modes}
        if result.shared_best is not None:
            found["both"] = result.shared_best
        for kind, setting in found.items():
            if kind == save:
                update_bundle(model, sampling=setting, card=with_recommendation(model.card, setting))
                say(f"{model.path} now recommends {describe(setting)}")
            elif setting != model.sampling:
                say(f"to recommend {describe(setting)}, give the same command --save {kind}")
        if save is not None and save not in found:
            say("nothing was saved: no setting is better than no guidance both with and without a class")


@app.command()
def tune(
    bundle: Annotated[str, typer.Argument(help="Bundle directory, or name of a model in the package.")],
    data: Annotated[Path, typer.Option(help="Directory with the data, as for train.")],
    num_images: Annotated[int, typer.Option(help="Images to sample, and to look at.")] = 32,
    tolerance: Annotated[float, typer.Option(help="Backward error that images must stay below.")] = 1e-3,
    split: Annotated[str, typer.Option(help="Split of the data: train or test.")] = "train",
    cache: Cache = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i has the seed SEED + i.")] = 0,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and print, but leave the bundle alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile as one JSON document.")] = False,
) -> None:
    """Measure how a model's blocks converge and store it in the bundle: samplers choose their plan by it.

    Tuning changes neither the weights nor the model's id, and no image by more than the tolerance.
    """
    with clear_errors():
        from model.device import resolve_device
        from model.weights import update_bundle
        from training.tune import TuneOptions, tables
        from training.tune import tune as measure

        model = open_bundle(bundle)
        options = TuneOptions(num_images=num_images, tolerance=tolerance, split=split, seed=seed)
        with progress_bar() as progress:
            task = progress.add_task("", total=None)

            def show(text: str) -> None:
                progress.update(task, description=text)

            tuning = measure(model, data, options, resolve_device(device), show, cache)
        if not dry_run:
            update_bundle(model, convergence=tuning.profile)
        if as_json:
            typer.echo(json.dumps(tuning.profile.to_dict(), indent=2))
            return
        console = Console()
        for table in tables(tuning):
            console.print(table)
        profile = tuning.profile
        typer.echo(
            f"gain {profile.gain:.3g}: backward error of an image for each unit of residual at which a row stops"
        )
        typer.echo(f"floor {profile.floor:.1e}: backward error of sequential decoding in float32")
        if not dry_run:
            typer.echo(f"stored in {model.path / 'sampler.json'}")


app.command()(calibrate)
app.add_typer(data_app, name="data")
app.command()(anomaly)
app.command()(ablate)
