"""Comparisons of the attention kernel with its oracle, for the interpreter and for a GPU alike. Needs no test framework."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from qpc.kernels import attention, reference
from tests.kernels.packed import poisoned
from tests.kernels.tolerances import RELATIVE, assert_close, relative_error

Check = Callable[[str], None]

SMALL = ((1, 4, 2, 16, 70, 69), (2, 6, 2, 32, 40, 0), (3, 2, 2, 16, 300, 171))
FULL = (*SMALL, (1, 32, 8, 128, 1024, 128), (8, 32, 8, 128, 1024, 1023), (4, 20, 1, 64, 200, 150), (2, 8, 4, 256, 2048, 1500))
"""Sequences, query heads, heads, width, length, position."""


def cases(quick: bool) -> Iterator[tuple[str, Check]]:
    """Every comparison with its name."""
    turns = ((False, 0), (True, 20)) if quick else tuple(product((False, True), (0, 20)))
    dtypes = (torch.float32,) if quick else (torch.float32, torch.bfloat16, torch.float16)
    for sizes in SMALL if quick else FULL:
        for (rope, window), cut, dtype in product(turns, (PLANS[1], None) if quick else (*PLANS, None), dtypes):
            name = f"attention {sizes} {rope=} {window=} {cut} {dtype}"
            yield name, partial(compare, sizes, rope, window, cut, dtype)


PLANS = (attention.Plan(1, 4), attention.Plan(3, 4, 16, ahead=True), attention.Plan(9, 8, 64, ahead=True), attention.Plan(9, 4))


def inputs(sizes: tuple[int, ...], rope: bool, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Everything up to `sin`: q, k and v are views of one row, as a group of linears gives them; sequences start at different places."""
    batch, query_heads, heads, width, length, position = sizes
    draw = torch.Generator(device).manual_seed(0)
    row = torch.randn(batch, 1, (query_heads + 2 * heads) * width, generator=draw, device=device).to(dtype)
    parts = row.split([query_heads * width, heads * width, heads * width], dim=-1)
    q, k, v = (part.view(batch, 1, -1, width).transpose(1, 2) for part in parts)
    keys, values = (torch.randn(batch, heads, length, width, generator=draw, device=device).to(dtype) for _ in range(2))
    starts = torch.arange(batch, device=device) % (position + 1)
    angles = torch.rand(batch, 1, width // 2, generator=draw, device=device).repeat(1, 1, 2) * 6
    turn = (angles.cos().to(dtype), angles.sin().to(dtype)) if rope else (None, None)
    return q, k, v, keys, values, torch.tensor(position, device=device), starts, *turn  # type: ignore[return-value]


def compare(sizes: tuple[int, ...], rope: bool, window: int, cut: attention.Plan | None, dtype: torch.dtype, device: str) -> None:
    """Result, what is written, and what is left alone; twice, since counters must be as they were."""
    q, k, v, keys, values, position, starts, cos, sin = inputs(sizes, rope, dtype, device)
    expected_keys, expected_values = keys.clone(), values.clone()
    scale = sizes[3] ** -0.5
    expected = reference.decode_attention(q.double(), k, v, expected_keys, expected_values, position, starts, cos, sin, scale, window)
    keys[:, :, sizes[5] :] = torch.nan
    values[:, :, sizes[5] :] = torch.nan
    for _ in range(2):
        with poisoned():
            found = attention.attend(q, k, v, keys, values, position, starts, cos, sin, scale, window, cut)
        assert found.dtype == dtype and relative_error(found, expected) <= RELATIVE[dtype]
    at = sizes[5]
    assert_close(keys[:, :, : at + 1], expected_keys[:, :, : at + 1])
    assert torch.equal(values[:, :, : at + 1], expected_values[:, :, : at + 1])
    assert bool(keys[:, :, at + 1 :].isnan().all()) and bool(values[:, :, at + 1 :].isnan().all())
