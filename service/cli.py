"""The console script ``tarflow``. Everything heavy is imported when a command runs."""

from __future__ import annotations

import inspect
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table

from model.config import GuidanceRule, GuidanceSchedule, GuidanceTarget, Precision, Solver, SolverOptions
from service import keys_cli
from service.errors import ServiceError
from service.settings import ApiSettings, ServeSettings, SharedSettings, WorkerSettings
from training import data_cli
from training.ablations.cli import ablate
from training.anomaly_cli import anomaly, calibrate
from training.cli import sweep, train, tune
from training.commands import clear_errors
from training.evaluate_cli import evaluate

app = typer.Typer(
    help="Serve, train and use TarFlow normalizing flows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(train)
app.command()(evaluate)
app.command()(sweep)
app.command()(tune)
app.command()(calibrate)
app.command()(anomaly)
app.command()(ablate)
app.add_typer(keys_cli.app, name="keys")
app.add_typer(data_cli.app, name="data")

SettingsT = TypeVar("SettingsT", bound=SharedSettings)
SECRET = ("redis", "keys_inline")
"""Settings whose values may hold a secret."""
ALSO = {"device": ("devices",)}
"""Second names of flags."""

Model = Annotated[
    str | None,
    typer.Option(
        help="Bundle directory, or name of a model in the package (by default fashion-mnist); with --url, name of a "
        "model that the service has (by default its first)."
    ),
]
Class = Annotated[str | None, typer.Option("--class", help="Class by name or index; none if not given.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]
DEFAULT_MODEL = "fashion-mnist"
Url = Annotated[str | None, typer.Option(help="Let the service at this URL do it: http://127.0.0.1:8000.")]
Key = Annotated[str | None, typer.Option(envvar="TARFLOW_KEY", help="API key for that service.", show_envvar=True)]


@contextmanager
def _service_errors() -> Iterator[None]:
    """Let the service's own refusals of a value appear like any other wrong option."""
    try:
        yield
    except ServiceError as error:
        raise ValueError(error.message) from error


def _built(form: type[SettingsT], flags: dict[str, Any]) -> SettingsT:
    """The settings of a form from flags and the environment; raises a ``ValueError`` that shows no password."""
    # Until the form has its own way to leave, there is nothing to finish: being asked to end is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        return form(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise ValueError(f"{name}: give --{name.replace('_', '-')}, or set TARFLOW_{name.upper()}") from None
        got = "" if name in SECRET else f" (got {first['input']!r})"
        raise ValueError(f"{name}: {first['msg']}{got}") from None


def _serve(**flags: Any) -> None:
    """Start the service; every flag is also an environment variable (TARFLOW_PORT for --port)."""
    with clear_errors():
        settings = _built(ServeSettings, flags)
        from service.server import serve

        serve(settings)


def _api(**flags: Any) -> None:
    """Answer HTTP for the workers of the same Redis; start as many as you like.

    Every flag is also an environment variable (TARFLOW_PORT for --port).
    """
    with clear_errors():
        settings = _built(ApiSettings, flags)
        from service.server import api

        api(settings)


def _worker(**flags: Any) -> None:
    """Work for the API processes of the same Redis, with a process for each device; on as many hosts as you like.

    Every flag is also an environment variable (TARFLOW_DEVICE for --device).
    """
    with clear_errors():
        settings = _built(WorkerSettings, flags)
        from service.supervisor import supervise

        supervise(settings)


def _fields(form: type[SharedSettings]) -> dict[str, FieldInfo]:
    """The fields of a form: those of what it is made of, then its own."""
    declared = [name for kind in (*form.__mro__[1:], form) for name in getattr(kind, "__annotations__", ())]
    names = [name for name in declared if name in form.model_fields]
    return {name: form.model_fields[name] for name in dict.fromkeys(names)}


def _with_setting_flags(function: Any, form: type[SharedSettings]) -> Any:
    """Give a command one option per field of its form, so that flags and settings cannot differ."""
    parameters, annotations = [], {}
    for name, field in _fields(form).items():
        kind: Any = next((kind for kind in (int, float, Path) if field.annotation is kind), str)
        shown = name not in ("models", "state") and not field.is_required() and field.default is not None
        known = f" (default: {field.default})" if shown else ""
        declared = [f"--{spelling.replace('_', '-')}" for spelling in (name, *ALSO.get(name, ()))]
        option = Annotated[Optional[kind], typer.Option(*declared, help=f"{field.description}{known}")]  # noqa: UP045
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option))
        annotations[name] = option
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = annotations
    return function


app.command("serve")(_with_setting_flags(_serve, ServeSettings))
app.command("api")(_with_setting_flags(_api, ApiSettings))
app.command("worker")(_with_setting_flags(_worker, WorkerSettings))


@app.command("import")
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="State dict in the official layout (.pth).")],
    out: Annotated[Path, typer.Argument(help="Bundle directory to write.")],
    noise_std: Annotated[float | None, typer.Option(help="σ of the Gaussian training noise.")] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="Trained with uniform dequantization.")] = False,
    class_names: Annotated[Path | None, typer.Option(help="Text file with one class name a line.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model; by default that of OUT.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is at OUT.")] = False,
) -> None:
    """Turn a checkpoint of the official implementation into a bundle that can be served."""
    with clear_errors():
        if (noise_std is None) == (not uniform):
            raise ValueError("noise: give either --noise-std S or --uniform; the checkpoint does not tell")
        from model.config import NoiseProtocol
        from service.local import import_checkpoint

        noise = NoiseProtocol(kind="uniform") if noise_std is None else NoiseProtocol(kind="gaussian", std=noise_std)
        names = None
        if class_names is not None:
            names = [line.strip() for line in class_names.read_text().splitlines() if line.strip()]
        bundle = import_checkpoint(
            checkpoint, out, noise, name=name or out.resolve().name, class_names=names, replace_existing=force
        )
    flow = bundle.config.flow
    typer.echo(
        f"{out}: model {bundle.name!r}, {flow.image_size}x{flow.image_size}, {flow.channels} channels, "
        f"{flow.num_blocks} blocks, {flow.num_classes} classes; serve it with: tarflow serve --models {out}"
    )


