"""Sensitivities on disk, by the weights of the model: estimated once, whatever budgets are tried."""

from torch import Tensor

from qpc import cache
from qpc.errors import ModelError, SettingsError
from qpc.ir.annotation import annotation, fake_value
from qpc.ir.program import Program, Remark
from qpc.progress import Progress, silent
from qpc.sensitivity import Sensitivities, estimate
from qpc.settings import Settings

FORMAT = 1
"""Version of the files and of the defaults of `estimate`; part of their names."""


def estimated(program: Program, seed: int, progress: Progress = silent) -> tuple[Sensitivities, tuple[Remark, ...]]:
    """What `estimate` gives by default, from the directory QPC_CACHE if it is known there; a remark if it could not be kept.

    The file is the JSON form of `Sensitivities`, named by weights, linears, inputs and seed.

    Raises `ModelError` as `estimate` does.
    """
    directory = Settings.from_environment().cache
    if directory is None:
        return estimate(program, seed=seed, progress=progress), ()
    sites = sorted({site.name for node in program.linears() if (site := annotation(node).site) is not None})
    settings = {"seed": seed, "sites": sites, "inputs": _inputs(program)}
    name = f"sensitivities-{cache.key(program.module, FORMAT, settings)}.json"
    kept = _parsed(cache.read(directory, name))
    if kept is not None and sorted(kept.values) == sites:
        return kept, ()
    found = estimate(program, seed=seed, progress=progress)
    try:
        cache.write(directory, name, found.to_json().encode())
    except SettingsError as error:
        return found, (Remark("sensitivities", type(program.module).__name__, str(error)),)
    return found, ()


def _inputs(program: Program) -> list[list[object]]:
    """Sizes of the fixed axes of each input that is a tensor, and its dtype."""
    values = [fake_value(node) for node in program.graph.find_nodes(op="placeholder") if node.name in program.inputs]
    tensors = [value for value in values if isinstance(value, Tensor)]
    return [[*(size if isinstance(size, int) else None for size in value.shape), str(value.dtype)] for value in tensors]


def _parsed(content: bytes | None) -> Sensitivities | None:
    """None for a file that is damaged, or was none."""
    try:
        return None if content is None else Sensitivities.from_json(content.decode())
    except (ModelError, UnicodeDecodeError):
        return None
