"""The synthetic model of the streaming benchmark is one that can be streamed."""

from pathlib import Path

import torch

from benchmarks.llama import TINY
from benchmarks.streaming import layer_shapes, write_model
from qpc.integrations.transformers import skeleton
from qpc.ir.program import named_tensors
from qpc.safetensors_source import SafetensorsSource
from qpc.sensitivity import Sensitivities


def test_the_synthetic_model_is_whole(tmp_path: Path) -> None:
    write_model(tmp_path, TINY)
    model = skeleton(tmp_path)
    source = SafetensorsSource(tmp_path, named_tensors(model), torch.device("cpu"))
    for name, parameter in model.named_parameters():
        values = source.read(name)
        assert values.dtype == parameter.dtype == torch.bfloat16 and values.shape == parameter.shape and values.isfinite().all()
        assert torch.equal(torch.cat(list(source.pieces(name, most_bytes=1000))), values)
    given = Sensitivities.from_json((tmp_path / "sensitivities.json").read_text())
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert (
        given.values.keys() == linears - {"lm_head"}
        and len(given.values) == len([s for s in layer_shapes(TINY).values() if len(s) == 2]) * 2
    )
