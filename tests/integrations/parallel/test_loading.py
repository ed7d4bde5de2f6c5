"""Two processes that share a model give what one gives, hold about half of it each, and refuse together what cannot be shared."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import qpc
from qpc.errors import SettingsError
from qpc.kernels.linear import QuantizedLinear
from qpc.kernels.packed_module import PackedModule
from qpc.quant.mixed import MixedRateQuantizer
from tests.compiled import logits
from tests.families import decoder
from tests.integrations.parallel.worker import code_bytes, continued, stored_bytes

ROOT = Path(__file__).parents[3]
TIMEOUT_S = 600

TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}
"""Of logits in float32, relative to the largest: what another order of summation may change."""

BUDGET = 1.75
"""With few bits the windows of trellises are short, and their tables soon made."""

SIZES = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
OPTIONS: dict[str, Any] = {"effort": "fast", "calibration": None, "sensitivity": "random", "tune": "off"}
GROUPED = {"same_quantizer_in_group": True, "gpu": "h100"}
GOOD: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}, {"rotation_block": 128, **GROUPED}),
    "phi3": ("Phi3", {}, {"rotation_block": 64, "embeddings": 2}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}, {"rotation_block": 64, "embeddings": 2, "fold": True}),
}
"""Biases on every axis, groups and mixed rates; outputs that are gathered in unequal parts; gains, ties and packed tables."""

NAMES = sorted(GOOD)
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class Shared(NamedTuple):
    """A directory of checkpoints, and what each of two processes wrote about them."""

    directory: Path
    device: str
    tensors: list[dict[str, Tensor]]
    facts: list[dict[str, Any]]


def change(source: Path, target: Path, name: str, edit: Callable[[Any], Any]) -> None:
    """A copy of a checkpoint with another value in one of its JSON files."""
    shutil.copytree(source, target)
    (target / name).write_text(json.dumps(edit(json.loads((target / name).read_text()))))


@pytest.fixture(
    scope="module",
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))],
)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    directory: Path = tmp_path_factory.mktemp("parallel")
    for name, (architecture, shape, options) in GOOD.items():
        qpc.save(qpc.compile(decoder(architecture, **SIZES | shape), BUDGET, **OPTIONS, **options), directory / "good" / name)
    llama, heads, rotation = (directory / place for place in ("good/llama", "bad/heads", "bad/rotation"))
    change(llama, heads, "config.json", lambda config: config | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128})
    change(llama, rotation, "qpc.json", lambda manifest: manifest["linears"]["model.layers.0.mlp.down_proj"].update(block=256) or manifest)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*launch, "tests.integrations.parallel.worker", str(directory), request.param]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-5000:]
    tensors = [load_file(directory / f"rank{rank}.safetensors") for rank in range(2)]
    return Shared(directory, request.param, tensors, [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)])


@pytest.mark.parametrize(("name", "kind"), [*((name, "logits") for name in NAMES), ("llama", "traced")])
def test_logits_are_those_of_one_process(shared: Shared, name: str, kind: str) -> None:
    expected = logits(qpc.load(shared.directory / "good" / name, device=shared.device)).cpu()
    found = [tensors[f"{name}.{kind}"] for tensors in shared.tensors]
    assert torch.equal(*found), "both processes have the same sums"
    assert (found[0] - expected).abs().max() <= TOLERANCE[shared.device] * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_one_process(shared: Shared, name: str) -> None:
    theirs, ours = continued(qpc.load(shared.directory / "good" / name, device=shared.device))
    for tensors in shared.tensors:
        assert torch.equal(tensors[f"{name}.theirs"], theirs)
        assert torch.equal(tensors[f"{name}.ours"], ours)


@pytest.mark.parametrize("name", NAMES)
def test_each_process_holds_its_part(shared: Shared, name: str) -> None:
    """Each code is held once. Of what is split each has half, but for the rates of a mixture and row scales behind columns."""
    whole = qpc.load(shared.directory / "good" / name)
    split = stored_bytes(*(module for key, module in whole.named_modules() if key.endswith("_proj")))
    kept = stored_bytes(whole) - split
    assert sum(facts[f"{name}.codes"] for facts in shared.facts) == code_bytes(whole)
    assert all(facts[f"{name}.bytes"] < kept + 0.6 * split for facts in shared.facts)


def test_groups_of_parts_multiply_once(shared: Shared) -> None:
    """Query, key and value of a traced layer are one product, gate and up another."""
    whole = qpc.load(shared.directory / "good" / "llama")
    linears = [module for module in whole.modules() if isinstance(module, QuantizedLinear)]
    groups = {id(linear.group or linear) for linear in linears}
    assert len(groups) < len(linears) and any(isinstance(linear.quantizer, MixedRateQuantizer) for linear in linears)
    for facts in shared.facts:
        assert facts["llama.operators"]["trellis_linear.default"] == len(groups)


def test_what_the_checkpoints_cover(shared: Shared) -> None:
    """The three hold what is said of them."""
    phi3, qwen2 = (qpc.load(shared.directory / "good" / name) for name in ("phi3", "qwen2"))
    assert isinstance(phi3.lm_head, PackedModule) and phi3.lm_head.out_features % 128, "its rows are 64 and 32"
    assert qwen2.lm_head.codes[0] is qwen2.model.embed_tokens.codes[0] and qwen2.model.layers[0].self_attn.o_proj.block == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "heads",
            "CheckpointError: model.layers.0.self_attn.k_proj cannot be split over 2 processes: it has 1 head of 128 rows, which are no",
        ),
        ("rotation", "CheckpointError: model.layers.0.mlp.down_proj cannot be split over 2 processes: of its 256 columns each would"),
        ("rotation", "required a multiple of 256 (blocks of codes and of its rotation); compile again with --rotation-block 128"),
        ("three", "SettingsError: tp=3 is not the number of processes, which is 2"),
        ("axes", "SettingsError: the mesh has 2 axes ('dp', 'tp'), required one"),
        ("other device", "SettingsError: the mesh is of 'cpu' and the device 'cuda'; load with device='cpu'"),
        pytest.param("no GPUs", "SettingsError: 2 processes of this machine need a GPU each, it has 0", marks=WITHOUT_GPU),
        pytest.param("transformers", "ModelError: transformers cannot split packed weights; use qpc.load(", marks=WITHOUT_GPU),
        ("runtime", "SettingsError: runtime='tensorrt' does not run parts of a model"),
        ("different", "CheckpointError: the processes read different checkpoints"),
        *((f"saving {name}", "CheckpointError: this is one of 2 parts of a model, which cannot be saved") for name in NAMES),
        *((f"saving {name} by transformers", "CheckpointError: this is one of 2 parts of a model") for name in NAMES),
    ],
)
def test_all_processes_refuse(shared: Shared, name: str, message: str) -> None:
    for facts in shared.facts:
        assert message in facts["refused"][name]
    assert not (shared.directory / "saved").exists()


def test_nobody_waits_for_a_process_that_failed(shared: Shared) -> None:
    found = [facts["refused"]["missing in one"] for facts in shared.facts]
    assert "another process could not load its part" in found[0] and "nowhere is not a directory" in found[1]


@pytest.mark.parametrize(
    ("tp", "message"),
    [
        (2, r"tp=2 needs 2 processes, this is one; start them with torchrun --nproc-per-node 2"),
        (0, r"tp=0 must be at least 1 process"),
        (True, r"tp=True must be at least 1 process"),
        (2.0, r"tp=2\.0 must be at least 1 process"),
        ("two", r"unknown tp='two'; give the number of processes, 'auto', or a DeviceMesh"),
    ],
)
def test_processes_that_are_not_there(tp: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        qpc.load(tmp_path, tp=tp)
