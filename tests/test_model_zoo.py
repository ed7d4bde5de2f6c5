"""Models that are no plain causal language models: encoders by example inputs, and the language part of multimodal wrappers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import qpc
from qpc.kernels.linear import QuantizedLinear
from tests.compiled import dequantized
from tests.families import VOCABULARY, tokens

OPTIONS: dict[str, Any] = {"budget": 1.75, "effort": "fast", "calibration": None, "sensitivity": "random"}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
PICTURE = {"image_size": 32, "patch_size": 8}
IMAGE = VOCABULARY - 1


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **SIZES))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=64, **SIZES, **PICTURE))


def t5() -> nn.Module:
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    )


ENCODERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "bert": (bert, tokens),
    "vit": (vit, pixels),
    "t5": (t5, tokens),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_all_linears_of_an_encoder_are_packed(name: str) -> None:
    make, example = ENCODERS[name]
    model, x = built(make), example()
    compiled = qpc.compile(model, example_inputs=(x,), **OPTIONS)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, module in compiled.named_modules() if isinstance(module, QuantizedLinear)} == linears
    with torch.no_grad():
        found, expected = compiled(x)[0], dequantized(compiled)(x)[0]
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    kept = any("patch_embeddings.projection.weight: read by aten.conv2d" in text for text in qpc.report_of(compiled).remarks)
    assert kept == (name == "vit")


def llava() -> nn.Module:
    text = transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, pad_token_id=0, **SIZES)
    vision = transformers.CLIPVisionConfig(**(SIZES | {"num_hidden_layers": 2}), **PICTURE)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    return transformers.LlavaForConditionalGeneration(config)


def gemma3() -> nn.Module:
    text = transformers.Gemma3TextConfig(vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=16, sliding_window=64, **SIZES)
    vision = transformers.SiglipVisionConfig(**SIZES, **PICTURE)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=16, image_token_index=IMAGE)
    return transformers.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [llava, gemma3])
def test_the_language_part_of_a_multimodal_model_is_packed(make: Callable[[], nn.Module]) -> None:
    model: Any = built(make)
    cached = model.config.get_text_config().use_cache
    compiled: Any = qpc.compile(model, **OPTIONS)
    assert model.config.get_text_config().use_cache == cached
    packed = {name for name, module in compiled.named_modules() if isinstance(module, QuantizedLinear)}
    assert packed == {
        f"model.language_model.{name}" for name, module in model.model.language_model.named_modules() if type(module) is nn.Linear
    }
    remarks = qpc.report_of(compiled).remarks
    for part in ("vision_tower", "multi_modal_projector"):
        matrices = sum(value.ndim == 2 for value in model.model.get_submodule(part).parameters())
        told = [text for text in remarks if text.startswith(f"capture: model.{part} ({matrices} matrices): ")]
        assert len(told) == 1, remarks
    ids = torch.full((1, 20), 7)
    ids[:, 2:18] = IMAGE
    given = {"input_ids": ids, "pixel_values": pixels()[:1], "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    plain = dequantized(compiled)
    assert torch.equal(compiled.generate(**given), plain.generate(**given))  # type: ignore[operator]


def test_a_vision_tower_can_be_compiled_by_itself() -> None:
    model: Any = built(llava)
    tower = qpc.compile(model.model.vision_tower, example_inputs=(pixels(),), **OPTIONS)
    model.model.vision_tower = tower
    assert any(isinstance(module, QuantizedLinear) for module in model.model.vision_tower.modules())
    with torch.no_grad():
        assert tower(pixels())[0].shape[0] == 2
