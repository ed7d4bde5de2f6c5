"""Language models of Hugging Face transformers: read from a local directory, never from a hub, never with remote code."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qpc.errors import CheckpointError, ModelError

METHOD = "qpalette"
"""The name under which transformers knows models that qpc compiled."""

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def is_pretrained(model: nn.Module) -> bool:
    """Whether the class of a model comes from transformers, which is not imported for the answer."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(model, library.PreTrainedModel)


def load_pretrained(directory: Path | str, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any | None]:
    """Load a causal language model, in eval mode, and its tokenizer (None if the directory has none).

    directory: safetensors with config.json, or one GGUF file, which is dequantized; a path to a GGUF file works too.
    dtype: that of the parameters; by default as stored (float32 for GGUF).
    Raises `ModelError` for anything missing, unsupported, cut short or not finite.
    """
    directory = Path(directory)
    gguf = gguf_file(directory)
    home = directory if gguf is None else gguf.parent
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if gguf is None:
        check_directory(directory)
        options |= {"dtype": "auto" if dtype is None else dtype, "use_safetensors": True}
    else:
        options |= {"dtype": dtype or torch.float32, "gguf_file": gguf.name} | dequantized()
    model = load_model(home, options)
    check_finite(model)
    return model.eval(), load_tokenizer(home, None if gguf is None else gguf.name)


def skeleton(directory: Path | str) -> nn.Module:
    """The model that config.json describes, in eval mode: parameters on the meta device, tied as they should be, buffers real.

    Raises `ModelError` if the configuration is missing or describes nothing that can be built.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM, GenerationConfig

    directory = Path(directory)
    config = read_config(directory)
    if quantized_by(config) == METHOD:
        del config.quantization_config
    refuse_quantized(config, directory)
    auto: Any = AutoModelForCausalLM
    try:
        with init_empty_weights(include_buffers=False):
            model = auto.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise ModelError(f"{directory / 'config.json'} describes no causal language model that can be built: {one_line(error)}") from error
    model.tie_weights()
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    module: nn.Module = model.eval()
    return module


def load_tokenizer(directory: Path | str, gguf: str | None = None) -> Any | None:
    """The tokenizer of a model's directory, or None if it has none. Raises `ModelError` for one that cannot be read."""
    from transformers import AutoTokenizer

    directory = Path(directory)
    if gguf is None and not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    source = {} if gguf is None else {"gguf_file": gguf}
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **source)
    except Exception as error:
        raise ModelError(f"the tokenizer in {directory} cannot be read: {one_line(error)}") from error


def copy_tokenizer_files(source: Path | str, target: Path | str) -> None:
    """Put the tokenizer of the model in `source` beside the one in `target`; a GGUF's is written out. Nothing happens if there is none."""
    source, target = Path(source), Path(target)
    gguf = gguf_file(source)
    if gguf is not None:
        tokenizer = load_tokenizer(gguf.parent, gguf.name)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is or holds, if it is to be read: safetensors go first."""
    if path.is_file() and path.suffix == ".gguf":
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ModelError(f"{path} holds {len(found)} GGUF files ({names}); name the one to read")
    return found[0] if found else None


def check_directory(directory: Path) -> None:
    """Raise `ModelError` unless `directory` holds a configuration and safetensors."""
    if not directory.exists():
        raise ModelError(f"{directory} does not exist; give a local directory with config.json and safetensors, or a GGUF file")
    if not directory.is_dir():
        raise ModelError(f"{directory} is a file; give the directory that holds config.json and the safetensors")
    load_config(directory)
    if not any(directory.glob("*.safetensors")):
        raise ModelError(f"{directory} holds no *.safetensors and no *.gguf; pickled weights (*.bin, *.pt) are not read")


def load_config(directory: Path) -> Any:
    """The configuration of a model that has not been quantized. Raises `ModelError`."""
    config = read_config(directory)
    refuse_quantized(config, directory)
    return config


def read_config(directory: Path) -> Any:
    """The configuration of a model. Raises `ModelError`."""
    from transformers import AutoConfig

    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{directory} has no config.json; give the directory of a Hugging Face causal language model")
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{path} cannot be read: {one_line(error)}") from error


def quantized_by(config: Any) -> str | None:
    """The quantization method that a configuration names."""
    quantized = getattr(config, "quantization_config", None)
    if quantized is None:
        return None
    return str(quantized.get("quant_method", "unknown")) if isinstance(quantized, dict) else type(quantized).__name__


def refuse_quantized(config: Any, directory: Path) -> None:
    """Raise `ModelError` if a configuration names a quantization method."""
    method = quantized_by(config)
    if method is not None:
        path = directory / "config.json"
        raise ModelError(f"{path} says that the model is already quantized ({method}); compile the original instead")


def load_model(directory: Path, options: dict[str, Any]) -> Any:
    """Call transformers, with every failure and every missing weight turned into a `ModelError`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    auto: Any = AutoModelForCausalLM
    logging: Any = transformers_logging
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = auto.from_pretrained(directory, output_loading_info=True, **options)
    except Exception as error:
        raise ModelError(f"the model in {directory} cannot be loaded: {one_line(error)}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    for problem, keys in (("missing", report["missing_keys"]), ("of another shape", report["mismatched_keys"])):
        if keys:
            raise ModelError(f"{len(keys)} weights of the model in {directory} are {problem}, the first is {sorted(map(str, keys))[0]}")
    return model


def check_finite(model: nn.Module) -> None:
    """Raise `ModelError`, naming the first parameter that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        bad = parameter.numel() - int(parameter.isfinite().sum())
        if bad:
            raise ModelError(f"{name} holds {bad} values that are NaN or infinite, of {parameter.numel()}; mend the checkpoint first")


def dequantized() -> dict[str, Any]:
    """The option that makes transformers unpack a GGUF file; versions before 5 know no other way and take none."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def one_line(error: BaseException) -> str:
    """The first sentence-bearing line of somebody else's error, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {text[:300]}"


def fetched_home(name: str, revision: str | None) -> Path:
    """Where transformers keeps the manifest of a compiled model on a hub, fetched if need be. Raises `CheckpointError` if there is none."""
    from transformers.utils.hub import cached_file

    from qpc.checkpoint import MANIFEST

    try:
        found = cached_file(name, MANIFEST, revision=revision)
    except OSError as error:
        raise CheckpointError(f"{name} has no {MANIFEST}: {error}") from error
    assert found is not None, "a missing file raises"
    return Path(found).parent


def base_model(model: Any) -> str | None:
    """The name of a model on a hub, "owner/name", if that is where it was loaded from."""
    name = str(getattr(model.config, "name_or_path", ""))
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).exists() else None
