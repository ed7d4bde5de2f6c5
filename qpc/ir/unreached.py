"""What a captured graph does not hold: parts of a model that its inputs do not reach, such as the vision tower of a multimodal model."""

from qpc.ir.program import Program, Remark, named_tensors


def unreached(program: Program) -> list[Remark]:
    """A remark for every largest module with matrices, of which the graph reads no tensor."""
    tensors = named_tensors(program.module)
    reached = {id(tensors[name]) for name in program.tensors.values()}
    live = {owner for name, value in tensors.items() if id(value) in reached for owner in _owners(name)}
    matrices: dict[str, int] = {}
    for name, value in tensors.items():
        outside = next((owner for owner in _owners(name) if owner not in live), None)
        if outside is not None and id(value) not in reached and value.ndim == 2 and value.is_floating_point():
            matrices[outside] = matrices.get(outside, 0) + 1
    given = ", ".join(program.inputs)
    reason = "no part of the graph that was captured from {}; what is to be quantized of it, compile by itself with example_inputs"
    return [Remark("capture", f"{name} ({count} matrices)", reason.format(given)) for name, count in matrices.items()]


def _owners(name: str) -> list[str]:
    """The modules around a tensor of this qualified name, the whole model first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
