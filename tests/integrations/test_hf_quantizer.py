"""`from_pretrained` gives what `qpc.load` gives, `save_pretrained` writes what `qpc.save` writes, and what cannot be read is refused."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import qpc
from qpc import checkpoint, tensor_files
from qpc.errors import CheckpointError, ModelError, QuantizerError, SettingsError
from qpc.integrations.hf_config import QPaletteConfig
from qpc.integrations.transformers import load_pretrained
from qpc.kernels.linear import QuantizedLinear
from qpc.kernels.packed_module import PackedModule
from tests.compiled import TOKENS, logits
from tests.families import FAMILIES, decoder

OPTIONS: dict[str, Any] = {"effort": "fast", "calibration": None, "sensitivity": "random", "same_quantizer_in_group": True}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama_tied": (FAMILIES["llama_tied"], {}),
    "llama_tied_packed": (FAMILIES["llama_tied"], {"embeddings": 6}),
    "gemma3_packed": (partial(decoder, "Gemma3", sliding_window=8, query_pre_attn_scalar=16, tie_word_embeddings=True), {"embeddings": 6}),
    "qwen3": (FAMILIES["qwen3"], {}),
    "gpt2": (FAMILIES["gpt2"], {}),
    "gpt2_packed": (FAMILIES["gpt2"], {"embeddings": 6}),
}
VERSION_4 = transformers.__version__.startswith("4.")


@cache
def compiled(name: str) -> nn.Module:
    """A tiny compiled model. Nobody may change it."""
    make, options = MODELS[name]
    return qpc.compile(make().eval(), 3.5, **OPTIONS, **options)


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("saved") / request.param
    qpc.save(compiled(request.param), directory)
    return directory


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    qpc.save(compiled("llama_tied_packed"), tmp_path / "small")
    return tmp_path / "small"


def read(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **({"dtype": "auto"} | options))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**model.state_dict(), **{f"{name}, a buffer": buffer for name, buffer in model.named_buffers()}}


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    assert type(found) is type(expected)
    mine, theirs = state(found), state(expected)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == mine[name].dtype and torch.equal(mine[name], tensor), name
    assert torch.equal(logits(found), logits(expected))
    assert qpc.report_of(found) == qpc.report_of(expected)


def sharing(model: nn.Module) -> dict[str, int]:
    """Of each tensor, how many others lie in its memory: what is tied, and the rows of one group."""
    places = {name: tensor.untyped_storage().data_ptr() for name, tensor in state(model).items() if tensor.numel()}
    return {name: sum(place == other for other in places.values()) for name, place in places.items()}


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"device_map": "auto"}], ids=str)
def test_from_pretrained_is_load(saved: Path, options: dict[str, Any]) -> None:
    model, expected = read(saved, **options), qpc.load(saved)
    assert_same(model, expected)
    assert sharing(model) == sharing(expected)
    grouped = any(count > 2 for name, count in sharing(model).items() if name.endswith("proj.codes0"))
    assert grouped != saved.name.startswith("gpt2"), "a layer of GPT-2 has no linears of one input"
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
    assert model.is_quantized and not model.hf_quantizer.is_trainable and model.config.quantization_config.quant_method == "qpalette"
    prompt = torch.tensor([[1, 2, 3]])
    assert torch.equal(*(each.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0) for each in (model, expected)))


def test_nothing_is_reported_missing(saved: Path) -> None:
    _, report = read(saved, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def test_tied_tables_stay_tied(saved: Path) -> None:
    model = read(saved)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    model.tie_weights()
    if isinstance(embedding, PackedModule):
        assert head.codes0 is embedding.codes0 and head.scales is embedding.scales and getattr(head, "weight", None) is None
        model.to(torch.float16)
        assert head.codes0 is embedding.codes0 and embedding(torch.tensor([1])).dtype == torch.float16
    else:
        assert (head.weight is embedding.weight) == (saved.name != "qwen3")


def without_transformers_version(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return {key: value for key, value in found.items() if key != "transformers_version"}


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
def test_a_second_save_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    doors = {
        "from_pretrained": read(saved),
        "device_map": read(saved, device_map="cpu"),
        "load": qpc.load(saved),
        "compile": compiled(saved.name),
        "copy": copy.deepcopy(compiled(saved.name)),
    }
    for door, model in doors.items():
        model.save_pretrained(tmp_path / door)
        qpc.save(model, tmp_path / f"{door} saved")
        for again in (tmp_path / door, tmp_path / f"{door} saved"):
            for name in (checkpoint.TENSORS, checkpoint.MANIFEST, "generation_config.json"):
                assert (again / name).read_bytes() == (saved / name).read_bytes(), (door, name)
            assert without_transformers_version(again) == without_transformers_version(saved)


def test_shards(saved: Path, tmp_path: Path) -> None:
    whole = read(saved)
    whole.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2 and not (tmp_path / "shards" / checkpoint.TENSORS).exists()
    for model in (read(tmp_path / "shards"), qpc.load(tmp_path / "shards")):
        assert_same(model, whole)
    read(tmp_path / "shards").save_pretrained(tmp_path / "again", max_shard_size="20KB")
    for path in (tmp_path / "shards").glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["llama_tied_packed", "gpt2", "gemma3_packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtype(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Codes and scales never change; all else is what the same dtype makes of the stored values."""
    qpc.save(compiled(name), tmp_path / "single")
    model, stored = read(tmp_path / "single", dtype=dtype), qpc.load(tmp_path / "single").state_dict()
    for key, tensor in model.state_dict().items():
        packed = not tensor.is_floating_point() or key.endswith(".scales")
        assert tensor.dtype == (stored[key].dtype if packed else dtype) and torch.equal(tensor, stored[key].to(tensor.dtype)), key
    assert logits(model).dtype == dtype and logits(model).isfinite().all()
    model.save_pretrained(tmp_path / "again")
    assert_same(read(tmp_path / "again"), model)
    assert torch.equal(logits(qpc.load(tmp_path / "again")), logits(model))