@app.command()
def sample(
    out: Annotated[Path, typer.Argument(help="PNG file to write.")],
    model: Model = None,
    class_: Class = None,
    num: Annotated[int, typer.Option(min=1, help="Number of images; several make a grid.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image; image i uses seed + i.")] = 0,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance weight w.")] = None,
    guidance_rule: Annotated[GuidanceRule | None, typer.Option(help="Guidance rule.")] = None,
    guidance_schedule: Annotated[GuidanceSchedule | None, typer.Option(help="Guidance schedule.")] = None,
    guidance_target: Annotated[GuidanceTarget | None, typer.Option(help="What the linear rule guides.")] = None,
    guidance_window: Annotated[
        tuple[int, int] | None, typer.Option(help="First guided block, and the one after the last.")
    ] = None,
    attention_temperature: Annotated[float | None, typer.Option(help="τ of the unguided pass.")] = None,
    denoise: Annotated[bool | None, typer.Option(help="Denoise with Tweedie's formula.")] = None,
    solver: Annotated[Solver, typer.Option(help="How the blocks are inverted.")] = SolverOptions.solver,
    tolerance: Annotated[
        float, typer.Option(help="Largest backward error of a certified image.")
    ] = SolverOptions.tolerance,
    precision: Annotated[Precision, typer.Option(help="bf16 drafts; on a CPU it is slow.")] = SolverOptions.precision,
    certify: Annotated[
        bool | None, typer.Option(help="A certificate for every image; by default where it is needed.")
    ] = None,
    trajectory: Annotated[bool, typer.Option("--trajectory", help="Also show the states after each block.")] = False,
    device: Device = "auto",
    url: Url = None,
    key: Key = None,
) -> None:
    """Draw images without a server, or with one (--url); what is not given is as the bundle recommends."""
    given = {
        "guidance_scale": guidance_scale,
        "guidance_rule": guidance_rule,
        "guidance_schedule": guidance_schedule,
        "guidance_target": guidance_target,
        "guidance_window": guidance_window,
        "attention_temperature": attention_temperature,
        "denoise": denoise,
    }
    overrides = {key: value for key, value in given.items() if value is not None}
    with clear_errors(), _service_errors():
        how = SolverOptions(solver=solver, tolerance=tolerance, precision=precision, certify=certify)
        wanted: Any = {"label": class_, "seeds": range(seed, seed + num), "overrides": overrides, "solver": how}
        if url is None:
            from service import local

            drawn = local.sample(model or DEFAULT_MODEL, device, **wanted, trajectory=trajectory)
        else:
            from service import remote

            _check_unused(device)
            with remote.connected(url, key) as client:
                drawn = remote.sample(client, model, **wanted, trajectory=trajectory)
        out.write_bytes(drawn.png)
    typer.echo(f"{out}: {num} images from seed {seed}, {json.dumps(drawn.options.to_dict())}")
    exactness = "exact but for rounding (--certify measures it)"
    if drawn.backward_error is not None:
        within = "certified within" if drawn.certified else "not within"
        exactness = f"largest backward error {drawn.backward_error:.2g}, {within} {tolerance:g}"
    typer.echo(f"blocks solved {' or '.join(drawn.plans)}; {exactness}")


