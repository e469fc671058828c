"""Inverting one block: x = z·exp(α(x)) + μ(x), where α and μ of a patch depend on the patches before it.

Gauss-Seidel over segments of n patches with the finished prefix in memory, Jacobi inside a segment: all its
patches are updated at once until they agree (GS-Jacobi, arXiv 2505.12849; whole sequence: arXiv 2505.24791).
After k passes the first k patches of a segment are exact, so n passes always suffice, and every pass starts
where the exact part ends; n = 1 is sequential decoding, and n = T − 1 the whole sequence at once.

A row stops when its own residual is small, and no row's iterates depend on another's. The residual is the
backward error of an iterate, |x − μ(x)|·exp(−α(x)) against z: by how much the block's latent would have to change
for the iterate to be its exact image. Values are never clamped; a row that is not finite stops at once.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from model.sampling.graphs import DecodeGraphs
from model.sampling.guided import Guidance
from model.sampling.kernel import BlockKernel, Memory
from model.sampling.rows import Rows


class _Passes:
    """Guided parameters of a set of rows, on memory that holds just them."""

    def __init__(self, kernel: BlockKernel, guidance: Guidance, memory: Memory) -> None:
        self.kernel, self.guidance, self.memory = kernel, guidance, memory
        self._offset_RW = kernel.offset(guidance.label_R)

    def affine(self, x_NBD: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """α and μ (N, B, D) of the patches that follow those at ``start``…``start + N − 1``."""
        guidance = self.guidance
        x_NRD = guidance.spread(x_NBD)
        out = self.kernel.run(x_NRD, start, self._offset_RW, guidance.inverse_temperature_R, self.memory)
        return guidance.combine(out, start + 1)


class BlockSolver:
    """Inverts the ``number``-th block of sampling for the rows of a batch, which may leave meanwhile."""

    def __init__(
        self,
        kernel: BlockKernel,
        rows: Rows,
        number: int,
        z_TBD: Tensor,
        memory: Memory,
        *,
        segment: int,
        residual_B: Tensor | None = None,
        guess_TBD: Tensor | None = None,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """``z_TBD`` is in the block's own order, like all here; ``memory`` has room for all passes of the rows.

        ``residual_B`` is where a row stops, ``guess_TBD`` where its iterations start; a segment of 1 needs neither,
        and may be decoded by ``graphs``.
        """
        memory = memory.first_layers(len(kernel.layers))
        self.rows, self.z_TBD, self.memory = rows, z_TBD, memory
        self.passes_B = torch.zeros(len(rows), dtype=torch.long, device=z_TBD.device)
        """Network passes that each row took part in."""
        self.history: list[tuple[int, int, int]] = []
        """Of every pass over a segment: its first patch, which pass of it (from 1), the rows that took part."""
        self._kernel, self._number, self._segment, self._graphs = kernel, number, segment, graphs
        self._residual_B = torch.zeros_like(self.passes_B) if residual_B is None else residual_B
        self._x_TBD = z_TBD.clone() if guess_TBD is None else torch.cat([z_TBD[:1], guess_TBD[1:]])
        self._passes = self._all_rows(memory)

    def _all_rows(self, memory: Memory) -> _Passes:
        return _Passes(self._kernel, Guidance(self.rows, self._number, self._kernel.block), memory)

    def run(self) -> Generator[float, Tensor | None, Tensor]:
        """Returns x (T, B, D). Yields after every pass the share of patches that are exact by then.

        Sending row indices keeps only those rows.
        """
        num_patches, start = len(self.z_TBD), 1
        if self._graphs is not None and self._segment == 1:
            start = yield from self._repeat(self._graphs)
        for first in range(start, num_patches, self._segment):
            end = min(first + self._segment, num_patches)
            if end - first > 1:
                yield from self._iterate(first, end)
                continue
            alpha, mu = self._passes.affine(self._x_TBD[first - 1 : first], first - 1)
            torch.addcmul(mu[0], self.z_TBD[first], alpha[0].exp(), out=self._x_TBD[first])
            self.passes_B += 1
            keep = yield first / (num_patches - 1)
            if keep is not None:
                self._keep(keep, first)
        return self._x_TBD

    def _repeat(self, graphs: DecodeGraphs) -> Generator[float, Tensor | None, int]:
        """Patches by captured steps, while all rows stay; returns the first that is left to do."""
        num_patches = len(self.z_TBD)
        with graphs.lend(self._kernel, self.rows, self._passes.guidance, self.z_TBD) as steps:
            if steps is None:
                return 1
            for first in range(1, num_patches):
                steps.advance()
                keep = yield first / (num_patches - 1)
                if keep is not None:
                    # Those that stay go on without graphs, on a copy of what they have in the buffers.
                    self._x_TBD, self.memory = steps.values(), steps.memory.first_layers(len(self._kernel.layers))
                    self.passes_B += first
                    self._keep(keep, first)
                    return first + 1
            self._x_TBD = steps.values()
            self.passes_B += num_patches - 1
            return num_patches

    def _keep(self, keep: Tensor, num_patches: int) -> None:
        """Forget all rows but those at ``keep``, and of their memory all but the first patches."""
        memory = self.memory.select(self._passes.guidance.network_rows(keep), num_patches)
        self.rows, self.memory, self.passes_B = self.rows.select(keep), memory, self.passes_B[keep]
        self.z_TBD, self._x_TBD, self._residual_B = self.z_TBD[:, keep], self._x_TBD[:, keep], self._residual_B[keep]
        self._passes = self._all_rows(memory)

    def _iterate(self, first: int, end: int) -> Generator[float, Tensor | None, None]:
        """Patches ``first``…``end − 1``, until every row's residual is small or all of them are exact."""
        active_A = torch.arange(len(self.rows), device=self.z_TBD.device)
        passes = self._passes
        for exact in range(first, end):
            alpha, mu = passes.affine(self._x_TBD[exact - 1 : end - 1, active_A], exact - 1)
            scale = alpha.exp()
            new_NAD = torch.addcmul(mu, self.z_TBD[exact:end, active_A], scale)
            change_NAD = (new_NAD - self._x_TBD[exact:end, active_A]).abs()
            residual_A = (change_NAD / scale).amax(dim=(0, 2))
            self._x_TBD[exact:end, active_A] = new_NAD
            self.passes_B[active_A] += 1
            self.history.append((first, exact - first + 1, len(active_A)))
            # What is not a number compares as false, so such a row stops here and is found at the end.
            continues_A = residual_A > self._residual_B[active_A]
            keep = yield exact / (len(self.z_TBD) - 1)
            if keep is not None:
                active_A, continues_A, passes = self._keep_active(keep, end, active_A, continues_A, passes)
            if exact == end - 1 or not bool(continues_A.any()):
                self._restore(passes, active_A, torch.arange(len(active_A), device=active_A.device), first - 1, end - 1)
                return
            if not bool(continues_A.all()):
                leaving_L = (~continues_A).nonzero().squeeze(1)
                staying_S = continues_A.nonzero().squeeze(1)
                self._restore(passes, active_A[leaving_L], leaving_L, first - 1, end - 1)
                active_A = active_A[staying_S]
                passes = self._some_rows(passes, active_A, staying_S, end)

    def _some_rows(self, passes: _Passes, rows_S: Tensor, index_S: Tensor, num_patches: int) -> _Passes:
        """Passes for the rows ``rows_S`` of the batch alone, which are ``index_S`` among those of ``passes``."""
        memory = passes.memory.select(passes.guidance.network_rows(index_S), num_patches)
        return _Passes(passes.kernel, Guidance(self.rows.select(rows_S), self._number, passes.kernel.block), memory)

    def _restore(self, passes: _Passes, rows_L: Tensor, index_L: Tensor, start: int, end: int) -> None:
        """What the memory of some rows has of a segment, for the memory of all: later segments look at it."""
        if passes is self._passes or end == len(self.z_TBD) - 1:
            return
        own = self._passes.guidance.network_rows(rows_L)
        self.memory.restore(passes.memory, own, passes.guidance.network_rows(index_L), start, end)

    def _keep_active(
        self, keep: Tensor, end: int, active_A: Tensor, continues_A: Tensor, passes: _Passes
    ) -> tuple[Tensor, Tensor, _Passes]:
        """:meth:`_keep` in the midst of a segment: the active rows that stay, by their new numbers."""
        place_B = torch.full((len(self.rows),), -1, device=keep.device)
        place_B[active_A] = torch.arange(len(active_A), device=keep.device)
        was_all = passes is self._passes
        self._keep(keep, end)
        staying = place_B[keep] >= 0
        active, index = staying.nonzero().squeeze(1), place_B[keep][staying]
        passes = self._passes if was_all else self._some_rows(passes, active, index, end)
        return active, continues_A[index], passes
