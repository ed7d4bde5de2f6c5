"""The Triton kernels against their oracles on a GPU, and the operators as models call them."""

from itertools import chain, islice

import pytest
import torch

from qpc.errors import KernelError
from qpc.kernels import ops, reference
from tests.kernels.packed import packed
from tests.kernels.tolerances import assert_close

PARTS = 12
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_match_oracles(part: int) -> None:
    """All comparisons, in parts that several workers can share."""
    from tests.kernels import large_batch_cases
    from tests.kernels.cases import FULL, cases

    torch.manual_seed(0)
    failures = []
    for name, check in islice(chain(cases(FULL), large_batch_cases.cases(quick=False)), part, None, PARTS):
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


def test_float64_has_no_kernel() -> None:
    weight = packed("trellis", 16, 16, [4], device="cuda")
    with pytest.raises(KernelError, match="float64"):
        ops.trellis_linear(torch.ones(1, 16, device="cuda", dtype=torch.float64), weight.codes, weight.scales, None, [4], 16, 16)
