"""The traced graph of a network, and values in it, computed in float64.

The graph is traced in the network's own dtype, as code may name it. Constants and checks run in float64 all the same:
whatever a node says of float32 is read as float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from repmlp_deploy.convert.capture import captured_output
from repmlp_deploy.convert.reparam.hooks import hooks_in
from repmlp_deploy.errors import InputError
from repmlp_deploy.nets.flat import Flat, failing_module
from repmlp_deploy.nets.surgery import with_replaced
from repmlp_deploy.text import first_line

__all__ = ["BATCH", "Values", "module_path", "reads_shape_only", "sizes", "stack_of", "trace"]

BATCH = 2  # 0 and 1 would be specialised
_LARGEST_BATCH = 1 << 16


def trace(network: nn.Module, examples: Sequence[Tensor]) -> fx.GraphModule:
    """Return the functional ATen graph of a network, with a symbolic batch and fixed other sizes.

    Args:
        network: in evaluation mode; unchanged.
        examples: inputs by position, (n, …).

    Raises:
        InputError: torch.export cannot trace the network.
    """
    kind = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    inputs = tuple(
        (x.to(kind) if x.is_floating_point() else x)[:1].expand(BATCH, *x.shape[1:]).contiguous() for x in examples
    )
    dynamic: tuple[Any, ...] = ({0: torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)},) * len(inputs)
    dynamic = (dynamic,) if isinstance(network, Flat) else dynamic
    copied = with_replaced(network, {})  # tracing leaves what modules cache in them
    with captured_output("torch"):
        try:
            program = torch.export.export(copied, inputs, dynamic_shapes=dynamic, strict=False)
            graph = program.run_decompositions({}).module(check_guards=False)
        except Exception as error:
            place = failing_module(
                copied, lambda: torch.export.export(copied, inputs, dynamic_shapes=dynamic, strict=False)
            )
            raise InputError(
                f"torch.export cannot trace {place}: {first_line(error)}; {_way_out(copied, inputs)}"
            ) from error
    assert isinstance(graph, fx.GraphModule)  # noqa: S101 - what module() returns
    _simplify(graph)
    return graph


def _way_out(network: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    """Say what a user can do about a network that cannot be traced for any batch."""
    by_package = "hooks" if hooks_in(network) else "PACKAGE:FUNCTION"
    try:
        torch.export.export(network, inputs, strict=False)
    except Exception:  # noqa: BLE001 - whatever it is, no graph comes of it
        return f"rewrite that code, or keep the merged weights alone: --merge {by_package} --format checkpoint"
    return f"for a single batch size it can: --merge {by_package} --batch {BATCH}"


def _simplify(graph: fx.GraphModule) -> None:
    """Let reshapes take values of any strides, and drop the values that a copy writes over."""
    for node in graph.graph.nodes:
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):  # noqa: SLF001 - ATen's name
            node.target = torch.ops.aten.reshape.default  # what is written may be strided otherwise
        if node.target is torch.ops.aten.copy.default and sizes(node) == sizes(node.args[1]):
            node.replace_all_uses_with(node.args[1])
    graph.graph.eliminate_dead_code()
    graph.recompile()


def sizes(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of a node's value, a symbolic size as it was traced; None if it is no tensor of floats."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    return tuple(_known(size) for size in value.shape)


def _is_batch(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr.is_Symbol)


def _known(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def reads_shape_only(node: fx.Node) -> bool:
    """Return whether nothing of a node's input but its shape matters."""
    if node.target in _LIKE or node.target is torch.ops.aten.sym_size.int:
        return True
    return node.target is torch.ops.aten.slice.Tensor and all(reads_shape_only(user) for user in node.users)


