"""Memory and time of `qpc compile --stream` on the shapes of Llama 3.1 8B with random weights, in a process of its own.

The model (16 GB of bfloat16 in shards) and sensitivities are written to a directory first, unless they are there. The command is ended with
SIGKILL once it has packed the linears of some decoder layers, called again, which must not pack one of them again, and ended one linear
later; the time of all layers is extrapolated. With `--layers 32` it runs to its end, once. The bound of memory is four times the largest
linear in float32 and 1.5 GB; on a GPU, whose libraries alone take as much, memory is stated but not checked.

With `--calibration-tokens` errors are fed back. The tokens are random: this is about memory and time. The bound is then four times a
decoder layer in float32 and 1.5 GB, the weights of all seven of its linears counted (`layer_weights` of a row): what is held are those of
half a layer, as they are stored, and about three matrices of the size of the widest moment.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.llama import DEVIATION, LLAMA_8B, TINY
from benchmarks.rows import BenchmarkError, machine, write_rows
from qpc.sensitivity import Loss, Sensitivities
from qpc.token_file import Origin, TokenFile

LINEARS = 7
"""Of a decoder layer."""

ALLOWED_BYTES = 1_500_000_000
"""Above four times the largest linear, or layer."""

TOKENS, SEQUENCE = "tokens.safetensors", 256
"""The file to calibrate on, and the length of its sequences."""


def main(arguments: list[str]) -> None:
    """Write the model, run the command twice, check, print, write the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks streaming", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="for model and result, 22 GB; removed in the end unless --keep")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers to pack before the command is ended")
    parser.add_argument("--model-layers", type=int, help="decoder layers that the model has, 32 by default")
    parser.add_argument("--calibration-tokens", type=int, default=0)
    parser.add_argument("--bits", default="3")
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to the end")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    sizes = TINY if options.quick else LLAMA_8B
    sizes |= {} if options.model_layers is None else {"num_hidden_layers": options.model_layers}
    try:
        model = options.directory / "model"
        if not (model / "sensitivities.json").is_file():
            write_model(model, sizes)
        write_tokens(model, sizes, options.calibration_tokens)
        layers = sizes["num_hidden_layers"] if options.quick else options.layers
        command = Command(model, options.directory / "out", options.bits, options.effort, options.calibration_tokens)
        row = measure(command, sizes, layers)
    finally:
        if not options.keep:
            shutil.rmtree(options.directory, ignore_errors=True)
    for key, value in row.items():
        print(f"{key:24} {value}")
    write_rows(options.json, "streaming", [row])


def write_model(directory: Path, sizes: dict[str, Any]) -> None:
    """Shards, configuration and sensitivities, a decoder layer at a time."""
    from transformers import LlamaConfig

    directory.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**sizes, dtype="bfloat16", architectures=["LlamaForCausalLM"], bos_token_id=0)
    config.save_pretrained(directory)
    torch.manual_seed(0)
    table = {"weight": (sizes["vocab_size"], sizes["hidden_size"])}
    save_file(drawn("model.embed_tokens.", table), directory / "embeddings.safetensors", metadata={"format": "pt"})
    save_file(drawn("lm_head.", table) | drawn("model.norm.", {"weight": (sizes["hidden_size"],)}), directory / "head.safetensors")
    for layer in range(sizes["num_hidden_layers"]):
        shard = drawn(f"model.layers.{layer}.", layer_shapes(sizes))
        save_file(shard, directory / f"layer-{layer:02d}.safetensors", metadata={"format": "pt"})
    draw = random.Random(0)
    names = [name.removesuffix(".weight") for name, shape in layer_shapes(sizes).items() if len(shape) == 2]
    layers = range(sizes["num_hidden_layers"])
    values = {f"model.layers.{layer}.{name}": 10 ** draw.uniform(-2, 0) for layer in layers for name in names}
    text = Sensitivities(values, Loss.KL, noise=0.0, seed=0, tokens=1).to_json()
    (directory / "sensitivities.json").write_text(text, encoding="utf-8")


