"""Uploaded images in recipes: what was changed to fit them, their names and sizes, and where needed their pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from model.images import Change
from service.api.uploads import Inputs


def inputs_to_wire(inputs: Inputs, *, pixels: bool = False) -> dict[str, Any]:
    """Plain data; ``pixels`` says whether the answer is about them."""
    kept = inputs.pixels if pixels else np.zeros((0,), np.uint8)
    changes = [[(change.code, change.message) for change in each] for each in inputs.changes]
    sizes = [list(size) for size in inputs.original_sizes]
    return {"pixels": kept, "changes": changes, "filenames": inputs.filenames, "original_sizes": sizes}


def inputs_from_wire(data: Mapping[str, Any]) -> Inputs:
    """Inverse of :func:`inputs_to_wire`; where pixels were left out there are none."""
    changes = [tuple(Change(code, message) for code, message in each) for each in data["changes"]]
    sizes = [(width, height) for width, height in data["original_sizes"]]
    return Inputs(data["pixels"], changes, data["filenames"], sizes)
