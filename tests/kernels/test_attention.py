"""`qpc::decode_attention`: its definition against PyTorch's attention, its contract, and its kernel for the GPUs that we name."""

import pytest
import torch
from torch.nn import functional

from qpc.errors import KernelError
from qpc.kernels.attention_ops import supports_attention
from tests.kernels.attention_cases import inputs

SIZES = (3, 4, 2, 16, 40, 25)


@pytest.mark.parametrize("window", [0, 7])
def test_equals_the_attention_of_pytorch(window: int) -> None:
    q, k, v, keys, values, position, starts, cos, sin = inputs(SIZES, True, torch.float64, "cpu")
    place = torch.arange(SIZES[4])
    there = (place <= position) & (place >= starts[:, None]) & ((place > position - window) | (window == 0))
    half = SIZES[3] // 2

    def turned(x: torch.Tensor) -> torch.Tensor:
        z = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)[:, None, :, :half]
        return torch.cat([z.real, z.imag], dim=-1)

    all_keys, all_values = keys.clone(), values.clone()
    all_keys[:, :, 25:26], all_values[:, :, 25:26] = turned(k), v
    expected = functional.scaled_dot_product_attention(
        turned(q), all_keys, all_values, attn_mask=there[:, None, None], scale=0.3, enable_gqa=True
    )
    found = torch.ops.qpc.decode_attention(q, k, v, keys, values, position, starts, cos, sin, 0.3, window)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(keys, all_keys, rtol=1e-12, atol=1e-12)
    assert torch.equal(values, all_values)


@pytest.mark.parametrize("rope", [False, True])
def test_is_a_sound_operator(rope: bool) -> None:
    torch.library.opcheck(torch.ops.qpc.decode_attention.default, (*inputs(SIZES, rope, torch.float32, "cpu"), 0.25, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 4, 2, 16)}, "heads, 1, width"),
        ({0: torch.zeros(3, 5, 1, 16)}, "multiple of heads"),
        ({1: torch.zeros(3, 2, 1, 8)}, "k is"),
        ({2: torch.zeros(3, 2, 1, 16).double()}, "v is"),
        ({3: torch.zeros(3, 2, 16, 40).mT}, "contiguous"),
        ({5: torch.zeros(1, dtype=torch.int64)}, "position"),
        ({6: torch.zeros(2, dtype=torch.int64)}, "starts"),
        ({8: None}, "together"),
        ({7: torch.zeros(3, 1, 8)}, "cos is"),
    ],
)
def test_arguments_are_checked(change: dict[int, object], message: str) -> None:
    given = list(inputs(SIZES, True, torch.float32, "cpu"))
    for index, value in change.items():
        given[index] = value  # type: ignore[call-overload]
    with pytest.raises(KernelError, match=message):
        torch.ops.qpc.decode_attention(*given, 0.25, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_heads_without_a_kernel_say_so() -> None:
    assert "power of two" in supports_attention(80, torch.bfloat16, torch.device("cuda")).reason


def test_the_cpu_takes_every_width() -> None:
    assert supports_attention(80, torch.float32, torch.device("cpu")).implementation is not None
