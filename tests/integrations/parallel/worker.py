"""What each process of a test does: `torchrun -m tests.integrations.parallel.worker DIRECTORY DEVICE`.

Loads its part of every checkpoint in DIRECTORY/good and runs it; tries those in DIRECTORY/bad, and others that cannot be loaded. Writes
`rank0.safetensors` (logits and tokens) and `rank0.json` (bytes, counts and messages).
"""

import gc
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

import qpc
from tests.compiled import TOKENS, logits

PROMPTS, NEW = TOKENS[:, :5], 8


def stored_bytes(*modules: nn.Module) -> int:
    """Of all tensors of modules, with the whole memory that they keep, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for each in modules for tensor in each.state_dict().values()}
    return sum(storage.nbytes() for storage in storages.values())


def code_bytes(model: nn.Module) -> int:
    """Of the codes of all layers."""
    return sum(tensor.nbytes for name, tensor in model.state_dict().items() if "_proj.codes" in name)


def continued(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Greedy tokens of `model.generate` with prompts, and of `qpc.generate` without."""
    with torch.no_grad():
        theirs = model.generate(PROMPTS.to(model.device), min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return theirs.cpu(), qpc.generate(model, PROMPTS, max_new_tokens=NEW, stop=()).tokens


def traced(model: nn.Module) -> tuple[Tensor, dict[str, int]]:
    """Logits of the model as one graph, and how often each operator of qpc is in it."""
    counts: Counter[str] = Counter()

    def count(graph_module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        counts.update(node.target.__name__ for node in graph_module.graph.nodes if str(node.target).startswith("qpc."))
        return graph_module.forward

    torch._dynamo.reset()
    return logits(torch.compile(model, backend=count, fullgraph=True)), dict(counts)


def refusal(action: Callable[[], object]) -> str:
    """The error that something ends with, which must be one of qpc."""
    try:
        action()
    except qpc.QpcError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(directory: Path, device: str) -> None:
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"refused": {}}

    def load(place: Path, tp: object, **options: Any) -> Callable[[], nn.Module]:
        return lambda: qpc.load(place, tp=tp, **{"device": device} | options)

    good, bad = (sorted((directory / kind).iterdir()) for kind in ("good", "bad"))
    for place, way in zip(good, ("auto", 2, None), strict=True):
        name = place.name
        model = load(place, way or init_device_mesh(device, (2,)), verify=way == 2)()
        tensors[f"{name}.logits"] = logits(model).cpu()
        if name == "llama":
            graph, facts[f"{name}.operators"] = traced(model)
            tensors[f"{name}.traced"] = graph.cpu()
        tensors[f"{name}.theirs"], tensors[f"{name}.ours"] = continued(model)
        facts[f"{name}.bytes"], facts[f"{name}.codes"] = stored_bytes(model), code_bytes(model)
        facts["refused"][f"saving {name}"] = refusal(lambda model=model: qpc.save(model, directory / "saved"))
        facts["refused"][f"saving {name} by transformers"] = refusal(lambda model=model: model.save_pretrained(directory / "saved"))
    del model
    rank, one = dist.get_rank(), good[0]
    attempts = {place.name: load(place, 2) for place in bad} | {
        "three": load(one, 3),
        "axes": load(one, init_device_mesh(device, (1, 2), mesh_dim_names=("dp", "tp"))),
        "other device": load(one, init_device_mesh("cpu", (2,)), device="cuda"),
        "runtime": load(one, 2, runtime="tensorrt"),
        "different": load(good[rank], 2),
        "missing in one": load(directory / "nowhere" if rank else one, 2),
    }
    if not torch.cuda.is_available():
        attempts["no GPUs"] = load(one, 2, device="cuda")
        attempts["transformers"] = lambda: AutoModelForCausalLM.from_pretrained(one, tp_plan="auto")
    facts["refused"] |= {name: refusal(attempt) for name, attempt in attempts.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / f"rank{rank}.safetensors")
    (directory / f"rank{rank}.json").write_text(json.dumps(facts))
    gc.collect()  # CUDA graphs of steps hold collectives, and NCCL waits for them
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
