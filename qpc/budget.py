"""What the compiled model may cost: the one place where budgets are parsed, printed and turned into bytes.

Every field of `Budget` is one limit, `None` is no limit, and several limits hold together. A new kind of limit is one new field.
"""

import math
import re
from dataclasses import dataclass, fields, replace
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

LOSS_UNITS = ("nat", "nats")
"""Units of a predicted KL divergence per token."""

MOST_RATES = 200
"""Budgets in one range."""

_NUMBER = re.compile(r"(?P<number>[+-]?(?:\d+/\d+|\d+\.?\d*|\.\d+))\s*(?P<unit>[^\W\d]*)", re.ASCII)
_EXAMPLES = "write for example '3.25', '13/4 bit', '80MB', '4.2GiB' or '0.1nats'"


@dataclass(frozen=True)
class Budget:
    """Limits that the compiled model must keep.

    bits_per_weight: largest average over the linears that may be quantized, with everything that is stored for them: codes, scales, signs,
        padding.
    total_bytes: largest size of all tensors of the checkpoint, quantized or not.
    kl_nats: largest predicted KL divergence per token. With it the smallest model that keeps all limits is sought, without it the least
        predicted loss.

    Raises `BudgetError` if no limit is set, or one is not positive.
    """

    bits_per_weight: Fraction | None = None
    total_bytes: int | None = None
    kl_nats: Fraction | None = None

    def __post_init__(self) -> None:
        limits = {field.name: getattr(self, field.name) for field in fields(self)}
        if all(value is None for value in limits.values()):
            raise BudgetError(f"a budget needs at least one limit; {_EXAMPLES}")
        for name, value in limits.items():
            if value is not None and value <= 0:
                raise BudgetError(f"{name}={value} must be positive")

    @staticmethod
    def parse(text: str) -> "Budget":
        """Read one limit, or several separated by commas: "3.25", "13/4 bit", "80MB", "0.1nats", "4bit, 4.2GiB, 0.1nats".

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
        if self.kl_nats is not None:
            limits.append(print_nats(self.kl_nats))
        return ", ".join(limits)

    @property
    def loss(self) -> float | None:
        """The limit on the predicted KL as the largest float that does not exceed it [nats]."""
        if self.kl_nats is None:
            return None
        nearest = float(self.kl_nats)
        return nearest if Fraction(nearest) <= self.kl_nats else math.nextafter(nearest, 0.0)

    def weight_bytes(self, weights: int, other_bytes: int) -> int | None:
        """Bytes left for linears of `weights` weights in all, beside `other_bytes` of tensors that stay as they are; may be negative.

        None if no limit is one on size.
        """
        limits = []
        if self.bits_per_weight is not None:
            limits.append(math.floor(self.bits_per_weight * weights / 8))
        if self.total_bytes is not None:
            limits.append(self.total_bytes - other_bytes)
        return min(limits, default=None)

    def refusal(self, weights: int, other_bytes: int, *, least_bytes: int | None = None, least_kl: float | None = None) -> BudgetError:
        """The error for limits that no allocation keeps. Each budget that it names is feasible with the other limits as they are.

        weights, other_bytes: as for `weight_bytes`. least_bytes: of the linears; least_kl [nats]: the least that can be had while the
        limits of the other kind are kept, None where they cannot be.
        """
        sizes = "" if least_bytes is None else self._sizes(least_bytes, weights, other_bytes)
        if self.kl_nats is None:
            if self.total_bytes is not None and self.total_bytes < other_bytes:
                reason = f": the tensors that are never quantized need {other_bytes} bytes alone"
                return BudgetError(f"budget {self}{reason}; the smallest feasible one is {sizes}")
            return BudgetError(f"budget {self} is below the palette: the smallest feasible one is {sizes}")
        size = replace(self, kl_nats=None) if self.weight_bytes(weights, other_bytes) is not None else None
        feasible = []
        if sizes:
            feasible.append(f"with {print_nats(self.kl_nats)} the smallest feasible size is {sizes}")
        if least_kl is not None:
            within = f"within {size} " if size is not None else ""
            feasible.append(f"{within}the least feasible KL is {print_nats(_rounded_up(least_kl))}")
        return BudgetError(f"budget {self} cannot be kept: {'; '.join(feasible) or 'each limit is out of reach on its own'}")

    @staticmethod
    def _sizes(least_bytes: int, weights: int, other_bytes: int) -> str:
        rate = Fraction(math.ceil(Fraction(8 * least_bytes, max(weights, 1)) * 10_000), 10_000)
        total = print_bytes(least_bytes + other_bytes)
        return f"{_exact(rate)}bit (linears alone, {least_bytes} bytes) or {total} (the whole checkpoint)"


def rates(text: str, step: str) -> tuple[Fraction, ...]:
    """The rates of a range "2.5..4.5" [bits per weight], from its start in equal steps, its end included; a single rate alone.

    Raises `BudgetError` for anything else, or more than `MOST_RATES`.
    """
    ends = [_rate(end) for end in text.split("..")]
    width = _rate(step)
    if len(ends) == 1:
        return (ends[0],)
    if len(ends) > 2 or ends[0] > ends[1]:
        raise BudgetError(f"{text!r} is no range of bits per weight; write for example '2.5..4.5'")
    count = (ends[1] - ends[0]) / width
    if count > MOST_RATES - 1:
        raise BudgetError(f"{text!r} in steps of {step} has more than {MOST_RATES} budgets; take larger steps")
    found = [ends[0] + index * width for index in range(math.floor(count) + 1)]
    return (*found, ends[1]) if found[-1] < ends[1] else tuple(found)


def print_nats(value: Fraction) -> str:
    """A predicted KL, exactly: "0.1nats"."""
    return f"{_exact(value, digits=12)}nats"


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
    if unit in LOSS_UNITS:
        return "kl_nats", number
    raise BudgetError(f"budget {text!r} has an unknown unit {unit!r}; known: {', '.join((*RATE_UNITS, *BYTE_UNITS, *LOSS_UNITS))}")


def _rate(text: str) -> Fraction:
    rate = Budget.parse(text).bits_per_weight
    if rate is None:
        raise BudgetError(f"{text!r} is no number of bits per weight")
    return rate


def _rounded_up(value: float, digits: int = 4) -> Fraction:
    """The next number of so many significant digits that is not below a positive one."""
    step = Fraction(10) ** (math.floor(math.log10(value)) + 1 - digits)
    return math.ceil(Fraction(value) / step) * step


def _exact(value: Fraction, digits: int = 4) -> str:
    """A decimal if the value has one of so few digits ("3.25"), else a fraction ("13/3")."""
    scaled = value * 10**digits
    if scaled.denominator != 1:
        return str(value)
    whole, rest = divmod(scaled.numerator, 10**digits)
    return f"{whole}.{rest:0{digits}d}".rstrip("0").rstrip(".")
