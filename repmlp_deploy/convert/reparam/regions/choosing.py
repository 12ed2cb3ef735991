"""Which forms to compute: the cheapest set, by dynamic programming.

A value that something else than a map reads, or several readers, or the output, has to exist. For each of these the
programme takes the form with the lowest cost, its own and that of those of its sources that would not exist otherwise.
A value with several readers is a cut, unless it is only another one scaled and shifted per channel: each reader can
absorb that.

The cost of a form is its multiply-adds, and 16 for every element that a further pass over memory moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from repmlp_deploy.convert.reparam.regions.forms import Form, added_form, applied_form, itself, overwritten_form
from repmlp_deploy.convert.reparam.regions.maps import Map
from repmlp_deploy.convert.reparam.regions.reading import PRODUCTS, Affine, Overwritten, Reading, Same, read_node
from repmlp_deploy.convert.reparam.regions.tracing import Values, reads_shape_only, sizes

__all__ = ["Choice", "choose", "form_macs", "node_macs"]

_MOVE = 16  # multiply-adds that take as long as an element's way through memory
_FORMS = 6  # per value


@dataclass(frozen=True)
class Choice:
    """What is computed, and how.

    Attributes:
        forms: value to its form, in the graph's order; a value whose node stays as it is has none.
        derived: value to all forms that were found of it, for diagnosis.
        readings: node to what it computes.
    """

    forms: Mapping[fx.Node, Form]
    derived: Mapping[fx.Node, list[Form]]
    readings: Mapping[fx.Node, Reading]


def choose(graph: fx.Graph, values: Values) -> Choice:
    """Return the cheapest forms of the values that have to exist."""
    programme = _Programme(values)
    for node in graph.nodes:
        programme.add(node)
    return Choice(programme.chosen(graph), programme.forms, programme.readings)


def node_macs(node: fx.Node, reading: Reading) -> int:
    """Return the multiply-adds of a node as it stands, for one sample of the traced batch."""
    return _positions(node, reading.map) * reading.map.macs_per_position if isinstance(reading, Affine) else 0


def form_macs(node: fx.Node, form: Form) -> int:
    """Return the multiply-adds of a form."""
    return sum(
        _positions(node, m) * m.macs_per_position for m in form.maps.values() if m is not None and not m.is_identity
    )


def _positions(node: fx.Node, made: Map) -> int:
    return math.prod(sizes(node) or ()) // made.outputs


class _Programme:
    """The forms of every value and what each would cost."""

    def __init__(self, values: Values) -> None:
        self._values = values
        self.forms: dict[fx.Node, list[Form]] = {}
        self.readings: dict[fx.Node, Reading] = {}
        self._cost: dict[fx.Node, float] = {}

    def add(self, node: fx.Node) -> None:
        """Find the forms of the next value of the graph."""
        reading = read_node(node, self._values)
        if reading is None:
            return
        self.readings[node] = reading
        found = list(self._derived(node, reading))
        if not found:
            return
        best: dict[frozenset[fx.Node], Form] = {}
        for form in sorted(found, key=lambda form: self._total(node, form)):
            best.setdefault(frozenset(form.maps), form)
        fewest = min(best.values(), key=lambda form: len(form.maps))  # sums merge completely or not at all
        self.forms[node] = list(dict.fromkeys([*list(best.values())[:_FORMS], fewest]))
        paying = [self._total(node, form) for form in self.forms[node] if self._pays(node, form)]
        self._cost[node] = min(paying, default=self._as_it_stands(node))

    def chosen(self, graph: fx.Graph) -> dict[fx.Node, Form]:
        """Return the forms of the values that have to exist."""
        needed: set[fx.Node] = set()
        found: dict[fx.Node, Form] = {}
        for node in reversed(graph.nodes):
            if node.op == "output":
                needed.update(node.all_input_nodes)
            elif node in needed:
                paying = [form for form in self.forms.get(node, ()) if self._pays(node, form)]
                best = min(paying, key=lambda form: self._total(node, form), default=None)
                if best is not None:
                    found[node] = best
                needed.update(node.all_input_nodes if best is None else best.maps)
        return dict(reversed(found.items()))

    def _derived(self, node: fx.Node, reading: Reading) -> Iterator[Form]:
        if isinstance(reading, Same):
            for form in self._through(reading.of):
                yield Form(form.axis, form.maps, form.bias, form.covers | {node})
        elif isinstance(reading, Affine):
            made = (applied_form(node, reading, form) for form in self._through(reading.of))
            yield from (form for form in made if form is not None)
        elif isinstance(reading, Overwritten):
            over = (overwritten_form(node, reading, form) for form in self._through(reading.of))
            yield from (form for form in over if form is not None)
        else:
            for first in self._through(reading.first):
                for second in self._through(reading.second):
                    both = added_form(node, reading, first, second)
                    if both is not None:
                        yield both

    def _through(self, node: fx.Node) -> list[Form]:
        """Return the forms that a reader of a value may go on from."""
        forms = self.forms.get(node, [])
        if _readers(node) > 1:
            forms = [form for form in forms if form.is_per_channel]
        return [itself(node), *forms]

    def _total(self, node: fx.Node, form: Form) -> float:
        return _own_cost(node, form) + sum(self._further(source) for source in form.maps)

    def _as_it_stands(self, node: fx.Node) -> float:
        return _MOVE * math.prod(sizes(node) or ()) + sum(self._further(source) for source in node.all_input_nodes)

    def _further(self, source: fx.Node) -> float:
        """Return what it costs that a source exists, if it need not exist otherwise."""
        if source not in self._cost:
            return 0
        shared = _readers(source) > 1 and not any(form.is_per_channel for form in self.forms[source])
        return 0 if shared else self._cost[source]

    def _pays(self, node: fx.Node, form: Form) -> bool:
        """Return whether a form has no more multiply-adds and nodes than what it replaces."""
        if not _is_writable(node, form):
            return False
        before = [self.readings[covered] for covered in form.covers]
        macs = sum(node_macs(covered, self.readings[covered]) for covered in form.covers)
        nodes = sum(not isinstance(reading, Same) for reading in before)
        norm = any(isinstance(reading, Affine) and reading.map.is_scale for reading in before)
        layers = sum(covered.target in PRODUCTS for covered in form.covers)
        made = sum(m is not None and not m.is_scale for m in form.maps.values())  # a pool alone becomes no convolution
        return form_macs(node, form) <= macs and _nodes(form) <= nodes + norm and made <= layers


def _own_cost(node: fx.Node, form: Form) -> float:
    return form_macs(node, form) + _MOVE * _nodes(form) * math.prod(sizes(node) or ())


def _nodes(form: Form) -> int:
    """Return the number of nodes that a form is written as."""
    made = [m for m in form.maps.values() if m is not None and not m.is_identity]
    absorbs = any(not m.is_scale for m in made)
    return len(made) + len(form.maps) - 1 + (form.bias is not None and not absorbs)


def _readers(node: fx.Node) -> int:
    """Return how many nodes read a value, apart from those that read only its shape."""
    return sum(not reads_shape_only(user) for user in node.users)


def _is_writable(node: fx.Node, form: Form) -> bool:
    """Return whether torch has a layer for every map of a form, and the constant is one per channel."""
    if form.bias is not None and form.bias.ndim > 1:
        return False
    axes = len(sizes(node) or ())
    for made in form.maps.values():
        if made is None or made.is_scale or (axes == 4 and form.axis == 1):  # noqa: PLR2004 - (N, C, H, W)
            continue
        if not (made.is_pointwise and made.groups == 1 and form.axis == axes - 1):
            return False
    return True
