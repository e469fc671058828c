"""CARD.md: what a person wants to know about a model, written by the run that made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.codecs.config import CodecConfig
from model.config import EMBEDDING_STD, FlowConfig, SamplingDefaults
from training.config import TrainConfig
from training.duration import duration

BEGIN, END = "<!-- evaluation:begin -->", "<!-- evaluation:end -->"
"""Markers around the section that ``evaluate --write-card`` fills in."""
RECOMMENDED = "- Recommended sampling:"
"""How the line begins that :func:`with_recommendation` replaces."""
CALIBRATED = "- Calibration of normal images:"
"""How the line begins that :func:`with_calibration` replaces."""
_NOT_EVALUATED = "Not evaluated yet: `tarflow evaluate BUNDLE --data DIR --write-card` fills this in."


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run did, beside its configuration."""

    command: str
    """The command that repeats it, with directories by their last name only."""
    data_name: str
    """Name of the data directory."""
    num_images: int
    """Images trained on, without the holdout."""
    num_parameters: int
    """Weights of the flow."""
    step: int
    """Steps done."""
    total_steps: int
    """Steps of the whole run."""
    images_seen: int
    """Images in those steps, repeats included."""
    skipped_steps: int
    """Steps left out for a loss or gradient that was not finite."""
    seconds: float
    """Time in training steps."""
    precision: str
    """``bf16`` (autocast) or ``float32``."""
    hardware: str
    """Model name of the device."""
    torch_version: str
    """Version of PyTorch."""
    bits_per_dim: float | None
    """Mean training bits/dim over the last epoch."""
    started_from: dict[str, Any] | None = None
    """Name and id of the model whose weights it began with, and ``training``, its own record, where it has one; None
    where it began with new ones."""


def architecture(flow: FlowConfig) -> str:
    """The literature's short form patch-width-blocks-layers, as in ``4-128-4-4``."""
    layers = flow.layers_per_block
    depth = str(layers) if isinstance(layers, int) else "(" + ",".join(map(str, layers)) + ")"
    return f"{flow.patch_size}-{flow.width}-{flow.num_blocks}-{depth}"


def render_card(
    config: TrainConfig, facts: RunFacts, *, has_samples: bool = False, codec: CodecConfig | None = None
) -> str:
    """The whole card as Markdown, its evaluation section still empty."""
    sections = [
        f"# {config.name}",
        _summary(config, codec),
        *(["![Samples, a column for each class](samples.png)"] if has_samples else []),
        "## Model",
        _model(config, facts),
        "## Data",
        _data(config, facts),
        "## Training",
        f"```\n{facts.command}\n```",
        _training(config, facts),
        "## Evaluation",
        f"{BEGIN}\n{_NOT_EVALUATED}\n{END}",
    ]
    return "\n\n".join(sections) + "\n"


def evaluation_section(card: str) -> str | None:
    """What stands between a card's markers; ``None`` when it has no results."""
    before, begin, rest = card.partition(BEGIN)
    content, end, after = rest.partition(END)
    del before, after
    content = content.strip()
    return content if begin and end and content != _NOT_EVALUATED else None


def with_evaluation(card: str, content: str) -> str:
    """The card with ``content`` between its markers; a card without markers gets a section at its end."""
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        before, after = f"{card.rstrip()}\n\n## Evaluation\n\n", "\n"
    return f"{before}{BEGIN}\n{content.strip()}\n{END}{after}"


def _summary(config: TrainConfig, codec: CodecConfig | None) -> str:
    flow = config.flow
    if codec is not None:
        kind = "class-conditional" if flow.num_classes else "unconditional"
        colours, side = "grey" if codec.in_channels == 1 else "colour", flow.image_size * codec.factor
        return (
            f"A {kind} TarFlow (arXiv 2412.06329) of the latents of {side}x{side} {colours} images, "
            f"{flow.image_size}x{flow.image_size} with {flow.channels} channels, "
            "which the bundle's autoencoder makes (arXiv 2506.06276). Its likelihoods are exact for these latents, and "
            "they are no likelihoods of pixels."
        )
    kind = "class-conditional" if flow.num_classes else "unconditional"
    colours = "grey" if flow.channels == 1 else "colour"
    return (
        f"A {kind} TarFlow (arXiv 2412.06329), a normalizing flow with exact likelihoods, "
        f"for {flow.image_size}x{flow.image_size} {colours} images."
    )


def _model(config: TrainConfig, facts: RunFacts) -> str:
    flow, noise, sampling = config.flow, config.noise, config.sampling
    lines = [
        f"- Architecture: {architecture(flow)} (patch size, width, blocks, layers per block), "
        f"{facts.num_parameters:,} parameters" + (", volume preserving" if flow.volume_preserving else ""),
    ]
    lines += _options(flow)
    if config.class_names:
        lines.append(f"- Classes: {', '.join(config.class_names)}")
    scale = "on the [-1, 1] pixel scale" if noise.space == "pixels" else "on the scale of the latents"
    protocol = f"Gaussian, σ = {noise.std:g} {scale}" if noise.kind == "gaussian" else "uniform"
    lines += [
        f"- Noise added to {'images' if noise.space == 'pixels' else 'latents'} in training: {protocol}",
        _recommendation(sampling),
    ]
    return "\n".join(lines)


def _options(flow: FlowConfig) -> list[str]:
    """What differs from TarFlow's blocks, as a line, if anything does."""
    found = []
    if flow.num_classes and flow.conditioned_blocks is not None:
        seen = ", ".join(map(str, flow.conditioned_blocks))
        found.append(f"the class enters block {seen} of 0 to {flow.num_blocks - 1} alone, the last next to the noise")
    if flow.scale_function != "exp":
        found.append(f"the scale is a {flow.scale_function}")
    if flow.soft_clip:
        found.append(f"scales and shifts are bound by {flow.soft_clip:g}")
    return [f"- STARFlow's options (arXiv 2506.06276): {'; '.join(found)}"] if found else []


