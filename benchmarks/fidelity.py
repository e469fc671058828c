"""Do all solvers draw from the same distribution? Fréchet distances to real images, by solver and by seeds.

Run it with ``python -m benchmarks.fidelity [--data DIR] [--num-samples N] [--json]``. Sequential decoding, forced
Jacobi iteration and the plans of this device for a batch and for one image draw the same seeds, and sequential decoding
as many others. The verdict is whether the solvers' distances differ by less than those of the two sets of seeds.
Guidance is the bundle's; samples are not denoised unless asked for, since that could hide differences.

The standard error of a difference is the jackknife's: see :mod:`training.frechet`, whose distances are on features
named in the figure and not comparable with published FID.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import DEFAULT_BUNDLE
from benchmarks.report import environment, print_json, print_report
from benchmarks.timing import seconds
from model.bundle import Bundle, BundleError, read_bundle
from model.config import SamplingDefaults, SolverOptions
from model.denoise import denoise
from model.flow import Flow
from model.likelihood import to_pixels
from model.noise import latents
from model.sampling.costs import measure_costs
from model.sampling.plan import Plan
from model.sampling.rows import Rows, finish, make_rows
from model.sampling.sampler import Sampler
from model.weights import load_flow
from training.classes import match_labels
from training.data import Images, epoch_order, load_images
from training.features import EXTRACTORS, Extractor, load_extractor
from training.frechet import COMPONENTS, Figure, Moments, Reference

SEQUENTIAL = "sequential"
DATA = Path("/usr/share/datasets/fashion-mnist")
GREY_LEVELS = 127.5
"""Grey levels in one unit of the [-1, 1] scale."""
REAL_BATCH, DENOISED_ROWS = 256, 64


@dataclass
class Drawn:
    """What a solver drew so far."""

    features: list[Tensor] = field(default_factory=list)
    taken: float = 0.0
    """Seconds."""
    levels_off: float = 0.0
    """Largest distance from sequential decoding, in grey levels."""
    pixels_off: int = 0
    """8-bit values that differ from those of sequential decoding."""
    redone: int = 0
    """Rows that missed their tolerance and were decoded again."""
    backward_error: float = 0.0


@dataclass(frozen=True)
class Bench:
    """What all batches share."""

    bundle: Bundle
    sampler: Sampler
    extractor: Extractor
    setting: SamplingDefaults
    labels: list[int | None]
    """Class of sample i, at i modulo their number."""
    tolerance: float
    batch: int

    def batches(self, seeds: range) -> Iterator[Rows]:
        """The rows of all seeds, a batch at a time."""
        config, device = self.sampler.flow.config, self.sampler.flow.prior_variance.device
        for start in range(0, len(seeds), self.batch):
            some = seeds[start : start + self.batch]
            labels = [self.labels[seed % len(self.labels)] for seed in some]
            latent_BTD = latents(some, config.num_patches, config.patch_dim).to(device)
            yield make_rows(latent_BTD, labels, [self.setting] * len(some), self.tolerance)

    def chosen(self) -> dict[int, Plan]:
        """This device's plans for a batch and for one image."""
        rows = next(self.batches(range(self.batch)))
        options = SolverOptions(tolerance=self.tolerance)
        device = rows.label_B.device
        sizes = sorted({self.batch, 1}, reverse=True)
        return {size: self.sampler.plan(rows.select(torch.arange(size, device=device)), options) for size in sizes}

    def plans(self, chosen: dict[int, Plan]) -> dict[str, Plan]:
        """Sequential decoding, Jacobi iteration, and the chosen plans where they are something else."""
        flow = self.sampler.flow.config
        found = {SEQUENTIAL: Plan.sequential(flow), "jacobi": Plan.jacobi(flow, self.sampler.profile)}
        for size, plan in chosen.items():
            if plan.describe() not in [known.describe() for known in found.values()]:
                found[f"plan for {size}"] = plan
        return found

    def draw(self, rows: Rows, plan: Plan, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """A batch by one plan: its patches before denoising, and its 8-bit images, whose features are kept.

        Raises ``ValueError`` for values that are not finite.
        """
        flow = self.sampler.flow
        options = SolverOptions(tolerance=self.tolerance)
        taken, decoded = seconds(lambda: finish(self.sampler.decode(rows, options, plan=plan)), rows.latent_BTD.device)
        if not bool(torch.isfinite(decoded.x_BTD).all()):
            raise ValueError(f"{', '.join(plan.describe())}: samples have values that are not finite")
        x_BTD, noise = decoded.x_BTD, self.bundle.config.noise
        if self.setting.denoise:
            y_B = rows.label_B if flow.config.num_classes else None
            x_BTD = finish(denoise(flow, x_BTD, y_B, noise.std, DENOISED_ROWS))
        pixels = to_pixels(flow.unpatchify(x_BTD), noise.kind)
        drawn.features.append(self.extractor(pixels).cpu())
        drawn.taken += taken
        drawn.redone += int((decoded.redone_B != 0).sum())
        # Sequential images have no certificate.
        drawn.backward_error = max([drawn.backward_error, *decoded.backward_error_B.nan_to_num(0).tolist()])
        return decoded.x_BTD, pixels


def draw_all(bench: Bench, plans: dict[str, Plan], num_samples: int) -> tuple[dict[str, Drawn], Drawn]:
    """All plans on the first seeds, and sequential decoding on as many more."""
    drawn, again = {name: Drawn() for name in plans}, Drawn()
    started = time.perf_counter()

    def tell(text: str, result: Drawn) -> None:
        done = sum(len(features) for features in result.features)
        print(f"{text}: {done} of {num_samples} ({time.perf_counter() - started:.0f} s)", file=sys.stderr)

    for rows in bench.batches(range(num_samples)):
        exact, pixels = bench.draw(rows, plans[SEQUENTIAL], drawn[SEQUENTIAL])
        for name, plan in plans.items():
            if name == SEQUENTIAL:
                continue
            its, its_pixels = bench.draw(rows, plan, drawn[name])
            off = GREY_LEVELS * float((its - exact).abs().max())
            drawn[name].levels_off = max(drawn[name].levels_off, off)
            drawn[name].pixels_off += int((its_pixels != pixels).sum())
        tell("all solvers", drawn[SEQUENTIAL])
    for rows in bench.batches(range(num_samples, 2 * num_samples)):
        bench.draw(rows, plans[SEQUENTIAL], again)
        tell("other seeds", again)
    return drawn, again


def real_reference(images: Images, extractor: Extractor, device: torch.device, components: int) -> Reference:
    """The real images' features in their principal components."""
    real = Moments.of(torch.empty(0, extractor.num_features))
    for start in range(0, len(images), REAL_BATCH):
        pixels = torch.from_numpy(images.pixels[start : start + REAL_BATCH]).to(device)
        real = real + Moments.of(extractor(pixels).cpu())
    return Reference.fit(extractor.name, real, components)


def load_real(bundle: Bundle, directory: Path, most: int) -> Images:
    """Test images with the bundle's classes, a random choice where there are more."""
    flow = bundle.config.flow
    images = load_images(directory, "test", flow.image_size, flow.channels)
    if flow.num_classes:
        images = match_labels(images, bundle.config.class_names, bundle.name)
    kept = epoch_order(len(images), seed=0, epoch=0)[:most]
    return Images(images.pixels[kept], images.labels[kept], images.class_names)


def compare(arguments: argparse.Namespace, bundle: Bundle) -> dict[str, Any]:
    """Draw, measure, judge."""
    device = torch.device(arguments.device)
    if bundle.convergence is None:
        raise ValueError(f"{bundle.name} was not tuned, so its plan would be sequential; run tarflow tune")
    extractor = load_extractor(arguments.extractor, device)
    images = load_real(bundle, arguments.data, arguments.reference_images)
    print(f"features of {len(images)} real images", file=sys.stderr)
    reference = real_reference(images, extractor, device, arguments.components)
    if arguments.num_samples < reference.min_samples:
        raise ValueError(f"num_samples: got {arguments.num_samples}, allowed is at least {reference.min_samples}")
    flow: Flow = load_flow(bundle, device)
    sampler = Sampler(flow, bundle.convergence)
    sampler.costs = measure_costs(sampler.kernel, 2 * arguments.batch)
    bench = Bench(
        bundle=bundle,
        sampler=sampler,
        extractor=extractor,
        setting=replace(bundle.sampling, denoise=arguments.denoise),
        labels=[int(label) for label in images.labels] if flow.config.num_classes else [None],
        tolerance=arguments.tolerance,
        batch=arguments.batch,
    )
    bench.setting.check_fits(flow.config, bundle.config.noise)
    chosen = bench.chosen()
    plans = bench.plans(chosen)
    drawn, again = draw_all(bench, plans, arguments.num_samples)
    figures = {name: reference.measure(torch.cat(result.features)) for name, result in drawn.items()}
    exact, other_seeds = figures[SEQUENTIAL], reference.measure(torch.cat(again.features))
    between_seeds = abs(other_seeds.value - exact.value)
    between_solvers = max(abs(figure.value - exact.value) for figure in figures.values())
    values = arguments.num_samples * flow.config.num_dims
    return {
        "title": reference.title(arguments.num_samples),
        "model": bundle.name,
        "sampling": bench.setting.to_dict(),
        "tolerance": arguments.tolerance,
        "plans": {size: plan.describe() for size, plan in chosen.items()},
        "num_samples": arguments.num_samples,
        "solvers": [
            {
                "solver": name,
                "plan": plans[name].describe(),
                "seconds": result.taken,
                **describe(figures[name]),
                "difference": figures[name].value - exact.value,
                "difference_standard_error": (figures[name] - exact).standard_error,
                "max_difference_levels": result.levels_off,
                "different_pixels": result.pixels_off / values,
                "largest_backward_error": result.backward_error or None,
                "redone": result.redone,
            }
            for name, result in drawn.items()
        ],
        "other_seeds": {
            "solver": SEQUENTIAL,
            "seconds": again.taken,
            **describe(other_seeds),
            "difference": other_seeds.value - exact.value,
            "difference_standard_error": (exact.standard_error**2 + other_seeds.standard_error**2) ** 0.5,
        },
        "between_solvers": between_solvers,
        "between_seeds": between_seeds,
        "same_distribution": between_solvers < between_seeds,
    }


def describe(figure: Figure) -> dict[str, float]:
    """A distance, its standard error, and the distance as it is before the 1/n term is removed."""
    return {"distance": figure.value, "standard_error": figure.standard_error, "uncorrected": figure.uncorrected}


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="tuned bundle (default: the bundled)")
    parser.add_argument("--data", type=Path, default=DATA, help=f"real images, test split (default {DATA})")
    parser.add_argument("--num-samples", type=int, default=5000, help="samples of each solver (default 5000)")
    parser.add_argument("--reference-images", type=int, default=5000, help="real images, at most (default 5000)")
    parser.add_argument("--extractor", default="efficientnet-lite0", help=f"of {', '.join(EXTRACTORS)}")
    parser.add_argument("--components", type=int, default=COMPONENTS, help=f"of the features (default {COMPONENTS})")
    parser.add_argument(
        "--tolerance", type=float, default=SolverOptions.tolerance, help="backward error (default 1e-3)"
    )
    parser.add_argument("--denoise", action="store_true", help="denoise the samples")
    parser.add_argument("--batch", type=int, default=64, help="samples at once (default 64)")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    arguments = parser.parse_args()
    if arguments.batch < 1:
        parser.error("--batch: at least 1")
    try:
        result = compare(arguments, read_bundle(arguments.bundle))
    except (BundleError, ValueError) as error:
        parser.error(str(error))
    document = {"benchmark": "fidelity", "environment": environment(torch.device(arguments.device)), **result}
    if arguments.json:
        print_json(document)
        return
    _print(document)


