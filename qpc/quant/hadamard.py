"""Hadamard matrices of every order that a model is likely to need, and their fast transform.

A block of size n = base * power is transformed by `H_base (kron) H_power`: Sylvester's matrix for the power of two, Paley's first or second
construction (R. E. A. C. Paley, "On orthogonal matrices", 1933), that of `goethals_seidel`, or a product of such matrices for the rest.
"""

import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from qpc.errors import QuantizerError
from qpc.quant.goethals_seidel import turyn_length, turyn_matrix

MAX_BASE = 1024
"""Largest order that is applied as one dense factor besides the power of two."""

DENSE_POWER = 128
"""Largest Sylvester factor that is applied as one matrix product."""


@cache
def block_size(features: int) -> int:
    """Largest block that divides `features` and has a known Hadamard matrix; 1 for odd sizes."""
    base, power = _split(features)
    return base * power


def block_within(features: int, limit: int | None) -> int:
    """The block for `features` inputs of which no more than `limit` may be mixed; None is no limit.

    A smaller block than the inputs divides the limit too, so that a shard whose width is a multiple of the limit (tensor parallelism) holds
    whole blocks. Raises `QuantizerError` for a limit that is not positive.
    """
    if limit is not None and limit < 1:
        raise QuantizerError(f"a limit of the block must be positive, got {limit}")
    return block_size(features if limit is None or features <= limit else math.gcd(features, limit))


def factors(block: int) -> tuple[int, int]:
    """The pair (base, power) of a block: `H_block = H_base (kron) H_power`, with the smallest base and `power` a power of two.

    Raises `QuantizerError` where no matrix of this order is known.
    """
    base, power = _split(block)
    if base * power != block:
        raise QuantizerError(f"no Hadamard matrix of order {block} is known here; the largest order that divides it is {base * power}")
    return base, power


@cache
def hadamard_matrix(order: int) -> Tensor:
    """A Hadamard matrix: int8 [order, order] of +1 and -1 with `H H^T = order * I`.

    Raises `QuantizerError` where no matrix of this order is known.
    """
    with unset_fake_temporarily(), torch.inference_mode(False):
        return torch.from_numpy(_matrix(order))


def hadamard_transform(x: Tensor, block: int, transpose: bool = False) -> Tensor:
    """Multiply consecutive blocks of the last axis by the orthonormal Hadamard matrix: `y = H x / sqrt(block)`, or by its transpose.

    x: [..., features], a float dtype, `features` divisible by `block`. Half types are computed in float32; returns the dtype of `x`.
    """
    features = x.shape[-1]
    if features % block:
        raise QuantizerError(f"{features=} must be divisible by {block=}")
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    inner = 1
    for h in reversed(_constant_factors(block, transpose, wide, x.device)):
        if isinstance(x, FakeTensor):
            h = torch.ops.aten.lift_fresh_copy(h)
        order = h.shape[0]
        y = y.reshape(-1, order) @ h.T if inner == 1 else h @ y.reshape(-1, order, inner)
        inner *= order
    return y.reshape(x.shape).to(x.dtype)


