"""vLLM continues prompts as `qpc.load` does, token for token, and says why it does not serve a checkpoint."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

import qpc
from qpc.sensitivity import Loss, Sensitivities
from tests.families import causal_lm, decoder
from tests.vllm.serve import LENGTH, PROMPTS

pytest.importorskip("vllm", reason="vLLM pins other versions and has an environment of its own: make test-vllm")

BYTES = {"vocab_size": 257, "bos_token_id": 0, "eos_token_id": None, "initializer_range": 0.2}
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen3": partial(decoder, "Qwen3", **BYTES, **WIDE),
    "llama": partial(decoder, "Llama", **BYTES, **WIDE),
    "gemma3": partial(decoder, "Gemma3", **BYTES, **WIDE, sliding_window=8),
    "llama, tied": partial(decoder, "Llama", **BYTES, **WIDE, tie_word_embeddings=True),
    "phi3": partial(decoder, "Phi3", **BYTES, **WIDE | {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "gpt2": partial(causal_lm, "GPT2", **BYTES, n_embd=128, n_layer=2, n_head=2, n_positions=128),
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "compiled by vLLM": ("qwen3", {}, {"enforce_eager": False}),
    "two ranks": ("qwen3", {"rotation_block": 128}, {"tensor_parallel_size": 2}),
    "excluded linears": ("llama", {"exclude": ["*.1.self_attn.*", "*.0.mlp.down_proj"]}, {}),
    "folded": ("llama", {"fold": True}, {}),
    "sliding windows": ("gemma3", {}, {}),
    "fused in the checkpoint": ("phi3", {}, {}),
    "biases": ("gpt2", {}, {}),
    "packed embeddings": ("gemma3", {"embeddings": 6}, {}),
}
"""A model, options of the compiler, options of the engine."""


@pytest.fixture
def save(tmp_path: Path, tiny_directory: Path) -> Callable[..., Path]:
    """Compile a tiny model and write it, with a tokenizer."""

    def write(name: str, **options: Any) -> Path:
        usual = {"effort": "fast", "calibration": None, "sensitivity": "random", "same_quantizer_in_group": True}
        qpc.save(qpc.compile(MODELS[name](), 4, **usual | options), tmp_path / name, tokenizer_from=tiny_directory)
        return tmp_path / name

    return write


def serve(directory: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run an engine; the tokens are beside the checkpoint."""
    here = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    if "tensor_parallel_size" in options:
        here["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(options["tensor_parallel_size"])))
    command = [sys.executable, "-m", "tests.vllm.serve", str(directory), str(directory / "tokens.json"), json.dumps(options)]
    return subprocess.run(command, env=os.environ | here, capture_output=True, text=True, timeout=900)


def served(directory: Path, **options: Any) -> list[list[int]]:
    """The tokens of each prompt."""
    ended = serve(directory, **options)
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: list[list[int]] = json.loads((directory / "tokens.json").read_text(encoding="utf-8"))
    return found


def expected(directory: Path) -> list[list[int]]:
    """The same by the model itself."""
    model, tokenizer = qpc.load(directory).float(), AutoTokenizer.from_pretrained(directory)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        mask = torch.ones_like(ids)
        longer = model.generate(ids, attention_mask=mask, min_new_tokens=LENGTH, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
        found.append(longer[0, ids.shape[1] :].tolist())
    return found


@pytest.mark.parametrize("case", CASES)
def test_same_tokens(save: Callable[..., Path], case: str) -> None:
    name, options, engine = CASES[case]
    directory = save(name, **options)
    tokens = expected(directory)
    assert len({token for sequence in tokens for token in sequence}) > 10, "an answer that cannot be told from another"
    assert served(directory, **engine) == tokens


@pytest.mark.parametrize("embeddings", [(), ("--embeddings", "6")], ids=["", "packed embeddings"])
def test_same_tokens_of_a_real_model(request: pytest.FixtureRequest, tmp_path: Path, embeddings: tuple[str, ...]) -> None:
    original = request.config.getoption("--smollm2")
    if original is None:
        pytest.skip("give --smollm2 DIR, the model that `make demo` unpacks")
    alike = tmp_path / "alike.json"
    leaves = (*(f"self_attn.{leaf}_proj" for leaf in "qkvo"), *(f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")))
    values = {f"model.layers.{layer}.{leaf}": 1.0 for layer in range(30) for leaf in leaves}
    alike.write_text(Sensitivities(values, Loss.KL, noise=0, seed=0, tokens=0).to_json(), encoding="utf-8")
    command = [sys.executable, "-m", "qpc", "compile", original, "-o", tmp_path / "out", "--bits", "4", "--effort", "fast"]
    given = ["--same-in-group", "--calibration", "none", "--sensitivities", alike, *embeddings]
    subprocess.run([str(word) for word in (*command, *given)], check=True, capture_output=True)
    assert served(tmp_path / "out") == expected(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "options", "engine", "told"),
    [
        (
            "qwen3",
            {"same_quantizer_in_group": False, "exclude": ["*.k_proj"]},
            {},
            "vLLM runs model.layers.0.self_attn.qkv_proj as one weight, but its members have different quantizers: q_proj trellis",
        ),
        ("qwen3", {}, {"tensor_parallel_size": 2}, "compile again with --rotation-block 128"),
        ("llama, tied", {"fold": True}, {}, "has a gain between two rotations, which is not supported under vLLM; compile without --fold"),
    ],
    ids=["groups that disagree", "rotation across ranks", "gains that are left"],
)
def test_what_is_not_served_is_refused(
    save: Callable[..., Path], name: str, options: dict[str, Any], engine: dict[str, Any], told: str
) -> None:
    ended = serve(save(name, **options), **engine)
    assert ended.returncode != 0 and told in ended.stdout + ended.stderr
