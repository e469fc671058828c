"""Made-up profiles: how a model might converge, and what passes might cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from model.config import FlowConfig, SamplingDefaults
from model.sampling.plan import BlockConvergence, ConvergenceProfile, CostProfile, PassCost, segment_lengths

CONFIG = FlowConfig(
    image_size=8, channels=1, patch_size=2, width=16, num_blocks=3, layers_per_block=2, num_classes=3, head_dim=8
)
"""16 patches, three blocks: segments of 15, 8 and 4."""
SIZES = [1, 2, 4, 8, 15, 16]


def block(active: dict[int, Sequence[float]], igm_latent: float = 2.0, igm_zeros: float = 3.0) -> BlockConvergence:
    shares = {str(segment): tuple(values) for segment, values in active.items()}
    return BlockConvergence(crm=0.4, igm_latent=igm_latent, igm_zeros=igm_zeros, active=shares)


def all_need(passes: int, config: FlowConfig = CONFIG) -> BlockConvergence:
    """A block of which every row takes the same number of passes, or as many as the segment has patches."""
    return block({n: [1.0] * min(passes, n) for n in segment_lengths(config.num_patches)})


def profile_of(blocks: Sequence[BlockConvergence], floor: float = 1e-5) -> ConvergenceProfile:
    return ConvergenceProfile(
        blocks=tuple(blocks),
        gain=2.5,
        floor=floor,
        tolerance=1e-3,
        num_images=32,
        guidance=SamplingDefaults(guidance_scale=2).to_dict(),
    )


def costs_of(
    seconds: Callable[[int, int], float],
    rows: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128),
    patches: Sequence[int] = SIZES,
    threads: Callable[[int, int], int] = lambda rows, patches: 1,
) -> CostProfile:
    """Passes of so many rows and patches, with what they cost."""
    return CostProfile(
        [PassCost(rows=r, patches=p, seconds=seconds(r, p), threads=threads(r, p)) for p in patches for r in rows]
    )
