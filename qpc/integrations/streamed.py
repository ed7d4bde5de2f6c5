"""`qpc.stream`: a directory of safetensors becomes a checkpoint in little memory, and goes on where it was if it was interrupted."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from qpc import streaming
from qpc.budget import Budget
from qpc.checkpoint import read_report
from qpc.compiler import report_of
from qpc.errors import ModelError
from qpc.integrations import transformers as hf
from qpc.integrations.model_card import CARD
from qpc.integrations.storage import write_companions
from qpc.ir.program import Program, named_tensors
from qpc.latency import LatencyModel
from qpc.options import Options
from qpc.passes.pipeline import Pipeline
from qpc.progress import Progress, silent
from qpc.quant.palette import Effort
from qpc.report import Report
from qpc.safetensors_source import SafetensorsSource
from qpc.sensitivity import Sensitivities
from qpc.sensitivity_cache import digest
from qpc.streaming import Decisions
from qpc.tensor_files import SHARD_BYTES
from qpc.work_in_progress import working_on


@dataclass(frozen=True)
class Stream:
    """A model on disk that is planned, and read once the plan is carried out.

    directory: of the model. program: at ALLOCATED; with a calibration at GROUPED, for what feedback will leave is not known yet. Carrying
    the plan out uses it up. identity: what decides the result, as JSON has it.
    """

    directory: Path
    program: Program
    decisions: Decisions
    identity: dict[str, Any]

    @staticmethod
    def of(directory: Path, options: Options, sensitivities: Sensitivities | None, device: torch.device | str = "cpu") -> "Stream":
        """Plan the compilation of a directory. device: where weights are packed.

        Raises `QpcError` if the model, an option or the budget cannot be used, or asks for the whole model in memory.
        """
        packed_on = torch.device(device)
        options = streaming.check_options(options, sensitivities).on(packed_on)
        if hf.gguf_file(directory) is not None:
            raise ModelError(f"{directory} is a GGUF file, which is read as a whole; compile it without --stream, or convert it first")
        hf.check_directory(directory)
        model = hf.skeleton(directory)
        prefix = getattr(model, "base_model_prefix", "")
        source = SafetensorsSource(directory, named_tensors(model), options.spread.reads_to(packed_on), f"{prefix}." if prefix else "")
        program, decisions = streaming.grouped(model, source, options, sensitivities)
        if decisions.complete:
            Pipeline((decisions.allocate(),)).run(program)
        elif options.budget.loss is None:
            decisions.allocate().solve(program)  # a budget that nothing fits is refused before any work
        return Stream(directory, program, decisions, identity(directory, decisions, device))

    def carry_out(
        self, output: str | os.PathLike[str], *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES, progress: Progress = silent
    ) -> Report:
        """Write the checkpoint, or what is missing of it; it appears whole. Returns what was done to each linear.

        Raises `CheckpointError` if the place is taken, the disk is full, or the unfinished work of another compile is in the way.
        """
        target = Path(output).absolute()
        with working_on(target, self.identity | {"shard_bytes": shard_bytes}, overwrite) as work:
            if work is None:
                return read_report(target)
            result = streaming.fill(self.program, self.decisions, work, shard_bytes=shard_bytes, progress=progress)
            with work.writing():
                write_companions(result, work.directory, target / CARD, self.directory)
            work.publish(overwrite)
        return report_of(result)


def stream(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    budget: Budget | Fraction | float | str,
    *,
    sensitivities: Sensitivities | None = None,
    effort: Effort | str = Effort.DEFAULT,
    exclude: Iterable[str] = (),
    seed: int = 0,
    same_quantizer_in_group: bool = False,
    rotation_block: int | None = None,
    embeddings: Fraction | float | str | None = None,
    calibration: object = None,
    gpu: LatencyModel | Path | str | None = None,
    batch: int = 1,
    ray: str | None = None,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Report:
    """Compile a model that need not fit into memory, from a directory of safetensors to a checkpoint.

    The result is byte for byte that of `qpc.compile` with the same options, saved by `qpc.save`, but that with a calibration all positions
    count alike in the moments: gradients, by which `qpc.compile` weighs them, need the whole model. Finished weights are noted in
    OUT.journal, their tensors are in OUT.partial: what was interrupted in whatever way goes on where it was when it is called again. Peak
    memory is about four times the largest weight that is packed, in float32, and what Python and the encoder take; with a calibration that
    of half a decoder layer, of the moments of its widest linear and of what their factors take, and of the activations of 4096 positions.

    sensitivities: of the linears, or of those of another size of the family; by default they are estimated layer by layer, which compares
    linears and predicts no KL. calibration: the path of a text file, or of tokens that
    `qpc sample` wrote; tokens, int64 [sequences, length] or an iterable of such; or None, without error feedback. The activations wait in
    OUT.partial, in two files at most of positions times width values. device: where weights are packed. Other arguments are those of
    `qpc.compile` and `qpc.save`.

    Raises `QpcError` as those do, and `CheckpointError` if unfinished work in the place is that of another model or of other options.
    """
    options = Options.of(
        budget,
        effort=effort,
        exclude=exclude,
        seed=seed,
        same_quantizer_in_group=same_quantizer_in_group,
        rotation_block=rotation_block,
        embeddings=embeddings,
        calibration=calibration,
        tokenizer=None if calibration is None else hf.load_tokenizer(Path(directory)),
        gpu=gpu,
        batch=batch,
        ray=ray,
    )
    planned = Stream.of(Path(directory), options, sensitivities, device)
    return planned.carry_out(output, overwrite=overwrite, shard_bytes=shard_bytes, progress=progress)


def identity(directory: Path, decisions: Decisions, device: torch.device | str) -> dict[str, Any]:
    """What decides the bytes of the result. Weights are known by name, size and time of their files, and all else by its content."""
    from qpc import __version__

    options, samples = decisions.options, decisions.samples
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(directory.glob("*.safetensors"))]
    beside = [path for path in (directory / "config.json", directory / "generation_config.json") if path.is_file()]
    return {
        "model": _short([files, [path.read_text(encoding="utf-8") for path in beside]]),
        "sensitivities": None if decisions.sensitivities is None else _short(decisions.sensitivities.to_json()),
        "calibration": None if samples is None else _short([samples.description, digest([*samples.batches, *samples.held_out])]),
        "budget": str(options.budget),
        "effort": str(options.effort),
        "seed": options.seed,
        "exclude": list(options.exclude),
        "same_quantizer_in_group": options.same_quantizer_in_group,
        "rotation_block": options.rotation_block,
        "embeddings": None if options.embeddings is None else str(options.embeddings),
        "gpu": None if options.latency is None else options.latency.title,
        "batch": options.batch,
        "device": torch.device(device).type,
        "versions": f"qpc {__version__}, torch {torch.__version__}",
    }


def _short(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
