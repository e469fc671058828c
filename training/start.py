"""Fine-tuning: a run that begins with the weights of a bundle, of the package, of another run, or imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.bundle import Bundle
from model.config import check
from training.config import TrainConfig
from training.data import DataError, Images
from training.provenance import training_split


@dataclass(frozen=True)
class Start:
    """The bundle that a run begins with."""

    bundle: Bundle

    def __post_init__(self) -> None:
        codec = self.bundle.config.codec
        check(codec is None, "from", self.bundle.name, "a model of pixels, not one of the latents of a codec")

    @property
    def defaults(self) -> dict[str, Any]:
        """What a preset need not say about such a run: all that the bundle says about its model."""
        config = self.bundle.config
        # What it kept out stays new to the fine-tuned model.
        data = {
            name: config.training["data"][name]
            for name in ("holdout", "flip")
            if name in config.training.get("data", {})
        }
        return {
            "name": config.name,
            "flow": config.flow.to_dict(),
            "noise": config.noise.to_dict(),
            "class_names": config.class_names,
            "sampling": self.bundle.sampling.to_dict(),
            "data": data,
        }

    def knows(self, images: Images) -> bool:
        """Whether these are the training images that the bundle was trained on, with what it kept out."""
        try:
            training_split(self.bundle, images)
        except DataError:
            return False
        return True

    def check_fits(self, config: TrainConfig) -> None:
        """Refuse weights of another architecture, of other classes or of another space of noise.

        The noise itself may be another: how images are made continuous can be fine-tuned. Raises ``ValueError`` naming
        the field, what the bundle has and what the configuration asks for.
        """
        theirs, ours = self.bundle.config, config
        there, here = theirs.flow.to_dict(), ours.flow.to_dict()
        for name in sorted(there.keys() | here.keys()):
            of_bundle, allowed = getattr(theirs.flow, name), getattr(ours.flow, name)
            source = "data" if name == "num_classes" and ours.data.classes_from_data else "preset"
            check(
                of_bundle == allowed,
                f"from {self.bundle.name}: flow.{name}",
                of_bundle,
                f"{allowed!r}, as in the {source}",
            )
        space, allowed = theirs.noise.space, ours.noise.space
        check(space == allowed, f"from {self.bundle.name}: noise.space", space, f"{allowed!r}, as in the preset")
        named = theirs.class_names and ours.class_names
        check(
            not named or theirs.class_names == ours.class_names,
            f"from {self.bundle.name}: class_names",
            ", ".join(theirs.class_names),
            f"those of the preset, in their order: {', '.join(ours.class_names)}",
        )

    def check_holdout(self, config: TrainConfig, images: Images) -> None:
        """Refuse to keep images out that the bundle was trained on: they would be called new, and are not."""
        try:
            seen = len(training_split(self.bundle, images).trained_on)
        except DataError:
            # Other images than its own: nothing is known about them.
            return
        most = len(images) - seen
        allowed = f"at most {most}: {self.bundle.name} was trained on the other {seen} of these images"
        check(config.data.holdout <= most, "data.holdout", config.data.holdout, allowed)

    @property
    def provenance(self) -> dict[str, Any]:
        """What the configuration of the fine-tuned bundle says about it: which it was, and how that was trained."""
        record = self.bundle.config.training
        known = {"training": record} if record else {}
        return {"name": self.bundle.name, "model_id": self.bundle.model_id, **known}
