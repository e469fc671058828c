"""STARFlow's options: blocks that do not see the class, another scale, and bundles from before there were options."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from model.bundle import BUNDLED, BundleConfig
from model.config import FlowConfig, NoiseProtocol, SamplingDefaults, SolverOptions
from model.flow import Flow, affine_parameters
from model.sampling.convergence import measure_convergence
from model.sampling.costs import measure_costs
from model.sampling.plan import CostProfile, Plan
from model.sampling.rows import finish
from model.sampling.sampler import Sampler
from model.weights import load_flow, write_bundle
from tests.model.conftest import TINY, tiny_flow
from tests.model.sampling.captures import CountingCapture, graphed
from tests.model.sampling.cases import (
    DEEP_SHALLOW,
    PLAIN,
    ROUNDING,
    case_of,
    decode,
    distance,
    mixed_options,
    sequential,
    tough_flow,
    whole_plan,
)
from tests.model.sampling.profiles import all_need, costs_of, profile_of

VALUES = (-60.0, -7.0, -1.0, 0.0, 0.5, 3.0, 40.0)


def config(**changes: object) -> FlowConfig:
    return FlowConfig.from_dict({**TINY, **changes})


def scalar_parameters(value: float, function: str, clip: float) -> tuple[float, float]:
    """α and μ where the network gives ``value`` for both, one number after another."""
    if clip:
        value = clip * math.tanh(value / clip)
    alpha = value if function == "exp" else math.log(math.log1p(math.exp(value + math.log(math.e - 1))))
    return alpha, value


class TestParameters:
    @pytest.mark.parametrize("function", ["exp", "softplus"])
    @pytest.mark.parametrize("clip", [0.0, 0.5, 4.0])
    def test_are_those_of_the_formulas(self, function: str, clip: float) -> None:
        values = torch.tensor([VALUES + VALUES], dtype=torch.float64)
        found = affine_parameters(values, config(scale_function=function, soft_clip=clip))
        expected = torch.tensor([scalar_parameters(value, function, clip) for value in VALUES]).double().t()
        assert found.shape == (1, 2, len(VALUES))
        torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("function", ["exp", "softplus"])
    @pytest.mark.parametrize("clip", [0.0, 3.0])
    def test_a_new_flow_starts_next_to_the_identity(self, function: str, clip: float) -> None:
        flow = Flow(config(scale_function=function, soft_clip=clip))
        for block in flow.blocks:
            torch.nn.init.zeros_(block.proj_out.bias)
        x_BTD = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))
        z_BTD, logdet_B = flow(x_BTD)
        torch.testing.assert_close(z_BTD, x_BTD, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(logdet_B, torch.zeros(2), atol=1e-4, rtol=0)

    def test_softplus_has_a_logarithm_and_a_gradient_wherever_it_is(self) -> None:
        values = torch.tensor([-1e4, -200.0, -90.0, 90.0, 1e4, 0.0], requires_grad=True)
        parameters = affine_parameters(values, config(scale_function="softplus"))
        assert torch.isfinite(parameters).all()
        parameters.sum().backward()
        assert values.grad is not None
        assert torch.isfinite(values.grad).all()
        # It grows as the logarithm of the value, where the exponential function's α is the value.
        assert parameters[0, -1].item() < math.log(100)

    @pytest.mark.parametrize("volume_preserving", [False, True])
    def test_a_soft_clip_bounds_scale_and_shift(self, volume_preserving: bool) -> None:
        flow = tiny_flow(soft_clip=0.2, volume_preserving=volume_preserving)
        for block in flow.blocks:
            block.proj_out.weight.mul_(1000)
            alpha, mu = block.affine(torch.randn(2, 16, 4).double(), None)
            assert alpha.abs().max() <= 0.2
            assert 0.19 < mu.abs().max() <= 0.2
            assert bool(alpha.any()) is not volume_preserving


class TestUnconditionedBlocks:
    def test_have_no_embedding_and_ignore_the_class(self) -> None:
        flow = tiny_flow(**DEEP_SHALLOW)
        x_BTD = torch.randn(2, 16, 4).double()
        for block, sees_it in zip(flow.blocks, (False, False, True), strict=True):
            assert (block.class_embedding is not None) is block.conditioned is sees_it
            z_BTD, _ = block(x_BTD[:1].expand(2, -1, -1), torch.tensor([0, 1]))
            assert (distance(z_BTD[0], z_BTD[1]) > 1e-3) is sees_it
        assert "blocks.0.class_embedding" not in flow.state_dict()

    def test_without_classes_no_block_is_conditioned(self) -> None:
        flow = tiny_flow(num_classes=0, conditioned_blocks=(2,))
        assert [block.conditioned for block in flow.blocks] == [False] * 3

    @pytest.mark.parametrize("plan", [None, "jacobi"])
    def test_the_second_pass_that_is_left_out_would_change_nothing(self, plan: str | None) -> None:
        """The same weights with a class of zeros in the other blocks: there it is taken, and compared with itself."""
        flow = tough_flow(2.0, **DEEP_SHALLOW)
        everywhere = Flow(config(**{**DEEP_SHALLOW, "conditioned_blocks": None})).double()
        zeros = {name: torch.zeros_like(value) for name, value in everywhere.state_dict().items()}
        everywhere.load_state_dict({**zeros, **flow.state_dict()})
        everywhere.eval().requires_grad_(False)
        options = mixed_options(3)
        spared, full = case_of(flow, options, 1e-9), case_of(everywhere, options, 1e-9)
        how = whole_plan(flow) if plan else Plan.sequential(flow.config)
        assert distance(decode(spared, how).x_BTD, decode(full, how).x_BTD) < (1e-7 if plan else ROUNDING)
        # Blocks in the order of sampling, the deep one first: rows that take part twice.
        twice = [
            [len(case.rows().guided(number, block)) for number, block in enumerate(reversed(case.flow.blocks))]
            for case in (spared, full)
        ]
        assert twice[1] == [5, 4, 5]
        # Left are the two rows whose second pass has another temperature.
        assert twice[0] == [5, 2, 2]

    def test_a_temperature_still_guides_them(self) -> None:
        flow = tough_flow(2.0, **DEEP_SHALLOW)
        tempered = SamplingDefaults(guidance_scale=1.5, attention_temperature=0.5, guidance_window=(1, 3))
        case = case_of(flow, [PLAIN, tempered])
        same = case_of(flow, [PLAIN, PLAIN])
        assert [case.rows().guided(n, flow.blocks[-1 - n]).tolist() for n in range(3)] == [[], [1], [1]]
        images, plain = sequential(case), sequential(same)
        assert distance(images[0], plain[0]) < ROUNDING
        assert distance(images[1], plain[1]) > 1e-3

    def test_guidance_works_through_the_deep_block_alone(self) -> None:
        flow = tough_flow(2.0, **DEEP_SHALLOW)
        deep = SamplingDefaults(guidance_scale=2.0, guidance_window=(0, 1))
        case = case_of(flow, [PLAIN, SamplingDefaults(guidance_scale=2.0)])
        windowed = case_of(flow, [PLAIN, deep])
        assert distance(sequential(case), sequential(windowed)) < ROUNDING
        assert distance(sequential(case)[1], sequential(case_of(flow, [PLAIN, PLAIN]))[1]) > 1e-3


class TestDepth:
    """Blocks of different depth: what is chosen, and how far the work is."""

    def test_captured_steps_decode_what_the_kernels_do(self) -> None:
        flow, capture = tough_flow(2.0, **DEEP_SHALLOW), CountingCapture()
        case = case_of(flow, mixed_options(3))
        sampler = graphed(flow, capture)
        found = finish(sampler.decode(case.rows(), SolverOptions(solver="sequential")))
        assert sampler.graphs is not None
        assert sampler.graphs.reason is None
        assert capture.repeated >= 3 * 15
        assert distance(found.x_BTD, sequential(case)) < ROUNDING

    def test_is_tuned_and_costed_as_any_other(self) -> None:
        flow = tough_flow(1.0, dtype=torch.float32, **DEEP_SHALLOW)
        guidance = SamplingDefaults(guidance_scale=1.0)
        case = case_of(flow, [guidance] * 4, dtype=torch.float32)
        images = sequential(case_of(flow, [PLAIN] * 4, dtype=torch.float32))
        sampler = Sampler(flow)
        steps = measure_convergence(sampler, case.rows(), images, case.label_tensor(), guidance, 1e-3)
        profile = finish(steps)
        profile.check_fits(flow.config)
        assert sum(block.crm for block in profile.blocks) == pytest.approx(1)
        costs = measure_costs(sampler.kernel, 4)
        plan = Sampler(flow, profile, costs).plan(case.rows(), SolverOptions())
        assert len(plan.blocks) == 3
        assert distance(decode(case, plan).x_BTD, sequential(case)) < 0.1

    def test_a_shallow_block_uses_its_own_layers_of_the_memory_alone(self) -> None:
        flow = tough_flow(1.0, layers_per_block=(1, 1, 4))
        case = case_of(flow, mixed_options(3), [1e-1, 1e-9] * 4)
        assert distance(decode(case, whole_plan(flow), SolverOptions(certify=False)).x_BTD, sequential(case)) < 0.5
        assert distance(decode(case, whole_plan(flow)).x_BTD[1::2], sequential(case)[1::2]) < 1e-7

    def test_progress_counts_layers(self) -> None:
        flow = tiny_flow(layers_per_block=(1, 1, 4))
        progress = list(Sampler(flow).decode(case_of(flow, [PLAIN]).rows(), SolverOptions(solver="sequential")))
        ends = [step.fraction for step in progress[14::15]]
        assert ends == pytest.approx([4 / 6, 5 / 6, 1])
        assert ends[-1] == 1

    def test_the_price_of_a_plan_is_that_of_the_rows_of_each_block(self) -> None:
        flow = tough_flow(1.0, **DEEP_SHALLOW)
        asked: list[float] = []

        class Counting(CostProfile):
            def seconds(self, rows: float, patches: int) -> float:
                if patches == 1:
                    asked.append(rows)
                return super().seconds(rows, patches)

        guided = [SamplingDefaults(guidance_scale=1.0)] * 3
        costs = Counting(costs_of(lambda rows, patches: float(rows * patches)).costs)
        sampler = Sampler(flow, profile_of([all_need(15)] * 3), costs)
        assert sampler.plan(case_of(flow, guided).rows(), SolverOptions()).is_sequential
        # Sequential decoding of the deep block takes both passes, that of the others one.
        assert {6.0, 3.0} <= set(asked)
        assert max(asked[len(asked) // 2 :]) <= 3.0

    def test_a_pass_through_a_shallow_block_takes_more_rows(self) -> None:
        flow = tough_flow(1.0, layers_per_block=(1, 1, 4))
        costs = costs_of(lambda rows, patches: 0.02 / 4 * rows)
        case = case_of(flow, [PLAIN] * 16)
        slices: dict[int, int] = {0: 0, 1: 0, 2: 0}
        sampler = Sampler(flow, None, costs)
        for step in sampler.decode(case.rows(), SolverOptions(certify=False), plan=whole_plan(flow)):
            if step.stage == "blocks":
                slices[step.block] += 1
        # Four rows at a time through the deep block, all sixteen through the others.
        assert slices[0] > 2 * max(slices[1], slices[2])


class TestStored:
    @pytest.mark.parametrize("path", sorted(BUNDLED.iterdir()), ids=lambda path: path.name)
    def test_configurations_from_before_the_options_keep_their_bytes(self, path: Path) -> None:
        data = (path / "config.json").read_bytes()
        assert BundleConfig.from_json(data, path).to_json() == data

    def test_what_is_chosen_is_stored_and_nothing_else(self) -> None:
        assert "soft_clip" not in config().to_dict()
        chosen = config(**DEEP_SHALLOW)
        stored = json.loads(json.dumps(chosen.to_dict()))
        assert stored["conditioned_blocks"] == [2]
        assert (stored["scale_function"], stored["soft_clip"]) == ("softplus", 1.5)
        assert FlowConfig.from_dict(stored) == chosen

    def test_a_bundle_of_it_decodes_to_the_same_images(self, tmp_path: Path) -> None:
        flow = tough_flow(1.0, dtype=torch.float32, **DEEP_SHALLOW)
        description = BundleConfig(
            name="deep",
            flow=flow.config,
            noise=NoiseProtocol(kind="gaussian", std=0.1),
            class_names=("a", "b", "c"),
        )
        bundle = write_bundle(tmp_path / "deep", description, flow, SamplingDefaults(guidance_scale=1.0), "# deep\n")
        again = load_flow(bundle)
        assert again.config == flow.config
        options = [bundle.sampling] * 3
        images = [
            finish(Sampler(f).decode(case_of(f, options, dtype=torch.float32).rows())).x_BTD for f in (flow, again)
        ]
        assert torch.equal(*images)
