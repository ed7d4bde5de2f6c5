"""Where the rewrites meet Inductor: its hook for passes on the graph of operators, before it fuses anything."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch._inductor.config as inductor
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from qpc.inductor.gates import fuse_gates
from qpc.inductor.merge import merge_equal
from qpc.inductor.norms import fuse_norms
from qpc.inductor.ropes import fuse_ropes

FILES = (
    *(str(Path(__file__).with_name(name)) for name in ("gates.py", "hook.py", "merge.py", "nodes.py", "norms.py", "ropes.py")),
    *(str(Path(__file__).parent.with_name("kernels") / name) for name in ("gate.py", "select.py")),
)

_LOG = logging.getLogger("qpc.inductor")


Before = CustomGraphPass | Callable[[fx.Graph], object]


class GraphPass(CustomGraphPass):
    """All rewrites in their order, after passes that were there before."""

    def __init__(self, before: tuple[Before, ...] = ()) -> None:
        self.before = before

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite a graph in place; one without operators of qpc stays as it is."""
        for other in self.before:
            other(graph)
        changed = merge_equal(graph)
        for fuse in (fuse_norms, fuse_gates, fuse_ropes):
            fused, remarks = fuse(graph)
            changed += fused
            for remark in remarks:
                _LOG.info("%s", remark)
        if changed:
            graph.eliminate_dead_code()
            graph.lint()

    def uuid(self) -> object | None:
        """What the cache of compiled graphs knows the pass by; None, and no graph is cached, if that of a pass before is not known."""
        others = tuple(other.uuid() if isinstance(other, CustomGraphPass) else None for other in self.before)
        return None if None in others else (get_hash_for_files(FILES), *others)


def register() -> None:
    """Let Inductor rewrite every graph that it compiles in this process. Once is enough."""
    found: Any = inductor.post_grad_custom_pre_pass
    before = tuple(found) if isinstance(found, list | tuple) else () if found is None else (found,)
    if not any(isinstance(each, GraphPass) for each in before):
        inductor.post_grad_custom_pre_pass = GraphPass(before)
