"""The command ``evaluate``: bits/dim of bundles, and with ``--report`` all else that can be said of them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from model.bundle import open_bundle
from training.commands import STOPPED, Cache, Device, clear_errors, progress_bar, show_progress

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from rich.progress import Progress

    from training.evaluate import Evaluation
    from training.full_report import Bench


def evaluate(
    bundles: Annotated[list[str], typer.Argument(help="Bundle directories, or names of models in the package.")],
    data: Annotated[Path, typer.Option(help="Directory with the data, as for train.")],
    split: Annotated[str, typer.Option(help="test or train.")] = "test",
    draws: Annotated[int, typer.Option(min=1, help="Noise draws per image.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate the first N images only.")] = None,
    train_limit: Annotated[
        int | None,
        typer.Option(min=0, help="Training images for the train-test gap; as many as are evaluated. 0: none."),
    ] = None,
    no_class: Annotated[bool, typer.Option("--no-class", help="Score without the images' classes.")] = False,
    accuracy: Annotated[
        bool | None,
        typer.Option(
            "--accuracy/--no-accuracy",
            help="Also the Bayes accuracy of class-conditional models: a pass for each class. With --report it is.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=0, help="Also draw so many samples and count those that are not finite. With --report: 1,000."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i gets the noise of seed + i.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 128,
    cache: Cache = None,
    device: Device = "auto",
    write_card: Annotated[
        bool, typer.Option("--write-card", help="Store the figures in the bundles' CARD.md.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Also measure the samples and write report.md, report.json and pictures into this directory; of "
            "several bundles, into one of its own for each."
        ),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(help="With --report: the features, efficientnet-lite0 (so if not given) or a TorchScript file."),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(help="With --report: an .npz file with mu and sigma of real images' features, for FID."),
    ] = None,
    statistics_out: Annotated[
        Path | None,
        typer.Option(help="With --report: write such a file, of the test images' features, for other reports."),
    ] = None,
    reference_images: Annotated[
        int | None, typer.Option(min=1, help="With --report: test images to compare with, at most; 10,000.")
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="With --report: train a coupling flow on equal terms to compare with.")
    ] = False,
    baseline_images: Annotated[
        int | None,
        typer.Option(min=1, help="With --report: train it on so many images, not on as many as the bundle was."),
    ] = None,
    baseline_learning_rate: Annotated[
        float | None, typer.Option(help="With --report: train it with this peak learning rate, not with Glow's 0.001.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print bits/dim on a test split with its protocol, the train-test gap and, for several bundles,
    the paired difference of each to the first. With --accuracy also how often the most probable class is the label.
    With --report also how good the samples are, and whether they are copies, beside what real images get."""
    with clear_errors():
        from model.device import resolve_device
        from model.weights import update_bundle
        from training.card import with_evaluation
        from training.evaluate import EvaluationOptions, evaluate_bundle
        from training.report import differences, lines, markdown, to_json
        from training.report_options import report_options

        wanted = report_options(
            report,
            extractor=extractor,
            statistics=statistics,
            statistics_out=statistics_out,
            samples=samples,
            reference_images=reference_images,
            seed=seed,
            baseline=baseline or None,
            baseline_images=baseline_images,
            baseline_learning_rate=baseline_learning_rate,
        )
        options = EvaluationOptions(
            split=split,
            draws=draws,
            limit=limit,
            train_limit=train_limit,
            ignore_classes=no_class,
            accuracy=wanted is not None if accuracy is None else accuracy,
            # A report counts its own samples.
            samples=0 if wanted is not None else samples or 0,
            seed=seed,
            batch_size=batch_size,
        )
        torch_device, opened = resolve_device(device), [open_bundle(text) for text in bundles]
        if wanted is None or report is None:
            bench = None
        else:
            from training.full_report import Bench

            bench = Bench.prepare(opened, wanted, report, torch_device, cache)
        evaluations, cards = [], {}
        with progress_bar() as progress:
            for bundle in opened:
                show = partial(show_progress, progress, progress.add_task(bundle.name, total=None))
                evaluations.append(evaluate_bundle(bundle, data, options, torch_device, show, cache))
            if bench is not None:
                cards = _write_reports(bench, evaluations, data, torch_device, progress)
        if write_card:
            for evaluation in evaluations:
                section = cards.get(evaluation.bundle.path, markdown(evaluation))
                update_bundle(evaluation.bundle, card=with_evaluation(evaluation.bundle.card, section))
        if as_json:
            typer.echo(json.dumps(to_json(evaluations), indent=2))
            return
        for evaluation in evaluations:
            typer.echo("\n  ".join([f"{evaluation.bundle.name} ({evaluation.bundle.model_id})", *lines(evaluation)]))
        for line in differences(evaluations):
            typer.echo(line)


def _write_reports(
    bench: Bench, evaluations: list[Evaluation], data: Path, device: torch.device, progress: Progress
) -> dict[Path, str]:
    """Write the reports; returns what they say for the card of each bundle, by its path."""
    from training.baselines.equal import Stopped
    from training.quality_report import card_section

    def begin(text: str, total: int) -> Callable[[int], None]:
        return partial(progress.advance, progress.add_task(text, total=total))

    def say(text: str) -> None:
        progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    try:
        reports = bench.write_reports(evaluations, data, device, say, begin)
    except Stopped:
        say("stopped, checkpoint written; the same command continues the baseline")
        raise typer.Exit(STOPPED) from None
    return {report.evaluation.bundle.path: card_section(report) for report in reports}
