"""What a sampling request asks for, joined with what the bundle recommends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from model.config import SamplingDefaults, SolverOptions
from service.api.schemas import SamplerFields
from service.errors import InvalidRequest
from service.jobs import ModelInfo


def asked(model: ModelInfo, sent: SamplerFields, label: int | None, **fixed: Any) -> tuple[dict[str, Any], int]:
    """What a request asks of the sampler, as its job carries it, and what it costs in passes.

    null guidance is absent, but for the window, where it means all blocks; ``fixed`` goes before what was sent.
    """
    given = {field.name: getattr(sent, field.name) for field in fields(SamplingDefaults)}
    nulls = {"guidance_window"} & sent.model_fields_set
    given = {name: value for name, value in given.items() if value is not None or name in nulls}
    options = sampling_options(model, {**given, **fixed}, label)
    solver = SolverOptions(**{field.name: getattr(sent, field.name) for field in fields(SolverOptions)})
    used = {"options": options.to_dict(), "solver": solver.to_dict(), "trajectory": sent.trajectory}
    return used, passes(model, options, solver)


def sampling_options(model: ModelInfo, given: Mapping[str, Any], label: int | None) -> SamplingDefaults:
    """The bundle's recommendation with the fields that are given, as they will be used.

    Raises ``InvalidRequest`` for what is not allowed, or not with this model.
    """
    if given.get("guidance_rule") == "closed_form":
        # It guides both; what the bundle recommends for the linear rule is not meant for it.
        given = {"guidance_target": "both", **given}
    elif given.get("guidance_target") in ("scale", "shift"):
        # Only the linear rule guides one of them.
        given = {"guidance_rule": "linear", **given}
    try:
        options = replace(model.sampling, **given)
        if options.denoise:
            check_can_denoise(model)
        options.check_fits(model.flow, model.noise)
    except ValueError as error:
        raise _invalid(error) from error
    if label is None and options.attention_temperature == 1:
        # Without class and temperature both passes are the same, and guidance does nothing.
        options = replace(options, guidance_scale=0.0)
    return options


def _invalid(error: ValueError) -> InvalidRequest:
    """The configuration's own refusal, whose message begins with the field."""
    return InvalidRequest(str(error), param=str(error).partition(":")[0])


def check_can_denoise(model: ModelInfo) -> None:
    """Raise ``InvalidRequest`` for a model that was not trained with Gaussian noise."""
    if model.noise.kind != "gaussian":
        raise InvalidRequest(
            f"denoise: model {model.name!r} was trained with {model.noise.kind} noise; "
            "only Gaussian-noise models can denoise",
            param="denoise",
            code="cannot_denoise",
        )


def passes(model: ModelInfo, options: SamplingDefaults, solver: SolverOptions) -> int:
    """What an image costs admission, in passes through the model: itself, one more with guidance, with denoising,
    and with a certificate, which counts as asked for where the plan is not known to do without.
    """
    exact = solver.solver == "sequential" or (solver.solver == "auto" and model.convergence is None)
    certifies = solver.certify or solver.precision != "float32" or not exact
    return 1 + (options.guidance_scale != 0) + options.denoise + certifies