def test_dtype_of_the_original_is_kept(tmp_path: Path) -> None:
    MODELS["llama_tied"][0]().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    model = qpc.compile(load_pretrained(tmp_path / "model")[0], 3.5, **OPTIONS, embeddings=6)
    qpc.save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(read(tmp_path / "out"), model)


@pytest.mark.parametrize("name", ["llama_tied_packed", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}], ids=str)
def test_compiled_on_the_fly(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    make, more = MODELS[name]
    make().save_pretrained(tmp_path / "model")
    model = read(tmp_path / "model", quantization_config=qpc.QPaletteConfig(budget=3.5, **OPTIONS, **more), **options)
    expected = qpc.compile(load_pretrained(tmp_path / "model")[0], 3.5, **OPTIONS, **more)
    assert_same(model, expected)
    assert sharing(model) == sharing(expected)
    qpc.save(expected, tmp_path / "expected")
    qpc.save(model, tmp_path / "found")
    assert (tmp_path / "found" / checkpoint.TENSORS).read_bytes() == (tmp_path / "expected" / checkpoint.TENSORS).read_bytes()
    assert_same(read(tmp_path / "found"), expected)


def run(program: str, **environment: str) -> str:
    """The last line that a fresh process prints."""
    root = Path(__file__).parents[2]
    inherited = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH", ""))))
    surroundings = os.environ | {"PYTHONPATH": inherited, "HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300, env=surroundings)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


READ = """
import torch
tokens = torch.arange(40).reshape(2, 20) % 60
found = AutoModelForCausalLM.from_pretrained({name!r}, dtype="auto")
with torch.no_grad():
    print(torch.equal(found(tokens).logits, qpc.load({directory!r})(tokens).logits))
"""
FIRST = "import qpc\nfrom transformers import AutoModelForCausalLM\n"
KNOWN = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\nprint('qpalette' in AUTO_QUANTIZER_MAPPING)"


def test_a_fresh_process_imports_only_qpc_and_transformers(small: Path) -> None:
    assert run(FIRST + READ.format(name=str(small), directory=str(small))) == "True"


@pytest.mark.parametrize(
    "imports",
    [
        FIRST,
        "from transformers import LlamaForCausalLM\nimport qpc",
        "import qpc\nassert qpc.QPaletteConfig(budget=3).budget == 3",
        "import qpc.integrations.hf_quantizer",
    ],
)
def test_the_method_is_known_in_whichever_order_it_is_imported(imports: str) -> None:
    assert run(f"{imports}\n{KNOWN}") == "True"


def test_importing_qpc_does_not_import_transformers() -> None:
    assert run("import sys, qpc; print('transformers' in sys.modules or 'torch' in sys.modules)") == "False"


def test_from_the_cache_of_a_hub(small: Path, tmp_path: Path) -> None:
    """The name of a repository is read from where the hub's files are kept, manifest and all."""
    revision = "0" * 40
    repository = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(small, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    assert run(FIRST + READ.format(name="owner/name", directory=str(small)), HF_HUB_CACHE=str(tmp_path / "hub")) == "True"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_manifest(directory: Path, **changes: object) -> None:
    edit(directory / checkpoint.MANIFEST, **changes)


def unknown_quantizer(directory: Path) -> None:
    linears = json.loads((directory / checkpoint.MANIFEST).read_text())["linears"]
    next(iter(linears.values()))["quantizer"] = {"kind": "lattice", "bits": 3}
    edit_manifest(directory, linears=linears)


def forget_tensor(directory: Path) -> None:
    tensors = load_file(directory / checkpoint.TENSORS)
    del tensors["model.layers.1.mlp.down_proj.codes0"]
    save_file(tensors, directory / checkpoint.TENSORS, metadata={"format": "pt"})


def edit_facts(**facts: object) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        found = json.loads((directory / "config.json").read_text())["quantization_config"]
        edit(directory / "config.json", quantization_config=found | facts)

    return apply


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda directory: (directory / checkpoint.MANIFEST).unlink(), CheckpointError, r"no qpc\.json"),
        (lambda directory: (directory / checkpoint.MANIFEST).write_text("{"), CheckpointError, "damaged"),
        (partial(edit_manifest, format_version=99), CheckpointError, "format version 99, this qpc reads 3"),
        (partial(edit_manifest, aliases={"lm_head.codes0": "nowhere"}), CheckpointError, "lacks; the checkpoint is damaged"),
        (unknown_quantizer, QuantizerError, "kind must be"),
        (forget_tensor, CheckpointError, r"lacks the tensor model\.layers\.1\.mlp\.down_proj\.codes0"),
        (edit_facts(format_version=99), CheckpointError, "format version 99, this qpc reads 3"),
        (edit_facts(manifest="/etc/passwd"), CheckpointError, r"manifest='qpc\.json'"),
        (edit_facts(budget=3), CheckpointError, "damaged"),
    ],
)
def test_damage_is_refused(small: Path, damage: Callable[[Path], object], error: type[Exception], message: str) -> None:
    damage(small)
    with pytest.raises(error, match=message):
        read(small)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "cannot be read"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "no valid weight_map"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "missing"),
        ('{"weight_map": {"a": "part.safetensors"}}', "lacks the tensor a"),
    ],
)
def test_damaged_shards_are_refused(small: Path, index: str, message: str) -> None:
    (small / checkpoint.TENSORS).rename(small / "part.safetensors")
    (small / tensor_files.INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=message):
        qpc.load(small)


