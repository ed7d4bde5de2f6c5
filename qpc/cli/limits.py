"""The options that limit what a compiled model may cost, and the budget that they make."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qpc.budget import Budget, rates, times
from qpc.errors import BudgetError


@dataclass(frozen=True)
class LimitOption:
    """How an option sets a limit: the field of `Budget`, the unit of a bare number, and both in words."""

    field: str
    unit: str
    takes: str
    form: str


LIMITS = {
    "--bits": LimitOption("bits_per_weight", "", "bits per weight", "a number of bits per weight, such as 3.25"),
    "--size": LimitOption("total_bytes", "", "bytes", "a number with a unit of bytes, such as 80MB or 4.2GiB"),
    "--kl": LimitOption("kl_nats", "nats", "nats", "a KL in nats per token, such as 0.1"),
    "--latency": LimitOption("seconds_per_token", "", "a time or a speed", "a time such as 3ms or 3ms@8, or a speed such as 300tok/s"),
}


@dataclass(frozen=True)
class Limited:
    """The options that make a budget, as they were given. batch: of --latency where that names none."""

    bits: str | None
    size: str | None
    kl: str | None
    latency: str | None
    batch: int | None

    @property
    def given(self) -> dict[str, str]:
        """The limits that are there, by option. Raises `BudgetError` if there are two batches."""
        latency = self.latency
        if latency is not None and self.batch is not None:
            if "@" in latency:
                raise BudgetError(f"--latency {latency} names the batch; leave out --batch {self.batch}")
            latency = f"{latency}@{self.batch}"
        texts = {"--bits": self.bits, "--size": self.size, "--kl": self.kl, "--latency": latency}
        return {option: text for option, text in texts.items() if text is not None}

    def budget(self) -> Budget:
        """All limits together. Raises `BudgetError` unless at least one is given, each in its unit."""
        if not self.given:
            raise BudgetError(
                "no budget: give --bits 3.25 (average bits per weight), --size 80MB (whole checkpoint), --kl 0.1 (nats), "
                "--latency 3ms (time of the linears), or several"
            )
        return together(limit(option, text) for option, text in self.given.items())

    def budgets(self, step: str | None) -> list[Budget]:
        """Budgets in the order of a range of --bits or --latency, each with the other limits; one if there is no range.

        step: between two; a quarter of a bit, or an eighth of the range of times, if None. Raises `BudgetError` as `budget` does, or for a
        range that is none.
        """
        ranges = [option for option, text in self.given.items() if ".." in text]
        if not ranges:
            return [self.budget()]
        option = ranges[0]
        if option not in ("--bits", "--latency") or len(ranges) > 1:
            raise BudgetError(f"one of --bits and --latency may be a range, not {' and '.join(ranges)}")
        if self.kl is not None:
            raise BudgetError(f"--kl asks for the smallest model, {option} A..B for the least KL at each budget; give one of them")
        rest = [limit(name, text) for name, text in self.given.items() if name != option]
        found = rates(self.given[option], step or "0.25") if option == "--bits" else times(self.given[option], step)
        return [together((*rest, each)) for each in found]


def together(budgets: Iterable[Budget]) -> Budget:
    """The limits of all, of which each sets others."""
    found: dict[str, Any] = {}
    for budget in budgets:
        found |= budget.limits | ({} if budget.seconds_per_token is None else {"batch": budget.batch})
    return Budget(**found)


def limit(option: str, text: str) -> Budget:
    """The budget of one limit. Raises `BudgetError` if the text is one of another kind."""
    kind = LIMITS[option]
    parsed = Budget.parse(text if any(letter.isalpha() for letter in text) else text + kind.unit)
    if list(parsed.limits) != [kind.field]:
        others = ", ".join(f"{name} takes {other.takes}" for name, other in LIMITS.items() if name != option)
        raise BudgetError(f"{option} {text} must be {kind.form}; {others}")
    return parsed
