"""An ONNX file of a compiled model in ONNX Runtime, beside the model in eager PyTorch: size, error, the same tokens, time per token.

ONNX Runtime runs twice, in a process each: as it is by default, where it decodes all weights once while loading (constant folding), and
without that, where each run decodes them again and memory stays small. All read the cache of keys and values, one token at a time.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import qpc
from benchmarks.rows import BenchmarkError, machine, write_rows
from qpc.checkpoint import tensor_bytes
from qpc.integrations.onnx import export
from qpc.integrations.transformers import load_tokenizer

PROMPT = "Gravity is the force by which a planet or other body draws objects toward its center. The force of gravity"
TOKENS = 32
TOLERANCE = 1e-2
"""Largest error of logits, relative to the largest logit."""

Step = Callable[[NDArray[np.int64], int], NDArray[np.float32]]
"""Logits [1, length, vocabulary] of new tokens [1, length], the total with those before being given."""


@dataclass(frozen=True)
class Run:
    """What a greedy continuation gave. seconds: of each step after the first."""

    logits: NDArray[np.float32]
    tokens: list[int]
    seconds: list[float]
    load_s: float
    peak_bytes: int

    def times(self) -> dict[str, float]:
        """Percentiles in ms."""
        cuts = quantiles(self.seconds, n=10)
        return {f"p{share}_ms": round(1e3 * cuts[share // 10 - 1], 2) for share in (20, 50, 80)}


def main(arguments: list[str]) -> None:
    """Export, run, compare, print, write the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks onnx", description=__doc__)
    parser.add_argument("compiled", type=Path, help="a compiled model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--name", help="of the model, by default that of the directory")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    row = measure(options.compiled, options.threads) | {"model": options.name or options.compiled.name}
    for key, value in row.items():
        print(f"{key:28} {value}")
    write_rows(options.json, "onnx", [row])


def measure(compiled: Path, threads: int) -> dict[str, Any]:
    """One row. Raises `BenchmarkError` if a result is wrong."""
    tokenizer = load_tokenizer(compiled)
    if tokenizer is None:
        raise BenchmarkError(f"{compiled} has no tokenizer")
    ids = np.array([tokenizer(PROMPT)["input_ids"]])
    with tempfile.TemporaryDirectory() as home:
        start_s = time.perf_counter()
        path = export(compiled, Path(home) / "model.onnx")[0]
        export_s = time.perf_counter() - start_s
        file_bytes = sum(file.stat().st_size for file in Path(home).iterdir())
        eager, folded, packed = (
            _apart(_eager, compiled, threads, ids),
            *(_apart(_runtime, path, threads, ids, each) for each in (True, False)),
        )
    stored = sum(tensor_bytes(compiled).values())
    row: dict[str, Any] = {
        "file_bytes": file_bytes,
        "tensor_bytes": stored,
        "share": round(file_bytes / stored, 5),
        "export_s": round(export_s, 1),
    }
    for name, run in (("folded", folded), ("packed", packed)):
        error = float(np.abs(run.logits - eager.logits).max() / np.abs(eager.logits).max())
        if error > TOLERANCE or run.tokens != eager.tokens:
            raise BenchmarkError(
                f"{name}: logits are off by {error:.2g} (at most {TOLERANCE}), tokens {run.tokens} should be {eager.tokens}"
            )
        row |= {f"{name}_error": float(f"{error:.2g}"), f"{name}_tokens_equal": len(run.tokens)}
    for name, run in (("eager", eager), ("folded", folded), ("packed", packed)):
        row |= {f"{name}_load_s": round(run.load_s, 1), f"{name}_peak_bytes": run.peak_bytes}
        row |= {f"{name}_token_{key}": value for key, value in run.times().items()}
    return row | {"device": machine(torch.device("cpu")), "onnxruntime": version("onnxruntime"), "transformers": version("transformers")}


def _apart(function: Callable[..., Run], *arguments: Any) -> Run:
    """The result of a function in a process of its own, whose memory is counted from nothing."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _runtime(path: Path, threads: int, ids: NDArray[np.int64], fold: bool) -> Run:
    import onnxruntime

    start_s = time.perf_counter()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    disabled = [] if fold else ["ConstantFolding"]
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
    load_s = time.perf_counter() - start_s
    values = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    past = {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), dtype=np.float32) for value in values}

    def step(fresh: NDArray[np.int64], total: int) -> NDArray[np.float32]:
        logits, *present = session.run(None, {"input_ids": fresh, "attention_mask": np.ones((1, total), dtype=np.int64), **past})
        past.update(zip(past, present, strict=True))
        return logits

    return _continued(step, ids, load_s)


def _eager(compiled: Path, threads: int, ids: NDArray[np.int64]) -> Run:
    from transformers import DynamicCache

    torch.set_num_threads(threads)
    start_s = time.perf_counter()
    model: Any = qpc.load(compiled).float()
    with torch.no_grad():
        model(torch.from_numpy(ids))  # decodes the weights
        load_s = time.perf_counter() - start_s
        cache = DynamicCache()

        def step(fresh: NDArray[np.int64], total: int) -> NDArray[np.float32]:
            logits: NDArray[np.float32] = model(torch.from_numpy(fresh), past_key_values=cache, use_cache=True).logits.numpy()
            return logits

        return _continued(step, ids, load_s)


def _continued(step: Step, ids: NDArray[np.int64], load_s: float) -> Run:
    logits = step(ids, ids.shape[1])
    latest, tokens, seconds = logits, [], []
    for done in range(TOKENS):
        fresh = latest[:, -1:].argmax(-1)
        tokens.append(int(fresh[0, 0]))
        start_s = time.perf_counter()
        latest = step(fresh, ids.shape[1] + done + 1)
        seconds.append(time.perf_counter() - start_s)
    return Run(logits, tokens, seconds, load_s, _peak_bytes())


def _peak_bytes() -> int:
    """The most memory that this process has held since it began; `getrusage` would count that of the process it came from."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
