"""The Triton kernels against their oracles on a GPU, and the operators as models call them."""

import re
from dataclasses import replace
from itertools import chain, islice

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.nn import functional

from qpc.errors import KernelError
from qpc.inductor.hook import register
from qpc.kernels import expert_ops, ops, reference
from qpc.kernels.gate import Activation
from qpc.kernels.linear import QuantizedLinear
from qpc.quant.rotation import Rotation
from qpc.quant.trellis import TrellisQuantizer
from tests.kernels.packed import packed
from tests.kernels.rounding import settled
from tests.kernels.tolerances import assert_close

PARTS = 12
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_match_oracles(part: int) -> None:
    """All comparisons, in parts that several workers can share."""
    from tests.kernels import attention_cases, large_batch_cases
    from tests.kernels.cases import FULL, cases

    torch.manual_seed(0)
    failures = []
    for name, check in islice(
        chain(cases(FULL), large_batch_cases.cases(quick=False), attention_cases.cases(quick=False)), part, None, PARTS
    ):
        try:
            check("cuda")
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("family", ["trellis", "scalar"])
def test_operator_in_a_compiled_graph(family: str) -> None:
    weight = packed(family, 96, 160, [4, 3], device="cuda")
    operator = ops.trellis_linear if family == "trellis" else ops.scalar_linear
    arguments = (weight.codes, weight.scales, None, *weight.format, 96)
    x = torch.randn(2, 3, 160, device="cuda")
    compiled = torch.compile(lambda value: operator(value, *arguments) + 1, fullgraph=True)
    with torch.inference_mode():
        expected = reference.linear(x, weight.codes, weight.scales, None, weight.quantizers, 96) + 1
        assert_close(compiled(x), expected)


@pytest.mark.parametrize("batch", [1, 5, 16, 17])
def test_module_in_a_compiled_graph_and_a_cuda_graph(batch: int) -> None:
    """By whichever operators it takes on this GPU."""
    weight = torch.randn(100, 512, generator=torch.Generator().manual_seed(0))
    rotation = Rotation.random(512, torch.Generator().manual_seed(1))
    stored = replace(TrellisQuantizer(4, 12).quantize(rotation.apply(weight)), rotation=rotation)
    module = QuantizedLinear.from_packed(stored).to("cuda")
    x = torch.randn(batch, 512, device="cuda").bfloat16()
    expected = (x.double() @ stored.restored().double().cuda().T).bfloat16()
    with torch.inference_mode():
        assert_close(module(x), expected)
        assert_close(torch.compile(module, fullgraph=True, dynamic=False)(x), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = module(x)
        for _ in range(3):
            captured.fill_(float("nan"))
            graph.replay()
            assert_close(captured, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [8, 13, 16])
def test_a_gated_activation_in_a_compiled_graph_and_a_cuda_graph(batch: int, dtype: torch.dtype) -> None:
    """Gate and up are read where they lie, as halves of what one multiplication made."""
    from tests.kernels.operand_cases import assert_operand

    both = 3 * torch.randn(batch, 1, 2 * 1024, device="cuda").to(dtype)
    both[..., :1024] = settled(both[..., :1024], Activation.SILU)
    signs = torch.randint(0, 256, (128,), dtype=torch.uint8, device="cuda")
    gate, up = both.reshape(batch, -1).chunk(2, -1)
    expected = reference.rotate(reference.gated(gate, up, Activation.SILU).double(), signs, 1024)

    def operand(value: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = value.chunk(2, -1)
        words, scales = torch.ops.qpc.rotate_operand(functional.silu(gate) * up, signs, 1024)
        return words, scales

    register()
    compiled = torch.compile(operand, fullgraph=True, dynamic=False)
    with torch.inference_mode():
        found, (code,) = run_and_get_code(lambda: compiled(both, signs))
        assert "gated_operand" in code and not re.search(r"triton_\w*fused", code), "one launch, and no copies of gate and up"
        assert_operand(found, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = compiled(both, signs)
        for _ in range(3):
            captured[0].fill_(-1)
            captured[1].fill_(float("nan"))
            graph.replay()
            assert_operand(captured, expected)


@pytest.mark.parametrize("rows", [1, 6, 40])
def test_a_stack_of_experts_eagerly_and_in_a_cuda_graph(rows: int) -> None:
    """40 rows are multiplied expert by expert, but row by row while a graph is recorded."""
    experts, each = 3, 64
    weight = packed("trellis", experts * each, 160, [4, 3], device="cuda")
    x, expert = torch.randn(rows, 160, device="cuda").bfloat16(), torch.randint(0, experts, (rows,), device="cuda")
    whole = reference.linear(x, weight.codes, weight.scales, None, weight.quantizers, experts * each)
    expected = whole.view(rows, experts, each)[torch.arange(rows, device="cuda"), expert]
    arguments = (x, weight.codes, weight.scales, expert, *weight.format, each, experts)
    assert_close(expert_ops.trellis_expert_linear(*arguments), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = expert_ops.trellis_expert_linear(*arguments)
    captured.fill_(float("nan"))
    graph.replay()
    assert_close(captured, expected)


def test_float64_has_no_kernel() -> None:
    weight = packed("trellis", 16, 16, [4], device="cuda")
    with pytest.raises(KernelError, match="float64"):
        ops.trellis_linear(torch.ones(1, 16, device="cuda", dtype=torch.float64), weight.codes, weight.scales, None, *weight.format, 16)