@app.command()
def score(
    files: Annotated[list[Path], typer.Argument(help="Image files.")],
    model: Model = None,
    class_: Class = None,
    draws: Annotated[int, typer.Option(min=1, help="Noise draws per image.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    alpha: Annotated[
        float | None, typer.Option(help="Level of the verdicts: the expected share of false alarms.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Calibration file that says what is normal, with --url the name of one that the service has; by "
            "default the bundle's own."
        ),
    ] = None,
    overlay: Annotated[
        Path | None, typer.Option(help="Directory for a picture of each image that shows where it is unusual.")
    ] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    url: Url = None,
    key: Key = None,
) -> None:
    """Print how likely images are, with a calibration whether they are normal; without a server or with one (--url)."""
    with clear_errors(), _service_errors():
        asked: Any = {"label": class_, "draws": draws, "seed": seed, "alpha": alpha, "overlays": overlay}
        if url is None:
            from service import local

            result = local.score(model or DEFAULT_MODEL, device, files, **asked, calibration=calibration)
        else:
            from service import remote

            _check_unused(device)
            name = None if calibration is None else str(calibration)
            with remote.connected(url, key) as client:
                result = remote.score(client, model, files, **asked, calibration=name)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    used = result.get("calibration")
    verdicts = ("verdict", "p-value") if used else ()
    table = Table("file", "log-likelihood (nats)", "bits/dim", *verdicts, "changes")
    for image in result["images"]:
        cells = [image["file"], f"{image['log_likelihood']:.2f}", f"{image['bits_per_dim']:.4f}"]
        if used:
            cells += ["anomaly" if image["is_anomaly"] else "normal", f"{image['p_value']:.4g}"]
        table.add_row(*cells, "; ".join(image["warnings"]))
    console = Console()
    console.print(table)
    console.print(result["protocol"]["meaning"])
    if used:
        level = result["images"][0]["alpha"]
        console.print(f"verdicts at level {level:g}, by {used['num_calibration']} normal images of {used['name']!r}")


def _check_unused(device: str) -> None:
    if device != "auto":
        raise ValueError(f"device: got {device!r}, but with --url the service chooses; leave --device out")


def main() -> None:
    """Entry point of the console script."""
    app()
