"""Check a region: run what was written beside what was there, in float64, on Gaussian values of its sources.

Where the two differ, the first step of the derivation that is wrong is named: a node that was misread, or else the
value whose form is wrong although those it came from are right. Of a sum, the branch is named whose share is missing,
doubled or most like the error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from repmlp_deploy.convert.reparam.regions.choosing import Choice
from repmlp_deploy.convert.reparam.regions.forms import Form
from repmlp_deploy.convert.reparam.regions.maps import Map
from repmlp_deploy.convert.reparam.regions.reading import Affine, Overwritten, Reading, Same, Sum, grid_of
from repmlp_deploy.convert.reparam.regions.tracing import module_path, sizes, stack_of
from repmlp_deploy.convert.reparam.regions.writing import Written
from repmlp_deploy.errors import VerificationError

__all__ = ["Run", "branches_of", "check_region", "place_of_branch", "share_of_error"]

Run = Callable[[fx.Node, Mapping[fx.Node, Tensor]], Tensor]

_CLOSE = 1e-11  # of the largest output: sums of some thousand float64 products stay below 1e-13, faults are far above
_ALIKE = 1e-4  # of a branch's largest value: what float32 weights may leave of a share that is missing
_TINY = 1e-300
_SEED = 20210505


@torch.no_grad()
def check_region(region: Written, form: Form, choice: Choice, run: Run) -> None:
    """Raise unless what was written computes what was there, whose readers still read it.

    Args:
        region: as it was written, its parameters in float64.
        form: what it was written from.
        choice: how the form was found.
        run: computes a value of the graph from values of the trained one.

    Raises:
        VerificationError: the two differ; the message names the module and the branch.
    """
    given = _gaussian(form, choice.readings)
    expected, got = run(region.value, given), run(region.made, given)
    if _is_close(got, expected):
        return
    place = region.path or "the network"
    found = _fault(region.value, form, choice, run)
    raise VerificationError(f"merging {place} changes what it computes: {found}")


def branches_of(node: fx.Node, readings: Mapping[fx.Node, Reading], covers: frozenset[fx.Node]) -> list[fx.Node]:
    """Return the values that a sum adds up, in the order they are written; only the value itself where it is no sum."""
    reading = readings.get(node)
    while isinstance(reading, Affine | Same) and node in covers and reading.of in covers and _is_plain(reading):
        node = reading.of
        reading = readings.get(node)
    if not isinstance(reading, Sum) or node not in covers:
        return [node]
    return [part for of in (reading.first, reading.second) for part in _summands(of, readings, covers)]


def place_of_branch(node: fx.Node, root: fx.Node, form: Form, readings: Mapping[fx.Node, Reading]) -> str:
    """Return the branch of a region that a node is in, `branch 3 of 4`; empty where there is only one."""
    branches = branches_of(root, readings, form.covers)
    for i, branch in enumerate(branches):
        if len(branches) > 1 and (node is branch or node in _below(branch, form.covers)):
            return f"branch {i + 1} of {len(branches)}"
    return ""


def share_of_error(error: Tensor, shares: Sequence[Tensor]) -> tuple[int, str]:
    """Return which branch of a sum explains its error best, and what became of it."""
    for i, share in enumerate(shares):
        for factor, said in ((-1, "left out"), (1, "counted twice")):
            if float((error - factor * share).abs().max()) <= _ALIKE * float(share.abs().max()):
                return i, said
    alike = [abs(float((error * share).sum())) / max(float(share.norm()), _TINY) for share in shares]
    return max(range(len(alike)), key=alike.__getitem__), "added up wrongly"


def _is_plain(reading: Affine | Same) -> bool:
    return isinstance(reading, Same) or reading.map.is_scale


def _summands(node: fx.Node, readings: Mapping[fx.Node, Reading], covers: frozenset[fx.Node]) -> Iterator[fx.Node]:
    reading = readings.get(node)
    if isinstance(reading, Sum) and node in covers:
        yield from _summands(reading.first, readings, covers)
        yield from _summands(reading.second, readings, covers)
    else:
        yield node


def _below(node: fx.Node, covers: frozenset[fx.Node]) -> set[fx.Node]:
    """Return the nodes of a region that a value follows from."""
    found, waiting = set(), [node]
    while waiting:
        last = waiting.pop()
        if last not in found:
            found.add(last)
            waiting += [n for n in last.all_input_nodes if n in covers or n.name.startswith("_native_batch_norm")]
    return found


def _gaussian(form: Form, readings: Mapping[fx.Node, Reading]) -> dict[fx.Node, Tensor]:
    """Return values for the sources of a form, and for whatever else the nodes that it covers read."""
    read = [of for node in sorted(form.covers) for of in _operands(readings[node]) if of not in form.covers]
    generator = torch.Generator().manual_seed(_SEED)
    return {
        source: torch.randn(sizes(source) or (), dtype=torch.float64, generator=generator)
        for source in dict.fromkeys([*form.maps, *read])
    }


def _operands(reading: Reading) -> tuple[fx.Node, ...]:
    return (reading.first, reading.second) if isinstance(reading, Sum) else (reading.of,)


def _is_close(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape:
        return False
    return float((got - expected).abs().max()) <= _CLOSE * max(float(expected.abs().max()), _TINY)


def _fault(root: fx.Node, form: Form, choice: Choice, run: Run) -> str:
    """Return what is wrong first, and where."""
    for node in sorted(form.covers):
        said = _misread(node, choice.readings[node], run)
        if said:
            return _placed(node, root, form, choice, said)
    for node in sorted(form.covers):
        for derived in choice.derived.get(node, ()):
            if derived.covers <= form.covers and not _holds(node, derived, choice, run):
                return _of_derivation(node, root, form, choice, run, derived)
    return "the layers that were written are not the maps that were found"


def _misread(node: fx.Node, reading: Reading, run: Run) -> str:
    """Return what was misread of a node; empty if nothing was."""
    generator = torch.Generator().manual_seed(_SEED)
    given = {x: torch.randn(sizes(x) or (), dtype=torch.float64, generator=generator) for x in _operands(reading)}
    expected = run(node, given)
    if isinstance(reading, Sum):
        got = given[reading.first] + reading.sign * given[reading.second]
    elif isinstance(reading, Same):
        got = given[reading.of]
    elif isinstance(reading, Overwritten):
        got = torch.where(reading.mask, reading.fill, given[reading.of])
    else:
        got = _evaluated(node, Form(reading.axis, {reading.of: reading.map}, reading.bias), given)
    return "" if _is_close(got, expected) else f"{_called(node)} is not what was read of it"


def _holds(node: fx.Node, form: Form, choice: Choice, run: Run) -> bool:
    given = _gaussian(form, choice.readings)
    return _is_close(_evaluated(node, form, given), run(node, given))


def _of_derivation(  # noqa: PLR0913 - what meets here
    node: fx.Node, root: fx.Node, form: Form, choice: Choice, run: Run, derived: Form
) -> str:
    branches = branches_of(node, choice.readings, form.covers)
    if len(branches) == 1:
        return _placed(node, root, form, choice, f"composing {_called(node)} with what comes before it is wrong")
    given = _gaussian(derived, choice.readings)
    error = _evaluated(node, derived, given) - run(node, given)
    shares = [run(branch, given) if branch not in given else given[branch] for branch in branches]
    index, said = share_of_error(error, shares)
    return _placed(branches[index], root, form, choice, f"this branch is {said}")


def _placed(node: fx.Node, root: fx.Node, form: Form, choice: Choice, said: str) -> str:
    path = module_path([node]) or "the network"
    branch = place_of_branch(node, root, form, choice.readings)
    place = " · ".join(word for word in (path, branch) if word)
    return f"first at {place}: {said}"


def _called(node: fx.Node) -> str:
    """Return the operator of a node and the module it is in."""
    kind = (
        str(node.args[0].target)
        if "getitem" in str(node.target) and isinstance(node.args[0], fx.Node)
        else str(node.target)
    )
    stack = stack_of(node)
    return f"{kind.removeprefix('aten.').partition('.')[0]} of {stack[-1] or 'the network'}" if stack else kind


def _evaluated(node: fx.Node, form: Form, given: Mapping[fx.Node, Tensor]) -> Tensor:
    """Return what a form says of its sources' values, by definition: every output from its own window."""
    total: Tensor | None = None
    axis = form.axis if form.axis is not None else (1 if len(sizes(node) or ()) == 4 else -1)  # noqa: PLR2004
    for source, made in form.maps.items():
        value = given[source]
        part = value if made is None else _windowed(value.movedim(axis, -1), made, grid_of(node, axis), axis)
        total = part if total is None else total + part
    assert total is not None  # noqa: S101 - a form has a source
    if form.bias is not None and form.bias.ndim > 1:
        total = total + form.bias
    elif form.bias is not None:
        total = (total.movedim(axis, -1) + form.bias).movedim(-1, axis)
    return total


