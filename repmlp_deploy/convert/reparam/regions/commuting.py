"""BatchNorms that move through reshapes, so that they meet the linear layer that can absorb them.

A scale and a shift per channel commute with everything that leaves channels alone: views and transpositions that keep
the axis of channels, and means over other axes. With r such an operation,

    BN(r(x)) = r(BN(x))   and   r(BN(x)) = BN(r(x)),

so a BatchNorm after attention's reshapes moves back to the projection before them, and one before a mean moves on to
the head after it. It becomes `scale_shift`, which names the axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from repmlp_deploy.convert.reparam.regions.reading import Affine, Reading, Sum, read_node, scale_shift
from repmlp_deploy.convert.reparam.regions.tracing import Values, sizes

__all__ = ["move_norms"]

_aten = torch.ops.aten


def move_norms(graph: fx.GraphModule) -> None:
    """Move every BatchNorm in front of, or after, the reshapes that keep it from a linear layer, in place."""
    values = Values(graph)
    for node in list(graph.graph.nodes):
        reading = read_node(node, values)
        if isinstance(reading, Affine) and reading.map.is_scale and reading.axis is not None:
            _move(graph, node, reading, values)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _move(graph: fx.GraphModule, node: fx.Node, reading: Affine, values: Values) -> None:
    axis: int | None = reading.axis
    chain = []
    at = reading.of
    while axis is not None and (before := _axis_before(at, axis)) is not None and len(at.users) == 1:
        chain.append(at)
        at, axis = at.all_input_nodes[0], before
    if chain and axis is not None and len(at.users) == 1 and _absorbs(read_node(at, values)):
        _insert(graph, node, reading, at, axis)
        node.replace_all_uses_with(reading.of)
        return
    axis, at = reading.axis, node
    while len(at.users) == 1 and (reader := next(iter(at.users))) is not None:
        after = None if axis is None else _axis_after(reader, axis)
        if after is None:
            break
        at, axis = reader, after
    if at is node or axis is None or not all(_absorbs(read_node(reader, values)) for reader in at.users):
        return
    if any(_absorbs(read_node(x, values)) for x in (reading.of,) if len(x.users) == 1):
        return  # what comes before absorbs it where it is
    node.replace_all_uses_with(reading.of)
    _insert(graph, node, reading, at, axis)


def _insert(graph: fx.GraphModule, node: fx.Node, reading: Affine, at: fx.Node, axis: int) -> None:
    """Scale and shift the value of `at` for all its readers."""
    name = f"_moved.{node.name}"
    holder = nn.Module()
    holder.register_buffer("factors", reading.map.kernel.flatten())
    bias = reading.bias if reading.bias is not None else torch.zeros(reading.map.outputs, dtype=torch.float64)
    holder.register_buffer("shift", bias)
    graph.add_submodule(name, holder)
    readers = list(at.users)
    with graph.graph.inserting_after(at):
        moved = graph.graph.call_function(scale_shift, (at, None, None, axis))
    with graph.graph.inserting_before(moved):
        moved.args = (at, graph.graph.get_attr(f"{name}.factors"), graph.graph.get_attr(f"{name}.shift"), axis)
    moved.meta = {"val": at.meta["val"], "nn_module_stack": node.meta.get("nn_module_stack")}
    for reader in readers:
        reader.replace_input_with(at, moved)


def _absorbs(reading: Reading | None) -> bool:
    """Return whether a node may take a scale and a shift into its own numbers."""
    return isinstance(reading, Sum) or (isinstance(reading, Affine) and not reading.map.is_scale)


def _axis_before(node: fx.Node, axis: int) -> int | None:
    """Return the axis of a reshape's input that is axis `axis` of its result; None if it is no such reshape."""
    return next((a for a in _axes_of_input(node) if _axis_after(node, a) == axis), None)


def _axes_of_input(node: fx.Node) -> Iterator[int]:
    shape = sizes(node.all_input_nodes[0]) if node.op == "call_function" and node.all_input_nodes else None
    yield from range(1, len(shape or ()))


def _axis_after(node: fx.Node, axis: int) -> int | None:
    """Return where axis `axis` of a reshape's input is in its result; None if it does not stay one axis."""
    rule = _RULES.get(node.target) if node.op == "call_function" else None
    if rule is None or sizes(node) is None or sizes(node.all_input_nodes[0]) is None:
        return None
    return rule(node, axis)


def _after_view(node: fx.Node, axis: int) -> int | None:
    """Find the axis of the same size with as many elements after it."""
    before, after = node.all_input_nodes[0].meta["val"].shape, node.meta["val"].shape
    wanted = _elements(before[axis + 1 :])
    for i, size in enumerate(list[Any](after)):
        if (
            isinstance(size, int)
            and size == before[axis]
            and wanted is not None
            and _elements(after[i + 1 :]) == wanted
        ):
            return i
    return None


def _elements(shape: Sequence[Any]) -> int | None:
    """Return the number of elements; None if that depends on the batch."""
    total = 1
    for size in shape:
        if not isinstance(size, int):
            return None
        total *= size
    return total


def _after_transpose(node: fx.Node, axis: int) -> int | None:
    axes = list(range(len(sizes(node) or ())))
    first, second = (int(a) % len(axes) for a in node.args[1:3])  # type: ignore[arg-type]
    axes[first], axes[second] = axes[second], axes[first]
    return axes.index(axis)


def _after_permute(node: fx.Node, axis: int) -> int | None:
    axes = [int(a) % len(sizes(node) or ()) for a in node.args[1]]  # type: ignore[union-attr,arg-type]
    return axes.index(axis)


def _after_mean(node: fx.Node, axis: int) -> int | None:
    rank = len(sizes(node.all_input_nodes[0]) or ())
    if not isinstance(node.args[1], list | tuple):
        return None
    taken = {int(a) % rank for a in node.args[1]}  # type: ignore[arg-type]
    keeps = (node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim")) is True  # noqa: PLR2004
    if axis in taken or node.kwargs.get("dtype") is not None:
        return None
    return axis if keeps else axis - sum(a < axis for a in taken)


def _after_pool(node: fx.Node, axis: int) -> int | None:
    return axis if axis == len(sizes(node) or ()) - 3 else None


def _after_copy(node: fx.Node, axis: int) -> int | None:
    return axis if sizes(node) == sizes(node.all_input_nodes[0]) else None


_RULES: dict[object, Callable[[fx.Node, int], int | None]] = {
    _aten.view.default: _after_view,
    _aten._unsafe_view.default: _after_view,  # noqa: SLF001 - ATen's name
    _aten.reshape.default: _after_view,
    _aten.transpose.int: _after_transpose,
    _aten.permute.default: _after_permute,
    _aten.mean.dim: _after_mean,
    _aten.adaptive_avg_pool2d.default: _after_pool,
    _aten.clone.default: _after_copy,
    _aten.alias.default: _after_copy,
}
"""ATen operator to where it takes an axis."""
