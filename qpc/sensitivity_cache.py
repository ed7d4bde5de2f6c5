"""Sensitivities by any method, from disk where they are known: estimated once, whatever budgets are tried.

Everything is kept in the directory QPC_CACHE, in files named by weights, linears, inputs, method and seed: finished sensitivities as JSON,
the measurements of an estimate that was interrupted as a journal, and what each backward pass found as tensors.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qpc import cache
from qpc.calibration import Given, Samples, SelfSampled, collect
from qpc.calibration import parse as parse_calibration
from qpc.errors import ModelError, SettingsError
from qpc.ir.annotation import fake_value, site_of
from qpc.ir.program import Program, Remark
from qpc.ir.random_inputs import random_inputs
from qpc.journal import Journal
from qpc.progress import Progress, silent
from qpc.sensitivity import Importance, Loss, Method, OutputMoments, Sensitivities, by_gradient, checked, estimate
from qpc.sensitivity.gradient import Backward
from qpc.settings import Settings

FORMAT = 2
"""Version of the files and of the defaults of the methods; part of their names."""

NOISE_POSITIONS = 1024
"""Positions of a text on which noise is injected: many times fewer than gradients use, for every linear walks through all of them."""

ROUNDS = 4
"""Draws of the noise on a text."""

TEXT = SelfSampled(tokens=4096, length=128)
"""What a model samples for its sensitivities alone."""


@dataclass(frozen=True)
class Wanted:
    """A method, and the inputs of `Method.GIVEN`."""

    method: Method = Method.GRADIENT
    given: Given | None = None

    def __str__(self) -> str:
        return str(self.method)


def parse(value: object, *, tokenizer: object | None = None) -> Wanted:
    """What an option means: a `Wanted`, the name of a method, or inputs as a calibration takes them (a text file, texts, tokens).

    Raises `SettingsError` for anything else.
    """
    if isinstance(value, Wanted):
        return value
    names = [str(method) for method in Method if method not in (Method.GIVEN, Method.LAYERS)]
    if isinstance(value, str) and value in names:
        return Wanted(Method(value))
    try:
        given = parse_calibration(value, tokenizer=tokenizer)
    except SettingsError as error:
        raise SettingsError(f"sensitivity={value!r} is none of {', '.join(names)}, and no inputs: {error}") from error
    if not isinstance(given, Given):
        raise SettingsError(f"sensitivity={value!r} must be one of {', '.join(names)}, a text file, a list of texts, or tokens")
    return Wanted(Method.GIVEN, given)


@dataclass(frozen=True)
class Gradients:
    """What backward passes over all samples say, made when it is first asked for; each pass is kept on disk by itself.

    moments: where the moments of gradients are added up. They are not kept on disk, so with them every pass is made.
    """

    program: Program
    samples: Samples
    seed: int
    progress: Progress = silent
    moments: OutputMoments | None = None

    @property
    def batches(self) -> list[Tensor]:
        """All samples."""
        return [*self.samples.batches, *self.samples.held_out]

    @cached_property
    def found(self) -> tuple[Sensitivities, Importance]:
        """Sensitivities, and the importance of the positions of `batches` and then `held_out`.

        Raises `ModelError` as `by_gradient` does.
        """
        directory = Settings.from_environment().cache
        find = partial(by_gradient, self.program, self.batches, seed=self.seed, moments=self.moments, progress=self.progress)
        find = partial(find, held_out=len(self.samples.held_out))
        if directory is None:
            return find()
        settings = {"seed": self.seed, "sites": _sites(self.program), "inputs": digest(self.batches), "what": "gradients"}
        key = cache.key(self.program.module, FORMAT, settings)

        def recall(number: int, make: Callable[[], Backward]) -> Backward:
            name = f"gradients-{key}-{number}.safetensors"
            kept = _unpacked(cache.read(directory, name)) if self.moments is None else None
            if kept is None:
                kept = make()
                with suppress(SettingsError):  # it is made again the next time
                    cache.write(directory, name, _packed(kept))
            return kept

        return find(recall=recall)


def estimated(
    program: Program, wanted: Wanted, seed: int, gradients: Gradients | None = None, progress: Progress = silent
) -> tuple[Sensitivities, tuple[Remark, ...]]:
    """The sensitivities that are wanted, with their linearity, and what is to be said of them.

    gradients: on the inputs of the calibration. Without them, and for `Method.SELF`, the model samples a text; one that cannot, or cannot
    be differentiated, is estimated by noise on random inputs, which is a remark.

    Raises `ModelError` as `qpc.sensitivity.estimate` does.
    """
    remarks: list[Remark] = []

    def remark(reason: str) -> None:
        remarks.append(Remark("sensitivities", type(program.module).__name__, reason))

    method = wanted.method
    if wanted.given is not None:
        samples, _ = collect(wanted.given, program, seed, progress)
        gradients = None if samples is None else Gradients(program, samples, seed, progress)
    elif method is Method.SELF or (method is Method.GRADIENT and gradients is None):
        samples, said = collect(TEXT, program, seed, progress)
        gradients = None if samples is None else Gradients(program, samples, seed, progress)
        if samples is None:
            remark(f"{said[0].reason.partition(':')[0]}: estimated by noise on random inputs")
            method = Method.RANDOM
    try:
        found = _estimated(program, method, seed, gradients, progress, remark)
    except _Undifferentiable as error:
        remark(f"{error}: estimated by noise on random inputs")
        found = _estimated(program, Method.RANDOM, seed, None, progress, remark)
    if found.linearity is not None and found.linearity.broken:
        remark(str(found.linearity))
    return found, tuple(remarks)


def weighed(gradients: Gradients) -> tuple[Samples, tuple[Remark, ...]]:
    """The samples with the importance of their positions, and the moments of gradients if those are asked for.

    Without both, and with a remark, if the model cannot be differentiated.
    """
    samples, model = gradients.samples, type(gradients.program.module).__name__
    try:
        _, importance = gradients.found
    except ModelError as error:
        return samples, (Remark("calibration", model, f"{error}: all positions count alike in the moments"),)
    found, moments = samples.weighed(importance), gradients.moments
    if moments is None:
        return found, ()
    remarks = () if moments.declined is None else (Remark("calibration", model, moments.declined),)
    return replace(found, outputs=moments.moments()), remarks


class _Undifferentiable(ModelError):
    """The gradients of a model cannot be used."""


def _estimated(
    program: Program,
    method: Method,
    seed: int,
    gradients: Gradients | None,
    progress: Progress,
    remark: Callable[[str], None],
) -> Sensitivities:
    """From the cache, or estimated and kept."""
    directory = Settings.from_environment().cache
    sites, name = _sites(program), ""
    if directory is not None:
        inputs = _inputs(program) if method is Method.RANDOM or gradients is None else digest(gradients.batches)
        settings = {"seed": seed, "sites": sites, "inputs": inputs, "method": method}
        name = f"sensitivities-{cache.key(program.module, FORMAT, settings)}"
        kept = _parsed(cache.read(directory, f"{name}.json"))
        if kept is not None and sorted(kept.values) == sites:
            return kept
    journal: Journal[float] = Journal() if directory is None else Journal.open(directory / f"{name}.journal")
    try:
        found = _made(program, method, seed, gradients, journal, progress)
    finally:
        journal.close()
    if directory is not None:
        try:
            cache.write(directory, f"{name}.json", found.to_json().encode())
            journal.discard()
        except SettingsError as error:
            remark(str(error))
    return found


def _made(
    program: Program,
    method: Method,
    seed: int,
    gradients: Gradients | None,
    journal: Journal[float],
    progress: Progress,
) -> Sensitivities:
    """Estimated, and checked on one sequence."""
    if method is Method.RANDOM or gradients is None:
        found = estimate(program, seed=seed, method=method, journal=journal, progress=progress)
        some = random_inputs(program, batch=1, length=64, seed=seed)
        return checked(program, found, some, seed=seed, journal=journal, progress=progress)
    text = gradients.samples.held_out or gradients.samples.batches
    if method is Method.GRADIENT:
        try:
            found, _ = gradients.found
        except ModelError as error:
            raise _Undifferentiable(str(error)) from error
    else:
        found = estimate(
            program, inputs=(_first(text, NOISE_POSITIONS),), rounds=ROUNDS, seed=seed, method=method, journal=journal, progress=progress
        )
    return checked(program, found, (_first(text, 1),), seed=seed, journal=journal, progress=progress)


def _first(batches: Sequence[Tensor], positions: int) -> Tensor:
    """The first sequences of the first batch: so many that they have this number of positions, at least one."""
    batch = batches[0]
    each = max(1, batch[0].numel() if not batch.is_floating_point() else batch[0].numel() // batch.shape[-1])
    return batch[: max(1, positions // each)]


def _packed(found: Backward) -> bytes:
    tensors = {f"importance {name}": value for name, value in found.importance.items()}
    tensors |= {f"energy {name}": torch.tensor(value, dtype=torch.float64) for name, value in found.energy.items()}
    tensors["positions"] = torch.tensor(found.positions)
    tensors["kind"] = torch.tensor(list(Loss).index(found.kind))
    return save(tensors)


def _unpacked(content: bytes | None) -> Backward | None:
    """None for a file that is damaged, or was none."""
    try:
        tensors = {} if content is None else load(content)
        positions, kind = int(tensors.pop("positions")), list(Loss)[int(tensors.pop("kind"))]
    except (SafetensorError, KeyError, IndexError):
        return None
    energy = {name.partition(" ")[2]: float(value) for name, value in tensors.items() if name.startswith("energy ")}
    importance = {name.partition(" ")[2]: value for name, value in tensors.items() if name.startswith("importance ")}
    return Backward(energy, importance, positions, kind)


def _sites(program: Program) -> list[str]:
    return sorted({site_of(node).name for node in program.linears()})


def digest(batches: Sequence[Tensor]) -> str:
    """Of the values of some inputs."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(json.dumps([str(batch.dtype), *batch.shape]).encode())
        digest.update(batch.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
