"""Write forms as layers into the graph: one convolution or linear layer per source that is not merely added."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from repmlp_deploy.convert.reparam.regions.forms import Form
from repmlp_deploy.convert.reparam.regions.maps import Map, identity
from repmlp_deploy.convert.reparam.regions.reading import grid_of
from repmlp_deploy.convert.reparam.regions.tracing import module_path, sizes

__all__ = ["Writer", "Written"]

_aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Written:
    """A form in the graph.

    Attributes:
        value: the node whose value it computes.
        made: the node that computes it now; `value`'s source itself where nothing is left to compute.
        sources: in the graph as it is now, by the sources of the form.
        path: of the innermost module that holds all it replaces.
        weights: name of every parameter that was made.
    """

    value: fx.Node
    made: fx.Node
    sources: dict[fx.Node, fx.Node]
    path: str
    weights: tuple[str, ...]


@dataclass(eq=False)
class Writer:
    """Writes forms into a graph, in the graph's order; parameters are float64 until `finish`.

    Attributes:
        graph: changed in place.
        current: a node of the trained graph to the one that computes its value now.
    """

    graph: fx.GraphModule
    current: dict[fx.Node, fx.Node] = field(default_factory=dict)
    holders: list[nn.Module] = field(default_factory=list)

    @torch.no_grad()
    def write(self, node: fx.Node, form: Form) -> Written:
        """Write a form before the node whose value it is; see `replace`."""
        path = module_path(sorted(form.covers))
        parts = _Parts(self, node, form, path)
        sources = {source: self.current.get(source, source) for source in form.maps}
        with self.graph.graph.inserting_before(node):
            made = parts.emit(sources)
        return Written(node, made, sources, path, tuple(parts.names))

    def replace(self, written: Written) -> None:
        """Let readers of a node read what was written for it."""
        self.current[written.value] = written.made
        written.value.replace_all_uses_with(written.made)

    def finish(self, dtype: torch.dtype) -> fx.GraphModule:
        """Return the graph with what was made rounded to the network's dtype, and without what nothing reads."""
        for holder in self.holders:
            holder.to(dtype)
        self.graph.graph.eliminate_dead_code()
        self.graph.graph.lint()
        made = fx.GraphModule(self.graph, self.graph.graph, "Merged")  # takes over what the graph reads
        for parameter in made.parameters():
            parameter.requires_grad_(False)
        made.eval()
        return made

    def parameter(self, holder: nn.Module, name: str, key: str, value: Tensor) -> fx.Node:
        """Register a parameter and return the node that reads it."""
        holder.register_parameter(key, nn.Parameter(value.contiguous().clone(), requires_grad=False))
        return self.graph.graph.get_attr(f"{name}.{key}")

    def holder(self, path: str) -> tuple[str, nn.Module]:
        """Return the name of a new module inside `path`, and the module, for the parameters of one layer."""
        count, names = 0, {name for name, _ in self.graph.named_modules()}
        while (name := ".".join(filter(None, (path, f"merged{count or ''}")))) in names:
            count += 1
        made = nn.Module()
        self.graph.add_submodule(name, made)
        self.holders.append(made)
        return name, made


class _Parts:
    """The nodes of one form."""

    def __init__(self, writer: Writer, node: fx.Node, form: Form, path: str) -> None:
        self._writer, self._node, self._form, self._path = writer, node, form, path
        self.names: list[str] = []
        self._bias = form.bias

    def emit(self, sources: dict[fx.Node, fx.Node]) -> fx.Node:
        """Write every map and add them up: convolutions first, as the first of them takes the bias."""
        form = self._form
        order = sorted(form.maps.items(), key=lambda item: _rank(item[1]))
        total: fx.Node | None = None
        for source, given in order:
            made = given if given is not None else identity(1)
            x = sources[source] if made.is_identity else self._mapped(source, sources[source], made)
            total = x if total is None else self._call(_aten.add.Tensor, (total, x))
        assert total is not None  # noqa: S101 - a form has a source
        if self._bias is not None:
            name, holder = self._writer.holder(self._path)
            total = self._call(
                _aten.add.Tensor, (total, self._parameter(holder, name, "shift", self._spread(self._bias)))
            )
        return total

    def _mapped(self, source: fx.Node, x: fx.Node, made: Map) -> fx.Node:
        name, holder = self._writer.holder(self._path)
        if made.is_scale:
            factors = self._parameter(holder, name, "scale", self._spread(made.kernel.flatten()))
            return self._call(_aten.mul.Tensor, (x, factors))
        bias, self._bias = self._bias, None
        is_map = len(sizes(self._node) or ()) == 4 and self._form.axis == 1  # noqa: PLR2004 - (N, C, H, W)
        kernel = made.kernel if is_map else made.kernel[:, :, 0, 0]
        weight = self._parameter(holder, name, "weight", kernel)
        shift = None if bias is None else self._parameter(holder, name, "bias", bias)
        if not is_map:
            return self._call(_aten.linear.default, (x, weight, shift))
        x, padding = self._padded(source, x, made)
        dilation = [d if k > 1 else 1 for d, k in zip(made.dilation, made.taps, strict=True)]
        arguments = (x, weight, shift, list(made.stride), padding, dilation, made.groups)
        return self._call(_aten.conv2d.default, arguments)

    def _padded(self, source: fx.Node, x: fx.Node, made: Map) -> tuple[fx.Node, list[int]]:
        """Return the input, padded or cut where a convolution's own padding cannot do it, and that padding."""
        grid, before = grid_of(self._node, 1), grid_of(source, 1)
        reach = [made.dilation[a] * (made.taps[a] - 1) for a in (0, 1)]
        trail = [(grid[a] - 1) * made.stride[a] - made.lead[a] + reach[a] + 1 - before[a] for a in (0, 1)]
        alike = (
            made.lead[a] >= 0 and (before[a] + 2 * made.lead[a] - reach[a] - 1) // made.stride[a] + 1 == grid[a]
            for a in (0, 1)
        )
        if all(alike):
            return x, list(made.lead)
        pads = [made.lead[1], trail[1], made.lead[0], trail[0]]
        return self._call(_aten.constant_pad_nd.default, (x, pads, 0.0)), [0, 0]

    def _spread(self, value: Tensor) -> Tensor:
        """Return a value per channel so that it broadcasts: (C, 1, 1) for maps."""
        axis, axes = self._form.axis, len(sizes(self._node) or ())
        return value.reshape(-1, *(1 for _ in range(axes - 1 - (1 if axis is None else axis))))

    def _parameter(self, holder: nn.Module, name: str, key: str, value: Tensor) -> fx.Node:
        self.names.append(f"{name}.{key}")
        return self._writer.parameter(holder, name, key, value)

    def _call(self, target: object, arguments: tuple[object, ...]) -> fx.Node:
        node = self._writer.graph.graph.call_function(target, arguments)  # type: ignore[arg-type]
        stacks = [covered.meta.get("nn_module_stack") or {} for covered in sorted(self._form.covers)]
        inner = stacks[0] if stacks else {}
        common = {key: value for key, value in inner.items() if all(key in stack for stack in stacks)}
        node.meta = {"nn_module_stack": common}
        return node


def _rank(made: Map | None) -> int:
    """Return 0 for convolutions, 1 for scales, 2 for what is only added."""
    if made is None or made.is_identity:
        return 2
    return 1 if made.is_scale else 0
