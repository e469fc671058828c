"""The commands ``calibrate`` and ``anomaly``: what is normal to a model, and how well it tells what is not.

As in :mod:`training.cli`, which mounts them, torch is imported when a command runs.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from model.bundle import CALIBRATION, open_bundle
from training.commands import Cache, Device, clear_errors, progress_bar, show_progress

ALL = "all sets"
"""Name of the sets taken together."""
WIDTH = 140
"""Columns of a table that goes to a file."""


def calibrate(
    bundle: Annotated[str, typer.Argument(help="Bundle directory, or name of a model in the package.")],
    data: Annotated[Path, typer.Option(help="Directory with normal images, as for train.")],
    split: Annotated[str, typer.Option(help="Split of the data: train or test.")] = "train",
    cache: Cache = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise and of the division into halves.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N images only.")] = None,
    name: Annotated[str, typer.Option(help="Name of the calibration.")] = "default",
    out: Annotated[Path | None, typer.Option(help="Write it to this file and leave the bundle alone.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a calibration that is there.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 64,
    device: Device = "auto",
) -> None:
    """Measure what normal images look like to a model and store it in the bundle: p-values are computed with it.

    Of the data that a model was trained on, only the images kept out of training are used; where nobody can tell which
    these are, it says why. Exact copies count once. Neither the weights nor the model's id change.
    """
    with clear_errors():
        model = open_bundle(bundle)
        path = out or model.path / CALIBRATION
        if not force and (path.exists() if out else model.calibration is not None):
            raise ValueError(f"{path}: there is a calibration already; --force replaces it")
        if out is not None and not out.parent.is_dir():
            raise ValueError(f"out: got {out}, allowed is a file in a directory that exists")

        from model.anomaly.conformal import smallest_alpha
        from model.device import resolve_device
        from model.weights import update_bundle
        from training.calibrate import CalibrateOptions, calibrate_bundle, normal_images, note
        from training.card import with_calibration

        options = CalibrateOptions(split=split, limit=limit, seed=seed, name=name, batch_size=batch_size)
        where, normals = resolve_device(device), normal_images(model, data, options, cache)
        for notice in normals.notices:
            # Before the work: who reads that these images are the wrong ones need not wait for it.
            typer.echo(f"{model.name}: {notice}")
        with progress_bar() as progress:
            show = partial(show_progress, progress, progress.add_task(model.name, total=None))
            calibration = calibrate_bundle(model, normals, options, where, show)
        content = calibration.to_bytes()
        if out is None:
            update_bundle(model, calibration=content, card=with_calibration(model.card, note(calibration)))
        else:
            part = out.with_name(f".{out.name}.part")
            part.write_bytes(content)
            part.replace(out)
    record = calibration.record
    typer.echo(
        f"{model.name}: {record.num_fit:,} images fitted, {record.num_calibration:,} calibrated ({record.source}); "
        f"smallest alpha {smallest_alpha(record.num_calibration):.4g}"
    )
    use = "" if out is None else f" --calibration {out}"
    typer.echo(f"stored in {path}; try it with: tarflow anomaly {bundle}{use} --normal DIR --anomalous DIR")


def anomaly(
    bundle: Annotated[str, typer.Argument(help="Bundle directory, or name of a model in the package.")],
    normal: Annotated[
        Path | None, typer.Option(help="Folder of normal images that the model was neither trained nor calibrated on.")
    ] = None,
    anomalous: Annotated[
        list[Path] | None, typer.Option(help="Folder of anomalous images; may be given several times.")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="Folder with NAME_mask.png for each anomalous NAME.png: light is anomalous.")
    ] = None,
    mvtec: Annotated[
        Path | None, typer.Option(help="All three in the layout of MVTec AD: test/good, test/DEFECT, ground_truth.")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="Calibration file; the bundle's own if not given.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use N images of each set only.")] = None,
    scores: Annotated[str | None, typer.Option(help="Scores, as in combined,nll; all.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    resamples: Annotated[int, typer.Option(min=0, help="Resamples of the bootstrap; 0: no intervals.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 64,
    picture: Annotated[
        Path | None, typer.Option(help="PNG file for a histogram and ROC curves of the first score.")
    ] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print how well a calibrated model tells anomalous images from normal ones, score by score and set by set, how
    many normal images it flags beside what was stated, and with masks how well its maps show where."""
    with clear_errors():
        from training.image_sets import ImageSet, load_mvtec, load_set, unique_names

        model = open_bundle(bundle)
        if mvtec is not None and (anomalous or masks is not None):
            raise ValueError("mvtec: got it with anomalous or masks, allowed is it alone, or with normal")
        if mvtec is None and not (normal and anomalous):
            raise ValueError("anomalous: got too little, allowed is --normal DIR with --anomalous DIR, or --mvtec DIR")

        from training.anomaly import choose_scores, compare, pooled, score_set
        from training.anomaly_report import picture as draw
        from training.anomaly_report import tables, to_json
        from training.calibrate import open_calibration
        from training.detection_plot import MAX_SETS

        known = open_calibration(model, calibration)
        names = choose_scores(known, scores)
        size, channels = model.config.flow.image_size, model.config.flow.channels
        good: ImageSet | None = None
        if mvtec is not None:
            good, sets = load_mvtec(mvtec, size, channels, limit=limit)
        else:
            folders = anomalous or []
            sets = [
                load_set(folder, size, channels, name=name, limit=limit, masks=masks)
                for folder, name in zip(folders, unique_names(folders), strict=True)
            ]
            if masks is not None and all(of.masks is None for of in sets):
                raise ValueError(f"masks: got {masks}, where there is none for any picture of {sets[0].name}")
        if normal is not None:
            good = load_set(normal, size, channels, limit=limit)
        if good is None:
            raise ValueError(f"{mvtec}: has no test/good; give normal images with --normal DIR")
        if picture is not None and len(sets) > MAX_SETS:
            raise ValueError(f"picture: got {len(sets)} sets, allowed are up to {MAX_SETS}; leave --picture out")

        from model.device import resolve_device
        from model.images import encode_image
        from model.weights import load_flow

        flow = load_flow(model, resolve_device(device))
        is_located = any(of.masks is not None for of in sets)
        total, done = len(good) + sum(map(len, sets)), 0
        with progress_bar() as progress:
            task = progress.add_task(model.name, total=total)

            def advance(count: int) -> None:
                nonlocal done
                done += count
                show_progress(progress, task, done, total)

            look = partial(
                score_set, flow, model.config.noise, known, scores=names, batch_size=batch_size, advance=advance
            )
            normals = look(good, with_maps=is_located)
            scored = [look(of, with_maps=of.masks is not None) for of in sets]
        compared = [*scored, pooled(scored, ALL)] if len(scored) > 1 else scored
        comparison = compare(known, normals, compared, resamples=resamples, seed=seed)
        if picture is not None:
            picture.write_bytes(encode_image(draw(comparison, scored), "png"))
        if as_json:
            typer.echo(json.dumps(to_json(comparison), indent=2))
        else:
            console = Console()
            if not console.is_terminal:
                # In a file nothing is cut off.
                console = Console(width=WIDTH)
            for table in tables(comparison):
                console.print(table)
        if picture is not None:
            typer.echo(f"{names[0]} of all sets is drawn in {picture}", err=as_json)
