"""The guided affine parameters of a block for the rows of a batch: the map that sampling inverts.

An image's own pass and the pass that guidance compares with run together, as rows of one network pass;
rows without guidance take no second one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.flow import NO_CLASS, Block, at_least_float32
from model.guidance import guide_closed_form, guide_linear, patch_weights
from model.sampling.rows import Rows


class Guidance:
    """What one block's guidance needs of the rows: who is guided, labels and temperatures of all passes, weights."""

    def __init__(self, rows: Rows, number: int, block: Block) -> None:
        """For ``block``, the ``number``-th of sampling."""
        self.num_rows = len(rows)
        self.guided = rows.guided(number, block)
        self.all_guided = len(self.guided) == self.num_rows
        labels = rows.label_B
        self.inverse_temperature_R: Tensor | None = None
        if len(self.guided):
            labels = torch.cat([labels, torch.full_like(labels[self.guided], NO_CLASS)])
            temperature = torch.cat([torch.ones_like(rows.temperature_B), rows.temperature_B[self.guided]])
            if bool((temperature != 1).any()):
                self.inverse_temperature_R = 1 / temperature
        self.label_R = labels
        weight_BT = patch_weights(at_least_float32(rows.scale_B), rows.schedule_B, block.config.num_patches)[
            self.guided
        ]
        # (T, G, 2, 1): the weights of α and of μ, as the output layer has them side by side.
        self._weight = (weight_BT.t().unsqueeze(2) * rows.target_B2[self.guided]).unsqueeze(3)
        self._closed_form_G11 = rows.closed_form_B[self.guided].view(-1, 1)
        self._has_closed_form = bool(self._closed_form_G11.any())
        self._has_linear = not bool(self._closed_form_G11.all())

    @property
    def num_passes(self) -> int:
        """Rows R of a network pass: all images, and the guided ones once more."""
        return self.num_rows + len(self.guided)

    def network_rows(self, keep: Tensor) -> Tensor:
        """Where the images at ``keep`` are among the R rows of a network pass: their own, then the second ones."""
        place = torch.full((self.num_rows,), -1, device=keep.device)
        place[self.guided] = torch.arange(len(self.guided), device=keep.device)
        second = place[keep]
        return torch.cat([keep, self.num_rows + second[second >= 0]])

    def spread(self, x_NBD: Tensor) -> Tensor:
        """Values of the B images for the R rows of a network pass."""
        if not len(self.guided):
            return x_NBD
        return torch.cat([x_NBD, x_NBD if self.all_guided else x_NBD[:, self.guided]], dim=1)

    def combine(self, out: Tensor, first_patch: int) -> tuple[Tensor, Tensor]:
        """Guided α and μ (N, B, D) of the patches from ``first_patch`` on, from those of all passes, (N, R, 2, D)."""
        if not len(self.guided):
            return out[:, :, 0], out[:, :, 1]
        own, other = out[:, : self.num_rows], out[:, self.num_rows :]
        compared = own if self.all_guided else own[:, self.guided]
        result = self._guide(compared, other, self._weight[first_patch : first_patch + len(out)])
        if not self.all_guided:
            result = own.index_copy(1, self.guided, result)
        return result[:, :, 0], result[:, :, 1]

    def _guide(self, own: Tensor, other: Tensor, weight: Tensor) -> Tensor:
        """Both rules, where rows of both are present; all arguments (N, G, 2, D) or broadcast to it."""
        if not self._has_closed_form:
            return guide_linear(own, other, weight)
        closed = torch.stack(
            guide_closed_form(own[:, :, 0], own[:, :, 1], other[:, :, 0], other[:, :, 1], weight[:, :, 0]), dim=2
        )
        if not self._has_linear:
            return closed
        return torch.where(self._closed_form_G11.unsqueeze(2), closed, guide_linear(own, other, weight))
