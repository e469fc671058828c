"""The command ``ablate``: the paper's ablations in miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from training.commands import STOPPED, Device, clear_errors


def ablate(
    data: Annotated[Path, typer.Option(help="Directory with the data, as for train; with a test split.")],
    out: Annotated[Path, typer.Option(help="Directory of the ablation; one that was begun is continued.")],
    rows: Annotated[
        str | None, typer.Option(help="Names of rows or studies with commas between them; all. See ablation.md.")
    ] = None,
    budget: Annotated[str, typer.Option(help="Of every flow: '25600 images' or '400 steps'.")] = "25600 images",
    width: Annotated[int, typer.Option(help="Width of the base model's transformers.")] = 64,
    head_dim: Annotated[
        int, typer.Option(help="Size of an attention head; the width is a multiple, for width-half also half of it.")
    ] = 32,
    depth: Annotated[int, typer.Option(min=1, help="Blocks of the base model, and layers in each.")] = 4,
    patch_size: Annotated[int, typer.Option(min=1, help="Side of a patch.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of all.")] = 1e-3,
    image_size: Annotated[int, typer.Option(min=1, help="Side of the images.")] = 28,
    channels: Annotated[int, typer.Option(help="Colours: 1 or 3.")] = 1,
    num_samples: Annotated[int, typer.Option(min=1, help="Samples of every row.")] = 500,
    scored_images: Annotated[int, typer.Option(min=1, help="Test images whose bits/dim are measured.")] = 1000,
    reference_images: Annotated[int, typer.Option(min=1, help="Real images to compare with, at most.")] = 5000,
    components: Annotated[int, typer.Option(min=1, help="Principal components that distances are in.")] = 64,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Train small flows that differ in one thing each, with equal budgets, and compare the order of their samples'
    quality with the paper's. Writes ablation.md, ablation.json and loss.svg after every row.

    SIGTERM and Ctrl-C write a checkpoint and end the command with status 1; the same command continues, and repeats no
    finished row.
    """
    with clear_errors():
        from model.config import check
        from model.device import resolve_device
        from training.ablations.plan import Scale, parse_budget
        from training.ablations.report import has_plot, loss_plot, markdown, to_json
        from training.ablations.run import Ablation, AblationOptions, Stopped, run_ablation
        from training.classes import class_names, match_labels
        from training.data import data_name, load_images
        from training.destinations import held

        options = AblationOptions(
            scale=Scale(
                width=width,
                head_dim=head_dim,
                depth=depth,
                patch_size=patch_size,
                batch_size=batch_size,
                images=parse_budget(budget, batch_size),
                learning_rate=learning_rate,
            ),
            rows=tuple(name.strip() for name in rows.split(",")) if rows else (),
            num_samples=num_samples,
            scored_images=scored_images,
            reference_images=reference_images,
            components=components,
        )
        check(channels in (1, 3), "channels", channels, "1 or 3")
        train, test = (load_images(data, split, image_size, channels) for split in ("train", "test"))
        # A folder without subfolders is one class by its own name, which is another in either split.
        if len(class_names(train)) > 1:
            test = match_labels(test, class_names(train), data.name)

        def write(ablation: Ablation) -> None:
            (out / "ablation.md").write_text(markdown(ablation))
            (out / "ablation.json").write_text(json.dumps(to_json(ablation), indent=2, allow_nan=False) + "\n")
            if has_plot(ablation):
                (out / "loss.svg").write_text(loss_plot(ablation))

        def say(text: str) -> None:
            typer.echo(text, err=as_json)

        try:
            with held(out):
                ablation = run_ablation(data_name(data), train, test, out, options, resolve_device(device), say, write)
        except Stopped:
            say("stopped, checkpoint written; the same command continues the ablation")
            raise typer.Exit(STOPPED) from None
        typer.echo(json.dumps(to_json(ablation), indent=2, allow_nan=False) if as_json else markdown(ablation))
