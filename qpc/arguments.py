"""The arguments of the command line: their types and help, and the values that they stand for."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qpc.budget import Budget, rates
from qpc.errors import BudgetError, UsageError

if TYPE_CHECKING:
    from qpc.sensitivity import Sensitivities

Compiled = Annotated[Path, typer.Argument(metavar="OUT", help="A compiled model, or a plain Hugging Face directory.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="Directory with config.json and safetensors, or a GGUF file.")]
Total = Annotated[str | None, typer.Option("--size", help="Size of the whole checkpoint: 80MB, 4.2GiB.", show_default=False)]
Kl = Annotated[str | None, typer.Option(metavar="NATS", help="Predicted KL: the smallest model that stays within it.", show_default=False)]
EffortName = Annotated[str, typer.Option(help="fast, default, high or max: better codes for more time.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Shell pattern of linears that stay as they are; may be repeated.")]
RotationBlock = Annotated[
    int | None, typer.Option(min=1, help="Most inputs that a rotation mixes: the width of a tensor-parallel shard.", show_default=False)
]
EmbeddingBits = Annotated[
    str | None, typer.Option(metavar="BITS", help="Bits per weight of embeddings and output head.", show_default="as they are")
]
SensitivityFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="How much each linear matters, as JSON.", show_default="estimated, and kept in QPC_CACHE"),
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result on the same machine.")]
Device = Annotated[str | None, typer.Option(help="Where to run, as torch names it. By default a GPU if there is one.", show_default=False)]


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
}


def parse_budget(bits: str | None, total: str | None, kl: str | None) -> Budget:
    """A `Budget` from the three options. Raises `BudgetError` unless at least one is given, each in its unit."""
    given = {"--bits": bits, "--size": total, "--kl": kl}
    limits = {LIMITS[option].field: limit(option, text) for option, text in given.items() if text is not None}
    if not limits:
        raise BudgetError(
            "no budget: give --bits 3.25 (average bits per weight), --size 80MB (whole checkpoint), --kl 0.1 (nats), or several"
        )
    return Budget(**limits)


def parse_budgets(bits: str | None, total: str | None, kl: str | None, step: str) -> list[Budget]:
    """Budgets in the order of a range of --bits, each with the other limits; one if there is no range.

    Raises `BudgetError` as `parse_budget` does, or for a range that is none.
    """
    if bits is None or ".." not in bits:
        return [parse_budget(bits, total, kl)]
    if kl is not None:
        raise BudgetError("--kl asks for the smallest model, --bits A..B for the least KL at each size; give one of them")
    size = None if total is None else limit("--size", total)
    return [Budget(bits_per_weight=rate, total_bytes=size) for rate in rates(bits, step)]


def limit(option: str, text: str) -> Any:
    """The value of one limit. Raises `BudgetError` if the text is one of another kind."""
    kind = LIMITS[option]
    parsed = Budget.parse(text if any(letter.isalpha() for letter in text) else text + kind.unit)
    if [field.name for field in fields(parsed) if getattr(parsed, field.name) is not None] != [kind.field]:
        others = ", ".join(f"{name} takes {other.takes}" for name, other in LIMITS.items() if name != option)
        raise BudgetError(f"{option} {text} must be {kind.form}; {others}")
    return getattr(parsed, kind.field)


def pick_device(name: str | None) -> str:
    """The device to run on. Raises `UsageError` if torch has no such device here."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return name


def read_text(path: Path) -> str:
    """A text file as it is. Raises `UsageError` if it is missing or not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error


def read_sensitivities(path: Path) -> "Sensitivities":
    """Sensitivities from a JSON file. Raises `QpcError` if it holds none."""
    from qpc.sensitivity import Sensitivities

    return Sensitivities.from_json(read_text(path))
