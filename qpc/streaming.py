"""From a model on the meta device, whose values are read part by part, to the files of a checkpoint.

The passes are those of `qpc.compile`. Allocation needs shapes and sensitivities alone; rounding reads a weight, packs it, and leaves it
on a `DiskShelf`. With a calibration the samples go through the model twice, a segment of it in memory at a time: once for the share of
the error that feedback will leave, which the allocation counts with, and once more for the moments that weights are rounded with. What is
made is, byte for byte, what `qpc.save` writes of the same model compiled with the same options, `weigh_positions=False` among them.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qpc import checkpoint, tensor_files
from qpc.calibration import Samples, SelfSampled, collect
from qpc.compiler import captured, finish, group, install, report_of, unweighed
from qpc.disk_shelf import DiskShelf
from qpc.errors import CheckpointError, ModelError, SettingsError
from qpc.held_source import HeldSource
from qpc.ir.annotation import annotation, site_of
from qpc.ir.program import Program, Remark, named_tensors
from qpc.ir.random_inputs import random_inputs
from qpc.ir.segments import segments
from qpc.ir.stage import Stage
from qpc.layerwise import estimate_by_layers
from qpc.noted_shares import NotedShares
from qpc.options import Options
from qpc.passes.allocate import Allocate
from qpc.passes.base import Pass
from qpc.passes.calibrate import Calibrate
from qpc.passes.embeddings import Embeddings, PackTables
from qpc.passes.pipeline import Pipeline
from qpc.passes.quantize import Quantize
from qpc.passes.shelf import hollow
from qpc.progress import Progress, silent, track
from qpc.quant import palette
from qpc.quant.palette import default_palette
from qpc.quant.quantizer import PackedWeight
from qpc.quant.rotation import Rotation
from qpc.safetensors_source import SafetensorsSource
from qpc.sensitivity import Method, Sensitivities, fitted
from qpc.sensitivity_cache import NOISE_POSITIONS
from qpc.spill import Spill
from qpc.spilled_moments import SpilledMoments
from qpc.work_in_progress import WorkInProgress

ESTIMATED = "estimated layer by layer, each of which is taken to pass errors on alike; no KL is predicted by them"


def check_options(options: Options, sensitivities: Sensitivities | None) -> Options:
    """The options with which a model is compiled part by part, without what needs gradients. Raises `SettingsError` if it cannot be."""
    if sensitivities is None and options.budget.loss is not None:
        raise SettingsError(
            "sensitivities of a model that is read part by part are estimated layer by layer and predict no KL; give those that "
            "`qpc sensitivities` wrote elsewhere, of it or of another size of its family (--sensitivities FILE), or another budget"
        )
    if isinstance(options.calibration, SelfSampled):
        raise SettingsError(
            "a model that is read part by part cannot sample text; give a file of text, or of tokens that `qpc sample` wrote on another "
            "machine (--calibration FILE), or round without error feedback (--calibration none)"
        )
    if options.sensitivity.method is not Method.GRADIENT and sensitivities is None:
        raise SettingsError(
            f"sensitivities by {options.sensitivity} need the whole model in memory, which is read part by part; leave --sensitivity, and "
            "they are estimated layer by layer, or give a file of them (--sensitivities FILE)"
        )
    if options.fold:
        raise SettingsError(
            "gains and rotations are folded into all weights around them, so the whole model is needed; leave it (--no-fold)"
        )
    if options.row_feedback:
        raise SettingsError("gradients say how errors are carried between rows; they need the whole model: leave it (--row-feedback off)")
    if options.tune is not None and options.tune.anywhere:
        raise SettingsError("scales and norms are tuned by gradients, which need the whole model in memory; leave it (--tune off)")
    return replace(options, weigh_positions=False, tune=None)


@dataclass(frozen=True)
class Decisions:
    """What the passes decide by.

    sensitivities: None: they are to be estimated layer by layer. samples: of the calibration; None: there is none.
    """

    options: Options
    sensitivities: Sensitivities | None
    samples: Samples | None

    def allocate(self) -> Allocate:
        """The pass that allocates; all linears matter alike as long as nothing else is known."""
        return self.options.allocate(self.options.budget, self.sensitivities)

    @property
    def complete(self) -> bool:
        """Whether nothing has to be found out by a sweep through the model before it is allocated."""
        return self.sensitivities is not None and self.samples is None


def grouped(
    model: nn.Module, source: SafetensorsSource, options: Options, sensitivities: Sensitivities | None
) -> tuple[Program, Decisions]:
    """A program at GROUPED, without a look at any weight, and what will be decided by.

    model: on the meta device, but for buffers that no file has. Raises `QpcError` as `qpc.compile` does.
    """
    program = captured(model, options)
    program.source = HeldSource(source)
    _leave_meta(program.graph, source.device)
    group(program, options)
    samples, remarks = collect(options.calibration, program, options.seed)
    program.remarks += remarks
    if sensitivities is None:
        program.remarks.append(Remark("sensitivities", type(model).__name__, ESTIMATED))
    else:
        sensitivities, remarks = fitted(program, sensitivities)
        program.remarks += remarks
    decisions = Decisions(options, sensitivities, samples)
    if samples is not None:
        program.calibration = samples.description
        program.remarks.append(unweighed(program))
    if not decisions.complete:
        segments(program)  # an error comes before any work
    if options.embeddings is not None:
        quantizer = default_palette(options.effort).at(options.embeddings)
        Pipeline((Embeddings(quantizer, options.seed, options.rotation_block, postponed=True),)).run(program)
    return program, decisions


def fill(
    program: Program,
    decisions: Decisions,
    work: WorkInProgress,
    *,
    shard_bytes: int = tensor_files.SHARD_BYTES,
    progress: Progress = silent,
) -> nn.Module:
    """Write tensors and manifest of a program of `grouped`, allocated or not; steps that are finished already are left as they are.

    Returns the compiled model without its packed tensors, with its report. Raises `ModelError` for a weight that is not finite,
    `BudgetError` if no allocation fits, and `CheckpointError` if something cannot be written, or was allocated otherwise when the work
    began.
    """
    options, samples, source, seed = decisions.options, decisions.samples, program.source, decisions.options.seed
    assert isinstance(source, HeldSource), "as `grouped` leaves it"
    known = NotedShares.of(work)
    if program.stage is Stage.GROUPED:
        _check_finite(program.module, source, work, progress)
        allocate = decisions.allocate()
        if decisions.sensitivities is None:
            found = estimate_by_layers(program, _some_text(program, samples, seed), source, work, seed=seed, progress=progress)
            allocate = replace(allocate, sensitivities=found)
        before: tuple[Pass, ...] = ()
        if samples is not None:
            sweep = spilled(program, samples, work, "calibrate")
            before = (Calibrate(samples, seed, options.rotation_block, known, progress, options.spread, sweep),)
        Pipeline((*before, allocate)).run(program)
    _agree(work, program)
    _check_finite(program.module, source, work, progress)
    expected = layout(program)
    with DiskShelf(work, expected, shard_bytes, progress) as shelf:
        live = named_tensors(program.module)
        others = [name for name in shelf.names if name in live]
        tables = (PackTables(shelf, progress, options.spread),) if program.tables else ()
        for name in track(others, "copy", len(others), progress):
            if not shelf.has(name):
                shelf.copy(name, source.pieces(name) if live[name].is_meta else [live[name]])
        moments = None if samples is None else spilled(program, samples, work, "quantize")
        quantize = Quantize(
            seed, options.rotation_block, progress, samples, known=known, shelf=shelf, spread=options.spread, moments=moments
        )
        Pipeline((*tables, quantize)).run(program)
        if moments is not None:
            moments.close()
        result = finish(program, options)
        if decisions.sensitivities is None:
            result.qpc_report = replace(report_of(result), predicted_loss=None)  # type: ignore[assignment]
        with work.writing():
            tensor_files.write_index(work.directory, tensor_files.shards(expected, shard_bytes))
            checkpoint.write_manifest(result, work.directory, shelf.checksums)
    return result


def _some_text(program: Program, samples: Samples | None, seed: int) -> Tensor:
    """Sequences on which sensitivities are estimated: held-out ones if there are any, else random tokens."""
    if samples is None:
        (tokens,) = random_inputs(program, batch=NOISE_POSITIONS // 64, length=64, seed=seed, device="cpu")
        return tokens
    batch = (samples.held_out or samples.batches)[0]
    return batch[: max(1, NOISE_POSITIONS // batch[0].numel())]


def spilled(program: Program, samples: Samples, work: WorkInProgress, sweep: str) -> SpilledMoments:
    """The moments of a program on its way through a model: at GROUPED of all linears, later of those that have a quantizer."""
    assert isinstance(program.source, HeldSource)
    nodes = [node for node in program.linears() if program.stage is Stage.GROUPED or annotation(node).quantizer is not None]
    return SpilledMoments(program, nodes, samples, program.source, Spill(work, sweep))


def layout(program: Program) -> dict[str, Tensor]:
    """Every tensor of the checkpoint that an allocated program will become, by name, without its values."""
    packed: dict[str, PackedWeight] = {}
    by_weight: dict[str, PackedWeight] = {}
    for node in program.linears():
        site, quantizer = site_of(node), annotation(node).quantizer
        if quantizer is not None:
            rotation = Rotation(site.shape.in_features, 1, torch.zeros(Rotation.bytes_for(site.shape.in_features), dtype=torch.uint8))
            packed[site.name] = by_weight.setdefault(site.weight, hollow(quantizer, site.shape, rotation))
    return checkpoint.stored(install(replace(program, packed=packed)))


def _leave_meta(graph: fx.Graph, device: torch.device) -> None:
    """Let operators that were captured to make values on the meta device make them where values are."""

    def place(value: Any) -> Any:
        return device if isinstance(value, torch.device) and value.type == "meta" else value

    for node in graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), place)


def _agree(work: WorkInProgress, program: Program) -> None:
    """Note the allocation, or compare it with what was noted."""
    chosen = []
    for node in program.linears():
        known = annotation(node)
        quantizer = None if known.quantizer is None else palette.to_json(known.quantizer)
        chosen.append([site_of(node).name, quantizer, None if known.group is None else known.group.members])
    found = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
    before = work.find("allocation")
    if before is None:
        work.record(step="allocation", sha256=found)
    elif before["sha256"] != found:
        raise CheckpointError(
            f"the allocation is another one than when the work in {work.directory} began; remove {work.anew} to begin anew"
        )


def _check_finite(model: nn.Module, source: HeldSource, work: WorkInProgress, progress: Progress) -> None:
    """Read all values once before hours of work. Raises `ModelError` that names the first parameter with a NaN or an infinity."""
    if work.find("finite") is not None:
        return
    stored = [(name, value) for name, value in model.named_parameters() if value.is_meta and value.is_floating_point()]
    for name, value in track(stored, "read", len(stored), progress):
        for piece in source.pieces(name) if value.numel() else ():
            if not torch.stack(torch.aminmax(piece)).isfinite().all():
                raise ModelError(f"{name} has values that are not finite; repair the model first")
    work.record(step="finite")
