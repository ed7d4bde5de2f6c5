"""How PyTorch splits a packed linear: styles for `torch.distributed.tensor.parallel.parallelize_module`.

Inputs and outputs are plain tensors; what travels between the processes is one all-reduce behind the columns of a weight, and one
all-gather behind its rows where the whole output is wanted. `torch.compile` makes functional collectives of them.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional

from qpc.integrations.parallel.parts import Part
from qpc.kernels.linear import QuantizedLinear


class SplitRows(ParallelStyle):
    """Each process has some of the outputs. share: of each but the last ones, if all outputs are gathered; None if each keeps its own."""

    def __init__(self, part: Part, share: int | None) -> None:
        super().__init__()
        self.part, self.share = part, share

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        size, share = _narrow(module, self.part), self.share
        if share is not None:
            module.register_forward_hook(lambda module, args, output: gathered(output, share, size, device_mesh))
        return module


class SplitColumns(ParallelStyle):
    """Each process has some of the inputs, and the sum of all products. whole: whether the input is whole, and cut here."""

    def __init__(self, part: Part, whole: bool) -> None:
        super().__init__()
        self.part, self.whole = part, whole

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _narrow(module, self.part)
        start, stop = self.part.columns.start, self.part.columns.stop
        if self.whole:
            module.register_forward_pre_hook(lambda module, args: (args[0][..., start:stop],))
        module.register_forward_hook(lambda module, args, output: summed(output, device_mesh))
        return module


def summed(product: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over all processes, in the dtype of the product; may be written to the product."""
    product = product.contiguous()
    dist.all_reduce(product, group=mesh.get_group())
    return product


def gathered(rows: Tensor, share: int, size: int, mesh: DeviceMesh) -> Tensor:
    """The outputs of all processes side by side: [..., share or fewer] -> [..., size]."""
    padded = functional.pad(rows, (0, share - rows.shape[-1]))
    whole: Tensor = DTensor.from_local(padded, mesh, [Shard(-1)], run_check=False).full_tensor()
    return whole[..., :size].contiguous()


@torch.no_grad()
def _narrow(linear: nn.Module, part: Part) -> int:
    """Keep a part of a linear, in place. Returns the rows that it had."""
    assert isinstance(linear, nn.Linear | QuantizedLinear)
    whole = linear.out_features
    if isinstance(linear, QuantizedLinear):
        linear.narrow(part.rows, part.columns)
    else:
        rows, columns = slice(part.rows.start, part.rows.stop), slice(part.columns.start, part.columns.stop)
        linear.weight = nn.Parameter(linear.weight[rows, columns], requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[rows], requires_grad=False)
        linear.out_features, linear.in_features = len(part.rows), len(part.columns)
    if not part.biased:
        linear.bias = None
    return whole