def _split(features: int) -> tuple[int, int]:
    """The largest block of `features` as (base, power), with the smallest base among equals."""
    if features < 1:
        raise QuantizerError(f"{features=} must be positive")
    candidates = [(1, _power_of_two(features))]
    bases = [base for base in range(12, min(features, MAX_BASE) + 1, 4) if features % base == 0 and _known(base)]
    candidates += [(base, _power_of_two(features // base)) for base in bases]
    return max(candidates, key=lambda pair: (pair[0] * pair[1], -pair[0]))


def _power_of_two(n: int) -> int:
    return n & -n


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_factors(block: int, transpose: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """`_dense_factors`, as a constant of any graph that is being traced."""
    return _dense_factors(block, transpose, dtype, device)


@cache
def _dense_factors(block: int, transpose: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Orthonormal matrices whose Kronecker product transforms a block: the base, then powers of two of nearly equal size."""
    base, power = factors(block)
    exponent = power.bit_length() - 1
    count = -(-exponent // (DENSE_POWER.bit_length() - 1))
    powers = [1 << (exponent // count + (i < exponent % count)) for i in range(count)]
    with unset_fake_temporarily(), torch.inference_mode(False):
        dense = [hadamard_matrix(n).to(device=device, dtype=dtype) / math.sqrt(n) for n in (base, *powers) if n > 1]
        return tuple(h.T.contiguous() if transpose else h for h in dense)


@cache
def _known(order: int) -> bool:
    """Whether `_matrix` can build this order."""
    if order in (1, 2):
        return True
    if order % 4:
        return False
    constructions = (_prime_power(order - 1), _paley_second(order), turyn_length(order), _product(order))
    return any(found is not None for found in constructions)


@cache
def _matrix(order: int) -> NDArray[np.int8]:
    if order == 1:
        return np.ones((1, 1), dtype=np.int8)
    sylvester = np.array([[1, 1], [1, -1]], dtype=np.int8)
    if order == 2:
        return sylvester
    if not _known(order):
        raise QuantizerError(f"no Hadamard matrix of order {order} is known here")
    if (order & (order - 1)) == 0:
        return np.kron(sylvester, _matrix(order // 2))
    if _prime_power(order - 1) is not None:
        skew = _bordered(order - 1, below=-1)
        return skew + np.eye(order, dtype=np.int8)
    if (q := _paley_second(order)) is not None:
        symmetric = _bordered(q, below=1)
        return np.kron(symmetric, sylvester) + np.kron(np.eye(q + 1, dtype=np.int8), np.array([[1, -1], [-1, -1]], dtype=np.int8))
    if (n := turyn_length(order)) is not None:
        return turyn_matrix(n)
    left = _product(order)
    assert left is not None
    return np.kron(_matrix(left), _matrix(order // left))


def _paley_second(order: int) -> int | None:
    """The q of Paley's second construction, `order = 2 (q + 1)` with q = 1 mod 4 a prime power."""
    q = order // 2 - 1
    return q if order % 2 == 0 and q % 4 == 1 and _prime_power(q) is not None else None


def _product(order: int) -> int | None:
    """A factor of `order` such that it and the cofactor have matrices."""
    return next((d for d in range(2, math.isqrt(order) + 1) if order % d == 0 and _known(d) and _known(order // d)), None)


def _bordered(q: int, below: int) -> NDArray[np.int8]:
    """The Jacobsthal matrix of GF(q) with a first row of ones and a first column of `below`."""
    bordered = np.zeros((q + 1, q + 1), dtype=np.int8)
    bordered[0, 1:] = 1
    bordered[1:, 0] = below
    bordered[1:, 1:] = _jacobsthal(q)
    return bordered


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, n) with q = p^n, p an odd prime and n at most 3, or None."""
    for n in (1, 2, 3):
        p = round(q ** (1 / n))
        if p > 2 and p**n == q and all(p % d for d in range(2, math.isqrt(p) + 1)):
            return p, n
    return None


def _jacobsthal(q: int) -> NDArray[np.int8]:
    """The matrix chi(a - b) over GF(q), chi the quadratic character: 0 at zero, 1 at squares, -1 elsewhere.

    An element of GF(p^n) is the polynomial whose coefficients are the base-p digits of its index.
    """
    found = _prime_power(q)
    assert found is not None
    p, n = found
    place = p ** np.arange(n)
    digits = np.arange(q)[:, None] // place % p
    character = np.full(q, -1, dtype=np.int8)
    character[_squares(digits, p, n) @ place] = 1
    character[0] = 0
    return character[(digits[:, None] - digits[None]) % p @ place]


def _squares(digits: NDArray[np.int64], p: int, n: int) -> NDArray[np.int64]:
    """The square of each polynomial, modulo a monic irreducible polynomial of degree n."""
    product = np.zeros((len(digits), 2 * n - 1), dtype=np.int64)
    for i in range(n):
        product[:, i : i + n] += digits[:, i : i + 1] * digits
    tail = _irreducible(p, n)
    for degree in range(2 * n - 2, n - 1, -1):  # x^n = -tail(x)
        product[:, degree - n : degree] -= product[:, degree : degree + 1] * tail
        product %= p
    return product[:, :n] % p


def _irreducible(p: int, n: int) -> NDArray[np.int64]:
    """Lower coefficients of a monic irreducible polynomial: up to degree 3 it is enough that it has no root."""
    x = np.arange(p)
    for index in range(p**n):
        tail = index // p ** np.arange(n) % p
        if n == 1 or np.all((x**n + sum(tail[i] * x**i for i in range(n))) % p):
            return tail
    raise AssertionError("an irreducible polynomial of every degree exists")
