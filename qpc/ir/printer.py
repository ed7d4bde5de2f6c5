"""Programs as text, JSON, DOT, or a table of their linears: deterministic, without addresses, times or versions."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from qpc.ir.annotation import Annotation, FusionGroup, annotation, fake_value
from qpc.ir.program import Program
from qpc.ir.table import Table
from qpc.ir.values import representatives


class _Symbols:
    """Names symbolic sizes s0, s1, ... in order of appearance; what torch calls them differs from version to version."""

    def __init__(self) -> None:
        self._order: dict[str, str] = {}

    def __call__(self, size: Any) -> str:
        if isinstance(size, int | str):
            return str(size)
        return re.sub(r"\b[a-z]+\d+\b", lambda match: self._order.setdefault(match[0], f"s{len(self._order)}"), str(size))

    def value(self, value: Any) -> str:
        """The dtype and shape of a tensor, the size that a symbol stands for, or those of a tuple."""
        if isinstance(value, Tensor):
            return f"{_dtype(value.dtype)} [{', '.join(map(self, value.shape))}]"
        if isinstance(value, list | tuple):
            return f"({', '.join(map(self.value, value))})"
        return "" if value is None else self(value)


def to_text(program: Program) -> str:
    """Everything about a program for a human: stage, inputs, nodes with shapes and dtypes, linears, exclusions, remarks."""
    symbols = _Symbols()
    rows = [("node", "value", "computed by")]
    for node in program.graph.nodes:
        rows.append((node.name, symbols.value(fake_value(node)), _computed(program, node)))
    sections = [
        f"{type(program.module).__name__} at stage {program.stage.name}",
        _section("nodes", _table(rows)),
        _section("linears", summary(program)) if any(program.linears()) else "",
        _section("tables", _tables(program)),
        _section("stays as it is", "\n".join(f"{name}: {reason}" for name, reason in sorted(program.excluded.items()))),
        _section("remarks", "\n".join(str(remark) for remark in program.remarks)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def summary(program: Program) -> str:
    """One line per linear: name, shape, number of the value that it reads, its group, and what later stages know of it.

    Independent of the operators between the linears, and so of the version of torch.
    """
    same = representatives(program.graph)
    values: dict[fx.Node, int] = {}
    rows = [("linear", "shape", "input", "group", "quantizer", "sensitivity", "distortion", "remaining", "bytes", "kurtosis")]
    for node in program.linears():
        found = annotation(node)
        assert found.site is not None
        source = same[node.all_input_nodes[0]]
        rows.append(
            (
                found.site.name + (" (transposed)" if found.site.transposed else ""),
                str(found.site.shape),
                f"#{values.setdefault(source, len(values))}",
                _group(found.group),
                "" if found.quantizer is None else str(found.quantizer),
                _number(found.sensitivity),
                _number(found.distortion),
                _number(found.share if found.remaining is None else found.remaining),
                "" if found.weight_bytes is None else str(found.weight_bytes),
                "" if found.kurtosis is None else _change(found.kurtosis),
            )
        )
    filled = [column for column in zip(*rows, strict=True) if any(column[1:])]
    return _table(zip(*filled, strict=True))


def _tables(program: Program) -> str:
    rows = [("table", "shape", "read by", "quantizer", "distortion", "bytes", "kurtosis")]
    for weight, table in program.tables.items():
        known = (str(table.packed.quantizer), _number(table.distortion), str(table.packed.nbytes), _change(table.kurtosis))
        rows.append((weight, str(table.shape), ", ".join(table.names), *known))
    return _table(rows) if program.tables else ""


def to_json(program: Program) -> str:
    """The same for machines: one object with `model`, `stage`, `inputs`, `tensors`, `tables`, `nodes`, `excluded` and `remarks`."""
    symbols, nodes = _Symbols(), []
    for node in program.graph.nodes:
        entry: dict[str, Any] = {"name": node.name, "op": node.op, "target": _target(node.target)}
        entry["arguments"] = [_argument(value) for value in node.args]
        entry["options"] = {key: _argument(value) for key, value in node.kwargs.items()}
        value = fake_value(node)
        if isinstance(value, Tensor):
            entry["dtype"], entry["shape"] = _dtype(value.dtype), [size if isinstance(size, int) else symbols(size) for size in value.shape]
        found = annotation(node)
        if found.site is not None:
            entry["linear"] = _facts(found)
        nodes.append(entry)
    document = {
        "model": type(program.module).__name__,
        "stage": program.stage.name,
        "inputs": list(program.inputs),
        "tensors": program.tensors,
        "tables": [_table_facts(table) for table in program.tables.values()],
        "nodes": nodes,
        "excluded": program.excluded,
        "remarks": [{"pass": remark.pass_name, "subject": remark.subject, "reason": remark.reason} for remark in program.remarks],
    }
    return json.dumps(document, indent=1) + "\n"


def to_dot(program: Program) -> str:
    """The flow of values for Graphviz: linears are boxes, groups of several are clusters; parameters are left out."""
    symbols = _Symbols()
    lines = ["digraph program {", '  node [shape=ellipse, fontname="monospace"];']
    clusters: dict[FusionGroup | None, list[str]] = {}
    shown = [node for node in program.graph.nodes if node.name not in program.tensors]
    for node in shown:
        found = annotation(node)
        label = [node.name, symbols.value(fake_value(node))]
        if found.site is not None:
            label = [found.site.name, str(found.site.shape), *([str(found.quantizer)] if found.quantizer else [])]
        elif node.op not in ("placeholder", "output"):
            label.insert(1, _target(node.target))
        shape = ", shape=box, style=bold" if found.site is not None else ""
        group = found.group if found.group is not None and len(found.group.members) > 1 else None
        clusters.setdefault(group, []).append(f"{_quoted(node.name)} [label={_quoted(*label)}{shape}];")
    for number, (group, members) in enumerate(clusters.items()):
        if group is None:
            lines += [f"  {member}" for member in members]
        else:
            lines += [f"  subgraph cluster_{number} {{", f"    label={_quoted(_group(group), str(group.shape))};"]
            lines += [f"    {member}" for member in members] + ["  }"]
    names = {node.name for node in shown}
    lines += [
        f"  {_quoted(source.name)} -> {_quoted(node.name)};" for node in shown for source in node.all_input_nodes if source.name in names
    ]
    return "\n".join([*lines, "}"]) + "\n"


def _facts(found: Annotation) -> dict[str, Any]:
    site, group = found.site, found.group
    assert site is not None
    return {
        "name": site.name,
        "weight": site.weight,
        "bias": site.bias,
        "transposed": site.transposed,
        "out_features": site.shape.out_features,
        "in_features": site.shape.in_features,
        "group": None if group is None else {"members": list(group.members), "input": group.input},
        "quantizer": None if found.quantizer is None else str(found.quantizer),
        "bits_per_weight": None if found.quantizer is None else str(found.quantizer.rate),
        "sensitivity": found.sensitivity,
        "distortion": found.distortion,
        "weight_bytes": found.weight_bytes,
        "kurtosis": None if found.kurtosis is None else list(found.kurtosis),
        "share": found.share,
        "remaining": found.remaining,
    }


def _table_facts(table: Table) -> dict[str, Any]:
    return {
        "weight": table.weight,
        "rows": table.shape.out_features,
        "features": table.shape.in_features,
        "lookups": [{"name": lookup.name, "scale": lookup.scale} for lookup in table.lookups],
        "heads": list(table.heads),
        "quantizer": str(table.packed.quantizer),
        "distortion": table.distortion,
        "weight_bytes": table.packed.nbytes,
        "kurtosis": list(table.kurtosis),
    }


def _group(group: FusionGroup | None) -> str:
    """The members without the prefix that they share: `q_proj + k_proj + v_proj`."""
    if group is None or len(group.members) < 2:
        return ""
    parts = [name.split(".") for name in group.members]
    common = 0
    while all(len(part) > common + 1 and part[common] == parts[0][common] for part in parts):
        common += 1
    return " + ".join(".".join(part[common:]) for part in parts)


def _computed(program: Program, node: fx.Node) -> str:
    if node.op == "placeholder":
        return program.tensors.get(node.name, "(input)")
    if node.op == "output":
        return f"output {_argument(node.args[0])}"
    given = [_argument(value) for value in node.args] + [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    return f"{_target(node.target)}({', '.join(given)})"


def _target(target: Any) -> str:
    if isinstance(target, str | torch._ops.OpOverload | torch._ops.HigherOrderOperator):
        return str(target)
    return f"{getattr(target, '__module__', None) or 'builtins'}.{getattr(target, '__name__', type(target).__name__)}"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_argument(item)}' for key, item in value.items())}}}"
    if isinstance(value, torch.dtype):
        return _dtype(value)
    return f"<{type(value).__name__}>" if " at 0x" in repr(value) else str(value)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _change(values: tuple[float, float]) -> str:
    return " -> ".join(f"{value:.2f}" for value in values)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _section(title: str, body: str) -> str:
    return f"{title}\n" + "\n".join(f"  {line}" for line in body.splitlines()) if body else ""


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _quoted(*lines: str) -> str:
    escaped = [line.replace("\\", "\\\\").replace('"', '\\"') for line in lines if line]
    return '"' + "\\n".join(escaped) + '"'
