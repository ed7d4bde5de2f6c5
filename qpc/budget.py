"""What the compiled model may cost: the one place where budgets are parsed, printed and turned into bytes.

Every field of `Budget` is one limit, `None` is no limit, and several limits hold together. A new kind of limit is one new field.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, fields
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

TIME_UNITS = {"us": Fraction(1, 10**6), "ms": Fraction(1, 10**3), "s": Fraction(1)}
"""Seconds in each unit of the time of a token."""

SPEED_UNITS = ("tok/s", "tokens/s")
"""Units of the tokens of a second, all sequences of a batch together."""

PS_PER_S = 10**12

MOST_IN_RANGE = 200
"""Budgets in one range."""

_SIZE = ("bits_per_weight", "total_bytes")
_NUMBER = re.compile(r"(?P<number>[+-]?(?:\d+/\d+|\d+\.?\d*|\.\d+))\s*(?P<unit>[^\W\d]*(?:/s)?)(?:\s*@\s*(?P<batch>\d+))?", re.ASCII)
_EXAMPLES = "write for example '3.25', '13/4 bit', '80MB', '4.2GiB', '0.1nats', '3ms@8' or '300tok/s'"


@dataclass(frozen=True)
class Budget:
    """Limits that the compiled model must keep.

    bits_per_weight: largest average over the linears that may be quantized, with everything that is stored for them: codes, scales, signs,
        padding.
    total_bytes: largest size of all tensors of the checkpoint, quantized or not.
    kl_nats: largest predicted KL divergence per token. With it the smallest model that keeps all limits is sought, without it the least
        predicted loss.
    seconds_per_token: longest time of a step that gives each sequence of a batch its next token. It covers the linears that may be
        quantized, with launches and transforms of their inputs, as the latency model of a GPU predicts them; not attention, norms,
        embeddings, output heads, excluded linears and sampling, which take the same time whatever the budget.
    batch: sequences in a step; other than 1 only beside a limit on time.

    Raises `BudgetError` if no limit is set, or one is not positive.
    """

    bits_per_weight: Fraction | None = None
    total_bytes: int | None = None
    kl_nats: Fraction | None = None
    seconds_per_token: Fraction | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        if not self.limits:
            raise BudgetError(f"a budget needs at least one limit; {_EXAMPLES}")
        for name, value in {**self.limits, "batch": self.batch}.items():
            if value <= 0:
                raise BudgetError(f"{name}={value} must be positive")
        if self.batch != 1 and self.seconds_per_token is None:
            raise BudgetError(f"batch={self.batch} is that of a limit on time, and there is none; write for example '3ms@{self.batch}'")

    @staticmethod
    def parse(text: str) -> "Budget":
        """Read one limit, or several separated by commas: "3.25", "13/4 bit", "80MB", "0.1nats", "3ms@8", "4bit, 4.2GiB, 0.1nats".

        "3ms@8" is a step of 3 ms in which 8 sequences get a token each, "2000tok/s@8" the same in 8 / 2000 s; the batch is 1 if none is
        named. A fraction of a byte is rounded down. Raises `BudgetError` for anything else.
        """
        limits: dict[str, Fraction | int] = {}
        for part in text.split(","):
            for name, value in _limit(part.strip()).items():
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
        if self.seconds_per_token is not None:
            limits.append(print_time(self.seconds_per_token, self.batch))
        return ", ".join(limits)

    @property
    def limits(self) -> dict[str, Fraction | int]:
        """The limits that are set, under the names of their fields."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "batch"}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def latency_ps(self) -> int | None:
        """The limit on time as whole picoseconds that do not exceed it."""
        return None if self.seconds_per_token is None else math.floor(self.seconds_per_token * PS_PER_S)

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

    def refusal(
        self,
        weights: int,
        other_bytes: int,
        *,
        least_bytes: int | None = None,
        least_kl: float | None = None,
        least_ps: int | None = None,
        apart: bool = False,
    ) -> BudgetError:
        """The error for limits that no allocation keeps. Each budget that it names is feasible with the other limits as they are.

        weights, other_bytes: as for `weight_bytes`. least_bytes: of the linears; least_kl [nats]; least_ps: of a step [picoseconds]; each
        the least that can be had while the limits of other kinds are kept, None where they cannot be, or it is no limit that bites.
        apart: these are the least without the other limits, each of which is out of reach as well.
        """
        sizes = "" if least_bytes is None else self._sizes(least_bytes, weights, other_bytes)
        if set(self.limits) <= set(_SIZE):
            if self.total_bytes is not None and self.total_bytes < other_bytes:
                reason = f": the tensors that are never quantized need {other_bytes} bytes alone"
                return BudgetError(f"budget {self}{reason}; the smallest feasible one is {sizes}")
            return BudgetError(f"budget {self} is below the palette: the smallest feasible one is {sizes}")
        found: list[tuple[Collection[str], str]] = []
        if sizes:
            found.append((_SIZE, f"the smallest feasible size is {sizes}"))
        if least_kl is not None:
            found.append((("kl_nats",), f"the least feasible KL is {print_nats(_rounded_up(least_kl))}"))
        if least_ps is not None:
            time = _rounded_up(Fraction(least_ps, PS_PER_S))
            found.append((("seconds_per_token",), f"the least feasible time of the linears is {print_time(time, self.batch)}"))
        named = [text if apart or (rest := self._without(names)) is None else f"with {rest} {text}" for names, text in found]
        head = f"budget {self} cannot be kept: " + ("each limit is out of reach on its own: " if apart and named else "")
        return BudgetError(head + ("; ".join(named) or "no limit can be mended alone; give one of them at a time"))

    def _without(self, names: Collection[str]) -> "Budget | None":
        """The limits of other names, if there are any."""
        rest = {name: value for name, value in self.limits.items() if name not in names}
        batch = self.batch if "seconds_per_token" in rest else 1
        return Budget(**rest, batch=batch) if rest else None  # type: ignore[arg-type]

    @staticmethod
    def _sizes(least_bytes: int, weights: int, other_bytes: int) -> str:
        rate = Fraction(math.ceil(Fraction(8 * least_bytes, max(weights, 1)) * 10_000), 10_000)
        total = print_bytes(least_bytes + other_bytes)
        return f"{_exact(rate)}bit (linears alone, {least_bytes} bytes) or {total} (the whole checkpoint)"


