import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qpc.errors import QuantizerError
from qpc.quant.goethals_seidel import TURYN_TYPE
from qpc.quant.hadamard import block_size, block_within, factors, hadamard_matrix, hadamard_transform
from qpc.quant.rotation import Rotation
from tests.quant.published import INPUT_WIDTHS


@pytest.mark.parametrize("name", INPUT_WIDTHS)
def test_published_models_have_one_block(name: str) -> None:
    assert {features: block_size(features) for features in INPUT_WIDTHS[name]} == {features: features for features in INPUT_WIDTHS[name]}


@pytest.mark.parametrize(("features", "block"), [(1, 1), (7, 1), (17, 1), (22, 2), (3420, 684), (4304, 16)])
def test_sizes_without_a_matrix_fall_back(features: int, block: int) -> None:
    assert block_size(features) == block


@given(st.integers(1, 40000))
@settings(max_examples=50)
def test_block_divides_and_factors(features: int) -> None:
    block = block_size(features)
    base, power = factors(block)
    assert features % block == 0 and base * power == block and power & (power - 1) == 0
    assert block >= features & -features


@pytest.mark.parametrize(
    "order", [1, 2, 4, 12, 20, 28, 36, 40, 44, 52, 60, 76, 84, 100, 108, 140, 148, 180, 244, 336, 344, 428, 540, 684, 924]
)
def test_matrix_is_orthogonal(order: int) -> None:
    h = hadamard_matrix(order)
    assert h.dtype == torch.int8 and bool((h.abs() == 1).all())
    wide = h.double()
    assert torch.equal(wide @ wide.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("n", TURYN_TYPE)
def test_turyn_type_sequences(n: int) -> None:
    """Their weighted aperiodic autocorrelations cancel at every shift."""
    sequences = [torch.tensor([1 if sign == "+" else -1 for sign in text]) for text in TURYN_TYPE[n]]
    assert [len(s) for s in sequences] == [n, n, n, n - 1]
    for shift in range(1, n):
        assert sum(weight * int((s[shift:] * s[:-shift]).sum()) for weight, s in zip((1, 1, 2, 2), sequences, strict=True)) == 0


@given(st.integers(1, 40000), st.integers(1, 40000))
@settings(max_examples=50)
def test_limited_blocks_divide_features_and_limit(features: int, limit: int) -> None:
    block = block_within(features, limit)
    assert block <= limit and features % block == 0 and (block == block_size(features) or limit % block == 0)
    assert factors(block)
    assert block_within(features, None) == block_within(features, features) == block_size(features)


@pytest.mark.parametrize(("features", "limit", "block"), [(11008, 2752, 2752), (11008, 256, 256), (4096, 1024, 1024), (14336, 3584, 3584)])
def test_shards_hold_whole_blocks(features: int, limit: int, block: int) -> None:
    assert block_within(features, limit) == block


def test_a_limit_must_be_positive() -> None:
    with pytest.raises(QuantizerError, match="positive"):
        block_within(64, 0)


@pytest.mark.parametrize("order", [3, 6, 22, 92])
def test_unknown_order_is_refused(order: int) -> None:
    with pytest.raises(QuantizerError, match=str(order)):
        hadamard_matrix(order)
    with pytest.raises(QuantizerError):
        factors(order)


@pytest.mark.parametrize("features", [1, 2, 12, 24, 64, 256, 576, 2 * 344, 3 * 128, 7])
@pytest.mark.parametrize("transpose", [False, True])
def test_transform_equals_the_dense_matrix(features: int, transpose: bool) -> None:
    block = block_size(features)
    base, power = factors(block)
    dense = torch.kron(hadamard_matrix(base), hadamard_matrix(power)).double() / math.sqrt(block)
    x = torch.randn(2, 3, features, dtype=torch.float64)
    expected = x.reshape(2, 3, -1, block) @ (dense if transpose else dense.T)
    torch.testing.assert_close(hadamard_transform(x, block, transpose), expected.reshape(x.shape))


def test_block_must_divide() -> None:
    with pytest.raises(QuantizerError, match="features=6"):
        hadamard_transform(torch.zeros(6), 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_shape_are_kept(dtype: torch.dtype) -> None:
    x = torch.randn(2, 0, 24).to(dtype)
    assert hadamard_transform(x, 24).shape == x.shape
    y = torch.randn(24).to(dtype)
    back = hadamard_transform(hadamard_transform(y, 24), 24, transpose=True)
    assert back.dtype == dtype
    torch.testing.assert_close(back, y, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


class _Transform(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return hadamard_transform(x, 576)


def test_tracing() -> None:
    x = torch.randn(3, 5, 576)
    expected = _Transform()(x)
    with FakeTensorMode():
        assert _Transform()(torch.empty(3, 5, 576)).shape == x.shape
    torch.testing.assert_close(torch.compile(_Transform(), backend="aot_eager", fullgraph=True)(x), expected)
    for strict in (False, True):
        exported = torch.export.export(_Transform(), (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=strict)
        torch.testing.assert_close(exported.module()(x), expected)


def test_factors_made_in_inference_mode_serve_autograd() -> None:
    with torch.inference_mode():
        hadamard_transform(torch.zeros(52 * 4), 52 * 4)
    x = torch.randn(208, requires_grad=True)
    hadamard_transform(x, 208).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@given(st.integers(1, 700), st.integers(0, 100))
@settings(max_examples=30)
def test_rotation_inverts_and_keeps_products(features: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rotation = Rotation.random(features, generator)
    x, w = (torch.randn(3, features, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(rotation.invert(rotation.apply(x)), x)
    torch.testing.assert_close(rotation.apply(x) @ rotation.apply(w).T, x @ w.T)
    assert rotation.nbytes == Rotation.bytes_for(features)


@pytest.mark.parametrize(("block", "message"), [(5, "divisible"), (0, "divisible"), (92, "order 92")])
def test_rotation_refuses_blocks(block: int, message: str) -> None:
    with pytest.raises(QuantizerError, match=message):
        Rotation.random(184, torch.Generator(), block)


def test_rotation_in_blocks_mixes_no_further() -> None:
    rotation = Rotation.random(64, torch.Generator().manual_seed(0), 16)
    x = torch.zeros(64)
    x[20] = 1
    assert rotation.apply(x).nonzero().flatten().tolist() == list(range(16, 32))