def _recommendation(sampling: SamplingDefaults) -> str:
    rule = "" if sampling.guidance_rule == "linear" else ", closed-form rule"
    return (
        f"{RECOMMENDED} guidance {sampling.guidance_scale:g} ({sampling.guidance_schedule}{rule}), "
        f"attention temperature {sampling.attention_temperature:g}, denoising {'on' if sampling.denoise else 'off'}"
    )


def with_recommendation(card: str, sampling: SamplingDefaults) -> str:
    """The card with another line of recommended sampling, in place of the one it has."""
    lines = [_recommendation(sampling) if line.startswith(RECOMMENDED) else line for line in card.split("\n")]
    return "\n".join(lines)


def calibration_note(card: str) -> str | None:
    """What a card says about the bundle's calibration; ``None`` when it says nothing."""
    notes = [line.removeprefix(CALIBRATED).strip() for line in card.split("\n") if line.startswith(CALIBRATED)]
    return notes[0] if notes else None


def with_calibration(card: str, note: str) -> str:
    """The card with one line about the bundle's calibration: in place of the one it has, or below that of the
    recommended sampling, or in a section at its end."""
    note, lines = f"{CALIBRATED} {note}", card.split("\n")
    for beginning in (CALIBRATED, RECOMMENDED):
        for number, line in enumerate(lines):
            if line.startswith(beginning):
                lines[number : number + 1] = [note] if beginning == CALIBRATED else [line, note]
                return "\n".join(lines)
    return f"{card.rstrip()}\n\n## Calibration\n\n{note}\n"


def _data(config: TrainConfig, facts: RunFacts) -> str:
    lines = [f"- Data: `{facts.data_name}`, {facts.num_images:,} training images"]
    if config.data.holdout:
        lines.append(f"- Kept out of training: the last {config.data.holdout:,} images of the training split")
    if config.data.flip:
        lines.append("- Images are mirrored with probability one half")
    return "\n".join(lines)


def _start(facts: RunFacts) -> list[str]:
    lines: list[str] = []
    start: Any = facts.started_from
    # The latest of the runs before this one comes first.
    while start:
        run = start.get("training", {})
        known = "steps" in run and "batch_size" in run.get("optimization", {})
        images = f", which had {run['steps']:,} steps of {run['optimization']['batch_size']} images" if known else ""
        data = run.get("data", {}).get("name")
        source = f" of `{data}`" if known and data else ""
        how = "That was fine-tuned" if lines else "Fine-tuned"
        lines.append(f"- {how} from {start['name']} (`{start['model_id']}`){images}{source}")
        start = run.get("from")
    return lines


def _discriminative(config: TrainConfig) -> list[str]:
    options = config.optimization
    if not options.discriminative_weight:
        return []
    count = min(options.wrong_classes, config.flow.num_classes - 1)
    return [
        f"- Loss: −log p(x | y) − {options.discriminative_weight:g}·log p(y | x), the posterior estimated with "
        f"{count} wrong class{'' if count == 1 else 'es'} an image (hybrid objective, arXiv 2001.06448)"
    ]


def _training(config: TrainConfig, facts: RunFacts) -> str:
    options = config.optimization
    label_drop = f", label drop {options.label_drop:g}" if config.flow.num_classes else ""
    # What embeddings begin with counts where they begin; the published width is not worth a word.
    begins_wide = not facts.started_from and options.embedding_std != EMBEDDING_STD
    embeddings = f", embeddings of standard deviation {options.embedding_std:g} at first" if begins_wide else ""
    muon = ""
    if options.optimizer == "muon":
        ratio = options.muon_learning_rate / options.learning_rate
        muon = (
            f", Muon ({options.muon_momentum:g}) for the matrices of the layers with "
            f"{options.muon_learning_rate:g} to {options.final_learning_rate * ratio:.3g}"
        )
    unfinished = "" if facts.step >= facts.total_steps else f" of {facts.total_steps:,}: not finished"
    skipped = f"; {facts.skipped_steps} skipped as not finite" if facts.skipped_steps else ""
    lines = [
        *_start(facts),
        f"- Recipe: AdamW ({options.beta1:g}, {options.beta2:g}), weight decay {options.weight_decay:g}, "
        f"learning rate {options.learning_rate:g} to {options.final_learning_rate:g}{muon} (cosine, "
        f"{options.warmup_epochs:g} epochs of warm-up), batch {options.batch_size}, "
        f"gradient norm clipped at {options.clip_norm:g}, average of the weights with decay "
        f"{options.ema_decay:g}{label_drop}{embeddings}, seed {config.seed}",
        *_discriminative(config),
        f"- Steps: {facts.step:,}{unfinished} ({facts.images_seen:,} images, "
        f"{facts.images_seen / facts.num_images:.2f} epochs){skipped}",
        f"- Hardware: {facts.hardware}; PyTorch {facts.torch_version}, {_PRECISIONS[facts.precision]}",
        f"- Time in training steps: {duration(facts.seconds)} (h:mm:ss)",
    ]
    if facts.bits_per_dim is not None:
        lines.append(
            f"- Training bits/dim, by the same protocol as below: {facts.bits_per_dim:.4f} (mean over the last epoch "
            "as it trained, before averaging the weights" + (" and with dropped labels)" if label_drop else ")")
        )
    return "\n".join(lines)


_PRECISIONS = {"bf16": "bf16 autocast", "float32": "float32"}