def stack_of(node: fx.Node) -> list[str]:
    """Return the paths of the modules that a node is in, the outermost first."""
    return [_path(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]


def _path(traced: str) -> str:
    """Return the module's own name of a path in a trace, which may begin with that of the root."""
    return traced.removeprefix("L['self']").lstrip(".")


def module_path(nodes: Sequence[fx.Node]) -> str:
    """Return the path of the innermost module that all of these nodes are in; empty for the network itself."""
    common = None
    for node in nodes:
        stack = stack_of(node)
        common = stack if common is None else [path for path in common if path in stack]
    return common[-1] if common else ""


_LIKE: dict[object, float] = {torch.ops.aten.ones_like.default: 1.0, torch.ops.aten.zeros_like.default: 0.0}


class Values:
    """Values of a graph's nodes in float64: constants, and what follows from given values.

    Args:
        graph: whose parameters and buffers are read.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._constants: dict[fx.Node, Any] = {}
        self._is_constant: dict[fx.Node, bool] = {}
        for node in graph.graph.nodes:
            self.is_constant(node)

    def is_constant(self, value: object) -> bool:
        """Return whether a node, or a number, is the same for every input."""
        if not isinstance(value, fx.Node):
            return True
        if value not in self._is_constant:  # in the graph's order, or a node that was added since
            same = value.op not in ("placeholder", "output")
            self._is_constant[value] = same and all(self.is_constant(node) for node in value.all_input_nodes)
        return self._is_constant[value]

    @torch.no_grad()
    def constant(self, value: Any) -> Any:
        """Return the value of a constant node, floats in float64; anything else unchanged."""
        if not isinstance(value, fx.Node):
            return value
        if value not in self._constants:
            self._constants[value] = self.run(value, {})
        return self._constants[value]

    @torch.no_grad()
    def per_sample(self, node: fx.Node) -> Tensor | None:
        """Return (…), float64, of a value (N, …) that is the same for every input and sample; else None."""
        found = [self._shaped(node, batch) for batch in (BATCH, BATCH + 1)]
        rows = [row for value in found if isinstance(value, Tensor) and value.ndim for row in value]
        if len(rows) < BATCH + BATCH + 1 and not self.is_constant(node):
            return None
        first = rows[0] if rows else None
        return first if first is not None and all(torch.equal(first, row) for row in rows) else None

    def _shaped(self, node: fx.Node, batch: int) -> Any:
        """Return a value that follows from shapes and constants alone, for a batch of this size; else None."""
        known, waiting = dict[fx.Node, Any](), [node]
        while waiting:
            last = waiting.pop()
            if last in known or self.is_constant(last):
                continue
            if last.target is torch.ops.aten.sym_size.int and _is_batch(last.meta["val"]):
                known[last] = batch
            elif last.target in _LIKE:
                shape = [batch if _is_batch(size) else size for size in last.meta["val"].shape]
                if any(isinstance(size, torch.SymInt) for size in shape):
                    return None
                known[last] = torch.full(shape, _LIKE[last.target], dtype=torch.float64)
            elif last.op != "call_function":
                return None
            else:
                waiting += last.all_input_nodes
        return self.run(node, known)

    @torch.no_grad()
    def run(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        """Return the value of a node that follows from known ones and constants."""
        values = dict(known)
        waiting = [node]
        while waiting:
            last = waiting[-1]
            missing = [n for n in last.all_input_nodes if n not in values]
            if last not in values and not missing:
                values[last] = self._computed(last, values)
            if last in values:
                waiting.pop()
            else:
                waiting += missing
        return values[node]

    def _computed(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            found: Any = self._graph
            for name in str(node.target).split("."):
                found = getattr(found, name)
            return found.detach().double() if isinstance(found, Tensor) and found.is_floating_point() else found
        if node.op != "call_function":
            raise ValueError(f"{node} is a {node.op}, which no value is known of")
        args: Any = fx.node.map_aggregate(node.args, lambda a: _wide(values, a))
        kwargs: Any = fx.node.map_aggregate(node.kwargs, lambda a: _wide(values, a))
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _wide(values: Mapping[fx.Node, Any], argument: Any) -> Any:
    if isinstance(argument, fx.Node):
        return values[argument]
    return torch.float64 if argument is torch.float32 else argument