def test_a_checkpoint_that_does_not_name_the_method_is_loaded(small: Path) -> None:
    expected = qpc.load(small)
    found = json.loads((small / "config.json").read_text())
    del found["quantization_config"]
    (small / "config.json").write_text(json.dumps(found))
    assert_same(qpc.load(small), expected)


def test_what_is_quantized_is_not_compiled(small: Path, tiny_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"already quantized \(qpalette\)"):
        load_pretrained(small)
    other = shutil.copytree(tiny_directory, tmp_path / "other")
    edit(other / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(ValueError, match="quantized with AwqConfig but you are passing a QPaletteConfig"):
        read(other, quantization_config=QPaletteConfig(budget=3.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4}, "without a budget"),
        ({"budget": 3, "group_size": 64}, "options of qpc.compile.*group_size"),
        ({"budget": 3, "effort": "heroic"}, "heroic"),
        ({"quant_method": "awq"}, "awq"),
    ],
)
def test_requests_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(qpc.QpcError, match=message):
        QPaletteConfig(**options)


def test_a_request_needs_a_budget_and_one_device(tiny_directory: Path) -> None:
    with pytest.raises(SettingsError, match="no budget"):
        read(tiny_directory, quantization_config=QPaletteConfig())
    with pytest.raises(ModelError, match="not offloaded"):
        read(tiny_directory, quantization_config=QPaletteConfig(budget=3), device_map={"model": "cpu", "lm_head": "disk"})


def test_a_request_survives_being_a_dictionary() -> None:
    request = QPaletteConfig(budget="4bit, 0.1nats", seed=7)
    assert QPaletteConfig.from_dict(json.loads(json.dumps(request.to_dict()))).to_dict() == request.to_dict()
    assert (
        json.loads(QPaletteConfig(budget=3, calibration=torch.ones(1, 4, dtype=torch.int64)).to_json_string(use_diff=False))["budget"] == 3
    )


def test_training_is_refused(small: Path) -> None:
    model = read(small)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with pytest.raises((RuntimeError, NotImplementedError), match="qpc"):
        model(input_ids=TOKENS, use_cache=False).logits.sum().backward()


def test_saving_past_the_model_is_refused(small: Path, tmp_path: Path) -> None:
    model = read(small)
    with pytest.raises(ModelError, match="own save_pretrained"):
        type(model).save_pretrained(model, tmp_path / "out")


def test_plain_models_of_a_process_with_qpc_are_left_alone(tiny_directory: Path) -> None:
    model = read(tiny_directory)
    assert not getattr(model, "is_quantized", False) and not any(isinstance(module, QuantizedLinear) for module in model.modules())