def rates(text: str, step: str) -> tuple[Budget, ...]:
    """A range of bits per weight "2.5..4.5", from its start in equal steps, its end included; a single rate alone.

    Raises `BudgetError` for anything else, or more than `MOST_IN_RANGE`.
    """
    ends = [_rate(end) for end in text.split("..")]
    width = _rate(step)
    if len(ends) > 2 or ends[0] > ends[-1]:
        raise BudgetError(f"{text!r} is no range of bits per weight; write for example '2.5..4.5'")
    return tuple(Budget(bits_per_weight=rate) for rate in _spread(ends[0], ends[-1], width))


def times(text: str, step: str | None) -> tuple[Budget, ...]:
    """A range of times "2ms..4ms" or speeds "200tok/s..400tok/s", with the batch "@8" behind, by rising time; a single one alone.

    step: a time; None takes an eighth of the range. Raises `BudgetError` for anything else, or more than `MOST_IN_RANGE`.
    """
    body, _, batch = text.partition("@")
    limits = [_time(f"{end}@{batch}" if batch else end) for end in body.split("..")]
    first, last = min(limits)[0], max(limits)[0]
    if len(limits) > 2:
        raise BudgetError(f"{text!r} is no range of times; write for example '2ms..4ms'")
    width = (last - first) / 8 or Fraction(1) if step is None else _time(step)[0]
    return tuple(Budget(seconds_per_token=seconds, batch=limits[0][1]) for seconds in _spread(first, last, width))


def _spread(first: Fraction, last: Fraction, width: Fraction) -> list[Fraction]:
    """From first to last in steps of a width, the last included. Raises `BudgetError` for more than `MOST_IN_RANGE`."""
    if (last - first) / width > MOST_IN_RANGE - 1:
        raise BudgetError(f"a range has at most {MOST_IN_RANGE} budgets; take larger steps")
    found = [first + index * width for index in range(math.floor((last - first) / width) + 1)]
    return [*found, last] if found[-1] < last else found


