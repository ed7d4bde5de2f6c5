"""The module that takes the place of a linear once its weight is packed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qpc.kernels import expert_ops as _experts  # noqa: F401 - importing it registers torch.ops.qpc
from qpc.kernels import fused
from qpc.kernels import operand_ops as _operands  # noqa: F401
from qpc.kernels.launch import MAX_BATCH
from qpc.kernels.ops import trellis_parts
from qpc.kernels.packed_module import PackedModule
from qpc.kernels.row_group import RowGroup
from qpc.quant.quantizer import PackedWeight, Quantizer
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.shard import shard_of
from qpc.quant.trellis import TrellisQuantizer
from qpc.quant.vector import VectorQuantizer


def operator(quantizer: Quantizer, in_features: int) -> tuple[torch._ops.OpOverload, tuple[object, ...]]:
    """The operator that runs a quantizer's family, and its arguments that describe the code."""
    parts = [part for part, _ in quantizer.parts(in_features)]
    trellis = [part for part in parts if isinstance(part, TrellisQuantizer)]
    if len(trellis) == len(parts):
        return torch.ops.qpc.trellis_linear.default, ([part.step_bits for part in trellis], [part.window_bits for part in trellis])
    vector = [part for part in parts if isinstance(part, VectorQuantizer)]
    if len(vector) == len(parts):
        return torch.ops.qpc.vector_linear.default, ([part.bits for part in vector], vector[0].dimension)
    scalar = [part for part in parts if isinstance(part, ScalarQuantizer)]
    assert len(scalar) == len(parts), f"the parts of {quantizer} are of several families"
    return torch.ops.qpc.scalar_linear.default, ([part.bits for part in scalar],)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies_operands(step_bits: list[int], window_bits: list[int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `qpc::operand_linear` runs for up to 16 rows here; a constant of any graph that is being traced."""
    return fused.supports(trellis_parts(step_bits, window_bits), MAX_BATCH, dtype, device).implementation is not None


class QuantizedLinear(PackedModule):
    """`y = x W^T + b` with a packed W; takes the place of `nn.Linear` and of GPT-2's `Conv1D`. `bias` is a parameter, as it was.

    A trellis weight reads the operand of the integer multiplication where that runs (`qpc.kernels.fused`), if there are few rows.
    While a graph is traced, a symbolic number of rows is left as it is; `qpc::trellis_linear` packs its operand by itself if they are few
    when it runs.

    group: the linears that its rows are stacked with, if there are any (`join`). weight: none; models ask for the dtype of one if there is.
    """

    weight = None

    def __init__(self, out_features: int, in_features: int, quantizer: Quantizer, block: int, bias: nn.Parameter | None = None) -> None:
        """An empty one, on the meta device."""
        super().__init__(out_features, in_features, quantizer, block)
        self.bias = bias
        self.group: RowGroup | None = None
        self._operator, self._code = operator(quantizer, in_features)

    @staticmethod
    def from_packed(packed: PackedWeight, bias: nn.Parameter | None = None) -> "QuantizedLinear":
        """A module that shares the tensors of `packed`."""
        block = packed.rotation.block if packed.rotation else 0
        return QuantizedLinear(packed.out_features, packed.in_features, packed.quantizer, block, bias).take(packed)

    def narrow(self, rows: range, columns: range) -> None:
        """Become a linear of a range of the rows and columns, with the bias of these rows. Raises `QuantizerError` as `Shard` does.

        For a linear that is in no group yet. The tensors are views of what they were.
        """
        assert self.group is None, "a member of a group cannot change its rows by itself"
        held, bias = shard_of(self.packed, rows, columns), self.bias
        if bias is not None:
            bias = nn.Parameter(bias[rows.start : rows.stop], requires_grad=False)
        QuantizedLinear.__init__(self, held.out_features, held.in_features, held.quantizer, self.block, bias)
        self.take(held)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of x."""
        group = self.group
        if group is not None and group.whole and torch.compiler.is_compiling():
            return group.traced(self, x, self._product_of)
        return self._product(x, self.signs, self.codes, self.scales, self.bias, self.out_features)

    def _product_of(self, group: RowGroup, x: Tensor) -> Tensor:
        return self._product(x, group.signs, group.codes, group.scales, group.bias, group.out_features)

    def _product(
        self, x: Tensor, signs: Tensor, codes: tuple[Tensor, ...], scales: Tensor, bias: Tensor | None, out_features: int
    ) -> Tensor:
        weight = (list(codes), scales, bias, *self._code, out_features)
        result: Tensor
        if self._takes_operand(x):
            operand = torch.ops.qpc.rotate_operand(x, signs, self.block) if self.block else torch.ops.qpc.pack_operand(x)
            result = torch.ops.qpc.operand_linear(*operand, *weight, x.dtype).reshape(*x.shape[:-1], out_features)
        else:
            result = self._operator(torch.ops.qpc.rotate(x, signs, self.block) if self.block else x, *weight)
        return result

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        if self.group is not None:
            self.group.join()
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super()._load_from_state_dict(*args, **kwargs)
        if self.group is not None:
            self.group.join()

    def _takes_operand(self, x: Tensor) -> bool:
        if self._operator is not torch.ops.qpc.trellis_linear.default:
            return False
        few = statically_known_true(math.prod(x.shape[:-1]) <= MAX_BATCH)
        return few and multiplies_operands(*self._code, x.dtype, x.device)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.quantizer}, bias={self.bias is not None}"


def join(linears: Sequence[QuantizedLinear]) -> None:
    """Make the weights of linears row ranges of one, in this order; what they need in common is said by `RowGroup`."""
    group = RowGroup(linears)
    for linear in linears:
        linear.group = group
