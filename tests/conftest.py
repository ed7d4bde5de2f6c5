"""What several test files share: a tiny language model on disk, with a tokenizer of bytes."""

import importlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor

from tests.exports import kept

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["QPC_CACHE"] = ""

with suppress(ImportError):  # the environment of vLLM has none of its tests
    from hypothesis import HealthCheck, settings

    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    inductor.compile_threads = 1  # else every worker has a pool of processes beside it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing with them")


@pytest.fixture(scope="session", autouse=True)
def exports_once() -> Iterator[None]:
    """Models of one structure are exported once in a process."""
    capture = importlib.import_module("qpc.capture")  # the name in the package is that of the function
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "_export", kept(capture._export))
        yield


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with tied embeddings, its tokenizer (257 tokens: a BOS and every byte), in float32 safetensors."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    vocabulary = {"<s>": 0} | {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=1)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(directory)
    return directory