def print_nats(value: Fraction) -> str:
    """A predicted KL, exactly: "0.1nats"."""
    return f"{_exact(value, digits=12)}nats"


def print_time(seconds: Fraction, batch: int) -> str:
    """The time of a step, exactly: "3ms@8", or as tokens per second of the batch if only that is a decimal: "300tok/s"."""
    at, speed = "" if batch == 1 else f"@{batch}", batch / seconds
    if not _is_decimal(1000 * seconds, 9) and _is_decimal(speed, 4):
        return f"{_exact(speed)}tok/s{at}"
    return f"{_exact(1000 * seconds, digits=9)}ms{at}"


def print_bytes(count: int) -> str:
    """The largest unit that states this number of bytes as a whole number: 80000000 -> "80MB"."""
    unit = max((name for name in BYTE_UNITS if count % BYTE_UNITS[name] == 0), key=lambda name: BYTE_UNITS[name])
    return f"{count // BYTE_UNITS[unit]}{unit}"


def _limit(text: str) -> dict[str, Fraction | int]:
    """Fields of a budget that one part of its text sets."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise BudgetError(f"budget {text!r} is not a number with a unit; {_EXAMPLES}")
    try:
        number = Fraction(match["number"])
    except ZeroDivisionError:
        raise BudgetError(f"budget {text!r} divides by zero; {_EXAMPLES}") from None
    unit = match["unit"]
    if unit in TIME_UNITS or unit in SPEED_UNITS:
        batch = 1 if match["batch"] is None else int(match["batch"])
        if number <= 0 or batch == 0:
            raise BudgetError(f"budget {text!r} must be positive; {_EXAMPLES}")
        return {"seconds_per_token": number * TIME_UNITS[unit] if unit in TIME_UNITS else batch / number, "batch": batch}
    if match["batch"] is not None:
        raise BudgetError(f"budget {text!r} has a batch, which only a time or a speed has; {_EXAMPLES}")
    if unit == "" or unit in RATE_UNITS:
        return {"bits_per_weight": number}
    if unit in BYTE_UNITS:
        return {"total_bytes": math.floor(number * BYTE_UNITS[unit])}
    if unit in LOSS_UNITS:
        return {"kl_nats": number}
    known = (*RATE_UNITS, *BYTE_UNITS, *LOSS_UNITS, *TIME_UNITS, *SPEED_UNITS)
    raise BudgetError(f"budget {text!r} has an unknown unit {unit!r}; known: {', '.join(known)}")


def _rate(text: str) -> Fraction:
    rate = Budget.parse(text).bits_per_weight
    if rate is None:
        raise BudgetError(f"{text!r} is no number of bits per weight")
    return rate


def _time(text: str) -> tuple[Fraction, int]:
    """Seconds of a step, and the batch."""
    budget = Budget.parse(text)
    if list(budget.limits) != ["seconds_per_token"] or budget.seconds_per_token is None:
        raise BudgetError(f"{text!r} is no time; write for example '3ms' or '300tok/s'")
    return budget.seconds_per_token, budget.batch


def _rounded_up(value: float | Fraction, digits: int = 4) -> Fraction:
    """The next number of so many significant digits that is not below a positive one."""
    step = Fraction(10) ** (math.floor(math.log10(value)) + 1 - digits)
    return math.ceil(Fraction(value) / step) * step


def _exact(value: Fraction, digits: int = 4) -> str:
    """A decimal if the value has one of so few digits ("3.25"), else a fraction ("13/3")."""
    if not _is_decimal(value, digits):
        return str(value)
    whole, rest = divmod((value * 10**digits).numerator, 10**digits)
    return f"{whole}.{rest:0{digits}d}".rstrip("0").rstrip(".")


def _is_decimal(value: Fraction, digits: int) -> bool:
    """Whether so many digits behind the point are all that it has."""
    scaled: Fraction = value * 10**digits
    return scaled.denominator == 1