def _print(document: dict[str, Any]) -> None:
    columns = ["", "distance", "±", "difference", "±", "levels off", "s"]
    other = document["other_seeds"] | {"solver": "other seeds"}
    rows = [
        [
            row["solver"],
            f"{row['distance']:.3f}",
            f"{row['standard_error']:.3f}",
            f"{row['difference']:+.4f}",
            f"{row['difference_standard_error']:.4f}",
            f"{row['max_difference_levels']:.4f}" if "max_difference_levels" in row else "",
            f"{row['seconds']:,.0f}",
        ]
        for row in [*document["solvers"], other]
    ]
    print_report(document["title"], document, columns, rows)
    print("difference: to sequential decoding of the first seeds; levels off: at most, in grey levels")
    for row in document["solvers"]:
        certificate = "no certificate"
        if row["largest_backward_error"]:
            certificate = f"largest backward error {row['largest_backward_error']:.1e}, {row['redone']} redone"
        print(
            f"{row['solver']} ({', '.join(row['plan'])}): {certificate}, "
            f"{row['different_pixels']:.2%} of 8-bit values differ"
        )
    for size, plan in document["plans"].items():
        print(f"plan of this device for a batch of {size}: {', '.join(plan)}")
    verdict = "less" if document["same_distribution"] else "NOT less"
    print(
        f"The solvers differ by {document['between_solvers']:.4f}, {verdict} than two sets of seeds of one solver "
        f"({document['between_seeds']:.4f})."
    )


if __name__ == "__main__":
    main()