def _windowed(value: Tensor, made: Map, grid: tuple[int, int], axis: int) -> Tensor:
    """Return a map of a value with channels last, by one product per tap."""
    o, g = made.outputs, made.groups
    kernel = made.kernel.reshape(g, o // g, -1, *made.taps)
    if made.is_pointwise:
        grouped = value.reshape(*value.shape[:-1], g, -1)
        return torch.einsum("...gc,goc->...go", grouped, kernel[..., 0, 0]).flatten(-2).movedim(-1, axis)
    result = value.new_zeros(len(value), *grid, g, o // g)
    index = torch.arange(grid[0]), torch.arange(grid[1])
    for y in range(made.taps[0]):
        for x in range(made.taps[1]):
            rows = index[0] * made.stride[0] - made.lead[0] + y * made.dilation[0]
            columns = index[1] * made.stride[1] - made.lead[1] + x * made.dilation[1]
            inside = ((rows >= 0) & (rows < value.shape[1]))[:, None] & (columns >= 0) & (columns < value.shape[2])
            seen = value[:, rows.clamp(0, value.shape[1] - 1)][:, :, columns.clamp(0, value.shape[2] - 1)]
            seen = (seen * inside[..., None]).reshape(len(value), *grid, g, -1)
            result += torch.einsum("nhwgc,goc->nhwgo", seen, kernel[..., y, x])
    return result.flatten(-2).movedim(-1, axis)
