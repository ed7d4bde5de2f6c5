"""What the compiled model may cost: the one place where budgets are parsed, printed and turned into bytes.

Every field of `Budget` is one limit, `None` is no limit, and several limits hold together. A new kind of limit is one new field.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Union

from qpc.errors import BudgetError

BYTE_UNITS = {
    "B": 1,
    "kB": 1000,
    "KB": 1000,
    "KiB": 1 << 10,
    "MB": 1000**2,
    "MiB": 1 << 20,
    "GB": 1000**3,
    "GiB": 1 << 30,
    "TB": 1000**4,
    "TiB": 1 << 40,
}
"""Bytes in each unit of memory."""

RATE_UNITS = ("bit", "bits")
"""Units of an average rate; a number without a unit is one too."""

_NUMBER = re.compile(r"(?P<number>[+-]?(?:\d+/\d+|\d+\.?\d*|\.\d+))\s*(?P<unit>[^\W\d]*)", re.ASCII)
_EXAMPLES = "write for example '3.25', '13/4 bit', '80MB' or '4.2GiB'"


@dataclass(frozen=True)
class Budget:
    """Limits that the compiled model must keep.

    bits_per_weight: largest average over the linears that may be quantized, with everything that is stored for them: codes, scales, signs,
        padding.
    total_bytes: largest size of all tensors of the checkpoint, quantized or not.

    Raises `BudgetError` if no limit is set, or one is not positive.
    """

    bits_per_weight: Fraction | None = None
    total_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.bits_per_weight is None and self.total_bytes is None:
            raise BudgetError(f"a budget needs at least one limit; {_EXAMPLES}")
        for name, value in (("bits_per_weight", self.bits_per_weight), ("total_bytes", self.total_bytes)):
            if value is not None and value <= 0:
                raise BudgetError(f"{name}={value} must be positive")

    @staticmethod
    def parse(text: str) -> "Budget":
        """Read one limit, or several separated by commas: "3.25", "13/4 bit", "80MB", "3.25bit, 4.2GiB".

        A fraction of a byte is rounded down. Raises `BudgetError` for anything else.
        """
        limits: dict[str, Fraction | int] = {}
        for part in text.split(","):
            name, value = _limit(part.strip())
            if name in limits:
                raise BudgetError(f"budget {text!r} sets {name} twice")
            limits[name] = value
        return Budget(**limits)  # type: ignore[arg-type]

    @staticmethod
    def of(value: Union[float, int, str, Fraction, "Budget"]) -> "Budget":
        """A budget from whatever a user may pass; a plain number means bits per weight, exactly as it is written in decimals.

        Raises `BudgetError` if the value is no number, not finite or not positive.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            return Budget.parse(value)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise BudgetError(f"a budget cannot be a {type(value).__name__} ({value!r}); {_EXAMPLES}")
        if isinstance(value, (int, Fraction)):
            return Budget(bits_per_weight=Fraction(value))
        number = float(value)
        if not math.isfinite(number):
            raise BudgetError(f"a budget of {number} bits per weight is not finite; {_EXAMPLES}")
        return Budget(bits_per_weight=Fraction(repr(number)))

    def __str__(self) -> str:
        """The text that `parse` reads back as an equal budget."""
        limits = []
        if self.bits_per_weight is not None:
            limits.append(f"{_exact(self.bits_per_weight)}bit")
        if self.total_bytes is not None:
            limits.append(print_bytes(self.total_bytes))
        return ", ".join(limits)

    def weight_bytes(self, weights: int, other_bytes: int) -> int:
        """Bytes left for linears of `weights` weights in all, beside `other_bytes` of tensors that stay as they are; may be negative."""
        limits = []
        if self.bits_per_weight is not None:
            limits.append(math.floor(self.bits_per_weight * weights / 8))
        if self.total_bytes is not None:
            limits.append(self.total_bytes - other_bytes)
        return min(limits)

    def check(self, smallest: int, weights: int, other_bytes: int) -> None:
        """Raise `BudgetError` if even `smallest` bytes of linears do not fit; the message names the smallest budget that does.

        weights, other_bytes: as for `weight_bytes`.
        """
        if smallest <= self.weight_bytes(weights, other_bytes):
            return
        total = smallest + other_bytes
        rate = Fraction(math.ceil(Fraction(8 * smallest, max(weights, 1)) * 10_000), 10_000)
        sizes = f"{_exact(rate)}bit (linears alone, {smallest} bytes) or {print_bytes(total)} (the whole checkpoint)"
        feasible = f"the smallest feasible one is {sizes}"
        if self.total_bytes is not None and self.total_bytes < other_bytes:
            raise BudgetError(f"budget {self}: the tensors that are never quantized need {other_bytes} bytes alone; {feasible}")
        raise BudgetError(f"budget {self} is below the palette: {feasible}")


def print_bytes(count: int) -> str:
    """The largest unit that states this number of bytes as a whole number: 80000000 -> "80MB"."""
    unit = max((name for name in BYTE_UNITS if count % BYTE_UNITS[name] == 0), key=lambda name: BYTE_UNITS[name])
    return f"{count // BYTE_UNITS[unit]}{unit}"


def _limit(text: str) -> tuple[str, Fraction | int]:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise BudgetError(f"budget {text!r} is not a number with a unit; {_EXAMPLES}")
    try:
        number = Fraction(match["number"])
    except ZeroDivisionError:
        raise BudgetError(f"budget {text!r} divides by zero; {_EXAMPLES}") from None
    unit = match["unit"]
    if unit == "" or unit in RATE_UNITS:
        return "bits_per_weight", number
    if unit in BYTE_UNITS:
        return "total_bytes", math.floor(number * BYTE_UNITS[unit])
    raise BudgetError(f"budget {text!r} has an unknown unit {unit!r}; known: {', '.join((*RATE_UNITS, *BYTE_UNITS))}")


def _exact(value: Fraction) -> str:
    """A decimal if the value has a short one ("3.25"), else a fraction ("13/3")."""
    scaled = value * 10_000
    if scaled.denominator != 1:
        return str(value)
    whole, rest = divmod(scaled.numerator, 10_000)
    return f"{whole}.{rest:04d}".rstrip("0").rstrip(".")