def write_tokens(directory: Path, sizes: dict[str, Any], tokens: int) -> None:
    """Random ones, as `qpc sample` would write its own, unless they are there: a journal knows a file by its time too. None for 0."""
    if not tokens:
        return
    path = directory / TOKENS
    drawn = torch.randint(sizes["vocab_size"], (tokens // SEQUENCE, SEQUENCE), generator=torch.Generator().manual_seed(0))
    if not path.is_file() or not torch.equal(TokenFile.read(path).tokens, drawn):
        TokenFile(drawn, Origin("random tokens", "none", sizes["vocab_size"], 0)).write(path)


def layer_shapes(sizes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of a decoder layer."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    narrow = width // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    return {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (narrow, width),
        "self_attn.v_proj.weight": (narrow, width),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
    }


def drawn(prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random matrices in bfloat16, vectors of ones."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where billions of numbers take seconds
    made = {name: torch.empty(shape, dtype=torch.bfloat16, device=device) for name, shape in shapes.items()}
    for value in made.values():
        _ = value.normal_(std=DEVIATION) if value.ndim == 2 else value.fill_(1)
    return {f"{prefix}{name}": value.cpu() for name, value in made.items()}


def measure(command: "Command", sizes: dict[str, Any], layers: int) -> dict[str, Any]:
    """One row. Raises `BenchmarkError` if memory exceeds the bound, or a weight is packed twice."""
    shapes = [shape for shape in layer_shapes(sizes).values() if len(shape) == 2]
    largest = max(rows * columns for rows, columns in shapes)
    weights = sum(rows * columns for rows, columns in shapes)
    bound = 4 * 4 * (weights if command.tokens else largest) + ALLOWED_BYTES
    total = sizes["num_hidden_layers"]
    first = Run.of(command, layers * LINEARS, layers < total)
    row: dict[str, Any] = {
        "model": f"Llama, {total} layers of {sizes['hidden_size']}, random bfloat16",
        "model_bytes": sum(path.stat().st_size for path in command.model.glob("*.safetensors") if path.name != TOKENS),
        "largest_linear": largest,
        "layer_weights": weights,
        "bits": command.bits,
        "effort": command.effort,
        "calibration_tokens": command.tokens,
        "bound_bytes": bound,
        "peak_bytes": first.peak_bytes,
        "planned_s": round(first.planned_s, 1),
        "copied_s": round(first.copied_s, 1),
        "layers": first.packed // LINEARS,
        "weights_per_s": round((first.packed / LINEARS * weights - shapes[0][0] * shapes[0][1]) / max(first.packed_s, 0.1)),
    }
    row["all_layers_s"] = round(total * weights / row["weights_per_s"])
    if layers == total:
        row["wall_s"] = round(first.whole_s, 1)
    else:
        before = [entry for entry in journal(command.output) if "facts" in entry]
        second = Run.of(command, layers * LINEARS + 1, True)
        steps = [entry["step"] for entry in journal(command.output) if "facts" in entry]
        if len(steps) != len(set(steps)) or steps[: len(before)] != [entry["step"] for entry in before]:
            raise BenchmarkError("a weight that was finished was packed again")
        row["resumed_peak_bytes"] = second.peak_bytes
    peak = max(row["peak_bytes"], row.get("resumed_peak_bytes", 0))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if peak > bound and device.type == "cpu":
        raise BenchmarkError(f"the process took {peak} bytes, {bound} are allowed")
    return row | {"share_of_bound": round(peak / bound, 3), "device": machine(device)}


def journal(output: Path) -> list[dict[str, Any]]:
    """What is finished."""
    path = output.with_name(f"{output.name}.journal")
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class Command:
    """What is compiled to where. tokens: to calibrate on."""

    model: Path
    output: Path
    bits: str
    effort: str
    tokens: int

    @property
    def line(self) -> list[str]:
        """As it is called."""
        calibration = str(self.model / TOKENS) if self.tokens else "none"
        line = [sys.executable, "-m", "qpc", "compile", str(self.model), "-o", str(self.output), "--stream", "--bits", self.bits]
        line += ["--effort", self.effort, "--calibration", calibration, "--sensitivities", str(self.model / "sensitivities.json")]
        return [*line, "--json"]


class Run:
    """One run of the command. Times in seconds: until the allocation, until the first weight is packed, for the others; and in all."""

    def __init__(self) -> None:
        self.peak_bytes = self.packed = 0
        self.planned_s = self.copied_s = self.packed_s = self.whole_s = 0.0

    @staticmethod
    def of(command: Command, stop: int, stop_early: bool) -> "Run":
        """Run until the journal has so many packed weights, or to the end. Raises `BenchmarkError` if the command fails."""
        output = command.output
        run = Run()
        start_s, before, known = time.monotonic(), packed_steps(output), len(journal(output))
        first_s = 0.0
        with subprocess.Popen(command.line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                run.peak_bytes = peak_bytes(process.pid) or run.peak_bytes
                entries, now_s, packed = len(journal(output)), time.monotonic() - start_s, packed_steps(output) - before
                run.planned_s = run.planned_s or (now_s if entries > known else 0.0)
                if packed > run.packed:
                    first_s = first_s or now_s
                    run.copied_s, run.packed_s, run.packed = first_s - run.planned_s, now_s - first_s, packed
                if before + packed >= stop and stop_early:
                    process.kill()
                    return run
                time.sleep(0.1)
            problems = process.stderr.read() if process.stderr else ""
        run.whole_s = time.monotonic() - start_s
        if process.returncode:
            raise BenchmarkError(f"the command failed: {problems.strip()[-500:]}")
        return run


def packed_steps(output: Path) -> int:
    """Weights that are finished."""
    return sum("facts" in entry for entry in journal(output))


def peak_bytes(process: int) -> int:
    """The most memory that a process has held since it began; `getrusage` would count that of this process, which started it."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
