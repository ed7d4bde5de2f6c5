"""From a model on the meta device, whose values are read one weight at a time, to the files of a checkpoint.

The passes are those of `qpc.compile`. Allocation needs shapes and sensitivities alone; rounding reads a weight, packs it, and leaves it
on a `DiskShelf`. What is made is, byte for byte, what `qpc.save` writes of the same model compiled with the same options.
"""

import hashlib
import json
from dataclasses import replace

import torch
from torch import Tensor, nn

from qpc import checkpoint, tensor_files
from qpc.compiler import captured, finish, group, install
from qpc.disk_shelf import DiskShelf
from qpc.errors import CheckpointError, ModelError, SettingsError
from qpc.ir.annotation import annotation, site_of
from qpc.ir.program import Program, named_tensors
from qpc.options import Options
from qpc.passes.base import Pass
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
from qpc.sensitivity import Sensitivities
from qpc.work_in_progress import WorkInProgress


def check_options(options: Options, sensitivities: Sensitivities | None) -> Sensitivities:
    """The sensitivities, if a model can be compiled with these options weight by weight. Raises `SettingsError` if not."""
    if sensitivities is None:
        raise SettingsError(
            "sensitivities are estimated with the whole model in memory, which is read weight by weight; give a file of them "
            "(--sensitivities FILE)"
        )
    if options.calibration is not None:
        raise SettingsError("weights that are read one by one are rounded without error feedback; agree to it (--calibration none)")
    if options.fold:
        raise SettingsError("gains and rotations are folded into all weights around them, which are read one by one; leave it (--no-fold)")
    return sensitivities


def allocated(model: nn.Module, source: SafetensorsSource, options: Options, sensitivities: Sensitivities) -> Program:
    """A program at ALLOCATED, without a look at any weight.

    model: on the meta device, but for buffers that no file has. Raises `QpcError` as `qpc.compile` does.
    """
    program = captured(model, options)
    program.source = source
    group(program, options)
    tables: tuple[Pass, ...] = ()
    if options.embeddings is not None:
        quantizer = default_palette(options.effort).at(options.embeddings)
        tables = (Embeddings(quantizer, options.seed, options.rotation_block, postponed=True),)
    Pipeline((*tables, options.allocate(options.budget, sensitivities))).run(program)
    return program


def fill(
    program: Program,
    source: SafetensorsSource,
    options: Options,
    work: WorkInProgress,
    *,
    shard_bytes: int = tensor_files.SHARD_BYTES,
    progress: Progress = silent,
) -> nn.Module:
    """Write tensors and manifest of a program at ALLOCATED; steps that are finished already are left as they are.

    Returns the compiled model without its packed tensors, with its report. Raises `ModelError` for a weight that is not finite, and
    `CheckpointError` if something cannot be written, or was allocated otherwise when the work began.
    """
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
        quantize = Quantize(options.seed, options.rotation_block, progress, shelf=shelf, spread=options.spread)
        Pipeline((*tables, quantize)).run(program)
        result = finish(program, options)
        with work.writing():
            tensor_files.write_index(work.directory, tensor_files.shards(expected, shard_bytes))
            checkpoint.write_manifest(result, work.directory, shelf.checksums)
    return result


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


def _check_finite(model: nn.Module, source: SafetensorsSource, work: WorkInProgress, progress: Progress) -> None:
    """Read all values once before hours of work. Raises `ModelError` that names the first parameter with a NaN or an infinity."""
    if work.find("finite") is not None:
        return
    stored = [(name, value) for name, value in model.named_parameters() if value.is_meta and value.is_floating_point()]
    for name, value in track(stored, "read", len(stored), progress):
        for piece in source.pieces(name) if value.numel() else ():
            if not torch.stack(torch.aminmax(piece)).isfinite().all():
                raise ModelError(f"{name} has values that are not finite; repair the model first")
    work.record(step="finite")
