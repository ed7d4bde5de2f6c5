"""The packed weights of a checkpoint as its manifest describes them, and which of them vLLM may run as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpc.errors import CheckpointError
from qpc.quant import palette
from qpc.quant.quantizer import Quantizer

APART = "they do not read one value in the model that was compiled; compile again with --exclude for all of them"
"""Why members of a fused layer may rotate differently, and what to do."""


@dataclass(frozen=True)
class StoredWeight:
    """A packed weight [out_features, in_features]. block: of its rotation; 0 if its inputs come as it was quantized for."""

    name: str
    out_features: int
    in_features: int
    quantizer: Quantizer
    block: int

    @staticmethod
    def of(name: str, entry: Any, rows: str = "out_features", columns: str = "in_features") -> "StoredWeight":
        """From its entry in the manifest. Raises `CheckpointError` or `QuantizerError` if that is damaged."""
        known = entry if isinstance(entry, dict) else {}
        counts = [count for key in (rows, columns, "block") if type(count := known.get(key)) is int and count >= 0]
        if len(counts) < 3:
            raise CheckpointError(f"the entry of {name} has no valid {rows}, {columns} and block; the checkpoint is damaged")
        out_features, in_features, block = counts
        return StoredWeight(name, out_features, in_features, palette.from_json(known.get("quantizer")), block)

    @property
    def leaf(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]


def linears_of(manifest: Mapping[str, Any]) -> dict[str, StoredWeight]:
    """The packed linears of a checkpoint by name. Raises `CheckpointError` if it holds something that vLLM has no place for."""
    if manifest["gains"]:
        name = next(iter(manifest["gains"]))
        raise CheckpointError(f"{name} has a gain between two rotations, which is not supported under vLLM; compile without --fold")
    if manifest["experts"]:
        name = next(iter(manifest["experts"]))
        raise CheckpointError(f"{name} is a packed stack of experts, which is not supported under vLLM; compile with --exclude '*experts*'")
    return {name: StoredWeight.of(name, entry) for name, entry in manifest["linears"].items()}


def tables_of(manifest: Mapping[str, Any]) -> dict[str, StoredWeight]:
    """Its packed embeddings by name."""
    return {name: StoredWeight.of(name, entry, "num_embeddings", "embedding_dim") for name, entry in manifest["embeddings"].items()}


def table_of(layer: str, rows: int, tables: Mapping[str, StoredWeight]) -> StoredWeight | None:
    """The table of an embedding with so many rows; None if it is not packed.

    layer: its full name, or "": models of vLLM do not name all embeddings. Raises `CheckpointError` if several could be meant.
    """
    if layer:
        return tables.get(layer)
    found = [table for table in tables.values() if table.out_features == rows]
    if len(found) > 1:
        names = ", ".join(table.name for table in found)
        raise CheckpointError(f"vLLM does not say which of {names} an embedding of {rows} rows is; compile without --embeddings")
    return found[0] if found else None


def members(layer: str, linears: Mapping[str, StoredWeight], fused: Mapping[str, Sequence[str]]) -> tuple[StoredWeight, ...]:
    """The stored linears that a layer of vLLM is made of, in its order; none if it is not quantized.

    layer: its full name. fused: the names of the members of a fused layer by its own name, without the path, as models of vLLM give them.
    Raises `CheckpointError` if they cannot be one weight.
    """
    path, _, leaf = layer.rpartition(".")
    names = [layer]
    if layer not in linears:
        names = [f"{path}.{member}" if path else member for member in fused.get(leaf, [leaf])]
    found = [linears[name] for name in names if name in linears]
    if found:
        check_alike(layer, names, found)
    return tuple(found)


def check_alike(layer: str, names: Sequence[str], found: Sequence[StoredWeight]) -> None:
    """Raise `CheckpointError` unless all of these names are there, with one quantizer and one rotation."""
    stored = {linear.name: linear for linear in found}
    quantizers = [stored[name].quantizer if name in stored else None for name in names]
    rotations = [f"{linear.in_features} inputs in blocks of {linear.block}" for linear in found]
    if len(set(quantizers)) > 1:
        told = ", ".join(f"{name.rpartition('.')[2]} {quantizer or 'none'}" for name, quantizer in zip(names, quantizers, strict=True))
        raise CheckpointError(
            f"vLLM runs {layer} as one weight, but its members have different quantizers: {told}; "
            "compile again with --same-in-group (in Python same_quantizer_in_group=True), and exclude all of them or none"
        )
    if len(set(rotations)) > 1:
        told = ", ".join(f"{linear.leaf} {text}" for linear, text in zip(found, rotations, strict=True))
        raise CheckpointError(f"vLLM runs {layer} as one weight, but its members rotate differently: {told}; {APART}")
