"""What a node of the ATen graph computes, where that is affine and shift-invariant.

A convolution, a linear layer, a BatchNorm in evaluation mode, a product or a sum with a constant per channel, an
average pool and a pad with zeros are maps of one value. Additions and subtractions are sums of two. Copies
change nothing. Everything else is not read, and bounds the regions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from repmlp_deploy.convert.reparam.regions.maps import Map, identity, scale
from repmlp_deploy.convert.reparam.regions.tracing import Values, sizes

__all__ = ["PRODUCTS", "Affine", "Overwritten", "Reading", "Same", "Sum", "grid_of", "read_node", "scale_shift"]

_aten = torch.ops.aten
PRODUCTS = (_aten.conv2d.default, _aten.conv2d.padding, _aten.linear.default, _aten.matmul.default, _aten.mm.default)
"""Operators that multiply by a matrix."""

_FOLDED_LATER = (
    _aten.conv1d.default,
    _aten.conv1d.padding,
    _aten.conv3d.default,
    _aten.conv3d.padding,
    _aten.conv_transpose1d.default,
    _aten.conv_transpose2d.input,
    _aten.conv_transpose3d.input,
)
"""Convolutions that are not read here; the ONNX exporter folds a BatchNorm after them."""

_MAP_AXES = 4  # (N, C, H, W)


@dataclass(frozen=True, eq=False)
class Affine:
    """A map of one value, and a constant per channel.

    Attributes:
        of: the value.
        map: over its channels.
        bias: (O,) float64, or (O, H, W) where it differs from place to place, or None.
        axis: of the channels; None if any axis will do, as the map is a single number.
    """

    of: fx.Node
    map: Map
    bias: Tensor | None
    axis: int | None


@dataclass(frozen=True, eq=False)
class Sum:
    """A sum of two values of one shape, the second times `sign`."""

    first: fx.Node
    second: fx.Node
    sign: int


@dataclass(frozen=True, eq=False)
class Overwritten:
    """A map (C, H, W) with constants written over some places.

    Attributes:
        of: the map.
        mask: (H, W), where.
        fill: (C, H, W), what; zero elsewhere.
    """

    of: fx.Node
    mask: Tensor
    fill: Tensor


@dataclass(frozen=True, eq=False)
class Same:
    """A copy of a value."""

    of: fx.Node


Reading = Affine | Overwritten | Sum | Same


def scale_shift(x: Tensor, factors: Tensor, shift: Tensor, axis: int) -> Tensor:
    """Return factors·x + shift per index of `axis`: a BatchNorm that moved through a reshape."""
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    return x * factors.reshape(shape) + shift.reshape(shape)


def read_node(node: fx.Node, values: Values) -> Reading | None:
    """Return what a node computes; None if that is not read."""
    shape = sizes(node)
    if node.op != "call_function" or shape is None or values.is_constant(node):
        return None
    target, args = node.target, node.args
    if getattr(target, "__name__", "") == "getitem":
        return _batch_norm(args[0], values) if args[1] == 0 and isinstance(args[0], fx.Node) else None
    reader = _READERS.get(target)
    if reader is None or not args or not isinstance(args[0], fx.Node) or values.is_constant(args[0]):
        return _mirrored(node, values)
    return reader(node, values)


def grid_of(node: fx.Node, axis: int | None) -> tuple[int, int]:
    """Return (H, W) of a map; (1, 1) where positions mean nothing."""
    shape = sizes(node)
    if shape is None or len(shape) != _MAP_AXES or axis not in (None, 1):
        return 1, 1
    return shape[2], shape[3]


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _pair(value: Any) -> tuple[int, int]:
    pair = [int(part) for part in value] if isinstance(value, list | tuple) else [int(value)]
    return (pair[0], pair[-1])


def _conv(node: fx.Node, values: Values) -> Reading | None:
    weight, bias = node.args[1], _argument(node, 2, "bias", None)
    if not (values.is_constant(weight) and values.is_constant(bias)):
        return None
    kernel, dilation = values.constant(weight), _pair(_argument(node, 5, "dilation", 1))
    padding = _argument(node, 4, "padding", 0)
    if isinstance(padding, str):  # "same" leaves a larger half of an odd padding for the end
        taps = kernel.shape[2:] if padding == "same" else (1, 1)
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, taps, strict=True)]
    groups, stride = int(_argument(node, 6, "groups", 1)), _pair(_argument(node, 3, "stride", 1))
    made = Map(kernel, groups, stride, _pair(padding), dilation)
    return Affine(node.all_input_nodes[0], made, values.constant(bias), 1)


def _linear(node: fx.Node, values: Values) -> Reading | None:
    weight, bias = node.args[1], _argument(node, 2, "bias", None)
    if not (values.is_constant(weight) and values.is_constant(bias)):
        return None
    kernel = values.constant(weight)[:, :, None, None]
    return Affine(node.all_input_nodes[0], Map(kernel, 1), values.constant(bias), _axes(node) - 1)


def _matmul(node: fx.Node, values: Values) -> Reading | None:
    if not values.is_constant(node.args[1]) or values.constant(node.args[1]).ndim != 2:  # noqa: PLR2004 - a matrix
        return None
    kernel = values.constant(node.args[1]).T[:, :, None, None]
    return Affine(node.all_input_nodes[0], Map(kernel, 1), None, _axes(node) - 1)


def _batch_norm(node: fx.Node, values: Values) -> Reading | None:
    if node.target is not _aten._native_batch_norm_legit_no_training.default:  # noqa: SLF001 - ATen's name
        return None
    x, weight, bias, mean, variance, _, eps = node.args
    if not isinstance(x, fx.Node) or not all(values.is_constant(v) for v in (weight, bias, mean, variance)):
        return None
    if x.target in _FOLDED_LATER and len(x.users) == 1 and values.is_constant(x.args[1]):
        return None  # as two nodes of its own it could not be folded
    mean, variance = values.constant(mean), values.constant(variance)
    factors = (variance + eps).rsqrt() * (1 if weight is None else values.constant(weight))
    shift = (0 if bias is None else values.constant(bias)) - mean * factors
    return Affine(x, scale(factors), shift, 1)


def _scale_shift(node: fx.Node, values: Values) -> Reading | None:
    x, factors, shift, axis = node.args
    return Affine(x, scale(values.constant(factors)), values.constant(shift), axis)  # type: ignore[arg-type]


def _product(node: fx.Node, values: Values) -> Reading | None:
    if not values.is_constant(node.args[1]) or node.kwargs:
        return None
    return _scaled(node, node.all_input_nodes[0], values.constant(node.args[1]))


def _quotient(node: fx.Node, values: Values) -> Reading | None:
    if not values.is_constant(node.args[1]) or node.kwargs:
        return None
    return _scaled(node, node.all_input_nodes[0], 1 / _as_tensor(values.constant(node.args[1])).double())


def _scaled(node: fx.Node, x: fx.Node, factors: Any) -> Reading | None:
    found = _per_channel(node, x, factors)
    return None if found is None else Affine(x, scale(found[0]), None, found[1])


def _added(node: fx.Node, values: Values) -> Reading | None:
    return _sum(node, values, 1)


def _subtracted(node: fx.Node, values: Values) -> Reading | None:
    return _sum(node, values, -1)


def _sum(node: fx.Node, values: Values, sign: int) -> Reading | None:
    first, second = node.args[:2]
    alpha = node.kwargs.get("alpha", 1)
    if alpha != 1 or not isinstance(first, fx.Node):
        return None
    if values.is_constant(second):
        found = _per_channel(node, first, values.constant(second))
        if found is None and isinstance(second, fx.Node) and (placed := _per_place(node, second, values)) is not None:
            return Affine(first, identity(len(placed)), sign * placed, 1)
        return None if found is None else Affine(first, identity(len(found[0])), sign * found[0], found[1])
    assert isinstance(second, fx.Node)  # noqa: S101 - what is not constant
    for x, other in ((first, second), (second, first)):
        placed = _per_place(node, other, values)
        if placed is not None and sizes(x) == sizes(node) and (sign > 0 or other is second):
            return Affine(x, identity(len(placed)), sign * placed, 1)
    return Sum(first, second, sign) if sizes(first) == sizes(second) == sizes(node) else None


def _per_channel(node: fx.Node, x: fx.Node, constant: Any) -> tuple[Tensor, int | None] | None:
    """Return (values per channel, axis) of a constant that broadcasts along one axis of x, else None."""
    shape, constant = sizes(node), _as_tensor(constant)
    if shape is None or sizes(x) != shape or constant.is_complex() or constant.dtype == torch.bool:
        return None
    constant = constant.double()
    if constant.numel() == 1:
        axis = 1 if len(shape) == _MAP_AXES else len(shape) - 1
        return constant.reshape(1).expand(shape[axis]), None
    wide = [i + len(shape) - constant.ndim for i, size in enumerate(constant.shape) if size > 1]
    if len(wide) != 1 or wide[0] < 1 or constant.numel() != shape[wide[0]]:
        return None
    return constant.flatten(), wide[0]


def _as_tensor(constant: Any) -> Tensor:
    """Return a constant as a tensor: a number as in Python, which is float64, and not in PyTorch's default type."""
    return torch.as_tensor(constant, dtype=torch.float64 if isinstance(constant, float) else None)


def _per_place(node: fx.Node, term: fx.Node, values: Values) -> Tensor | None:
    """Return (C, H, W) of a term that is the same for every input; else None."""
    shape, given = sizes(node), sizes(term)
    if shape is None or given is None or len(shape) != _MAP_AXES or len(given) != _MAP_AXES:
        return None
    found = values.per_sample(term)
    return None if found is None else found.double().expand(shape[1:])


def _written_over(node: fx.Node, values: Values) -> Reading | None:
    x, source, axis, *where = node.args
    shape = sizes(node)
    if not isinstance(x, fx.Node) or not isinstance(source, fx.Node) or shape is None or len(shape) != _MAP_AXES:
        return None
    found = values.per_sample(source)
    if found is None or int(axis) % _MAP_AXES < 2:  # type: ignore[arg-type]  # noqa: PLR2004 - (N, C, H, W)
        return None
    place = (int(axis) % _MAP_AXES - 1, *where)  # type: ignore[arg-type]
    zeros = torch.zeros(shape[1:], dtype=torch.float64)
    mask = torch.slice_scatter(zeros, torch.ones_like(found), *place)  # type: ignore[arg-type]
    return Overwritten(x, mask[0] > 0, torch.slice_scatter(zeros, found.double(), *place))  # type: ignore[arg-type]


def _average(node: fx.Node, values: Values) -> Reading | None:
    del values
    x, shape = node.all_input_nodes[0], sizes(node)
    taps, padding = _pair(node.args[1]), _pair(_argument(node, 3, "padding", 0))
    stride = _pair(_argument(node, 2, "stride", None) or node.args[1])
    counts, divisor = _argument(node, 5, "count_include_pad", True), _argument(node, 6, "divisor_override", None)
    before = sizes(x)
    if shape is None or before is None or len(shape) != _MAP_AXES or _argument(node, 4, "ceil_mode", False):
        return None
    if not counts and padding != (0, 0):
        return None  # windows at the border divide by less
    kernel = torch.full((shape[1], 1, *taps), 1 / (divisor or taps[0] * taps[1]), dtype=torch.float64)
    return Affine(x, Map(kernel, shape[1], stride, padding), None, 1)


def _padded(node: fx.Node, values: Values) -> Reading | None:
    del values
    pads, fill, shape = list(node.args[1]), _argument(node, 2, "value", 0), sizes(node)  # type: ignore[arg-type]
    constant = _argument(node, 2, "mode", "constant") == "constant" if node.target is _aten.pad.default else True
    fill = _argument(node, 3, "value", 0) if node.target is _aten.pad.default else fill
    if shape is None or len(shape) != _MAP_AXES or len(pads) > 4 or fill not in (None, 0) or not constant:  # noqa: PLR2004
        return None
    pads = [*pads, 0, 0][:4]  # left, right, top, bottom
    kernel = torch.ones(shape[1], 1, 1, 1, dtype=torch.float64)
    return Affine(node.all_input_nodes[0], Map(kernel, shape[1], lead=(pads[2], pads[0])), None, 1)


def _copied(node: fx.Node, values: Values) -> Reading | None:
    del values
    x = node.all_input_nodes[0]
    return Same(x) if sizes(x) == sizes(node) else None


def _mirrored(node: fx.Node, values: Values) -> Reading | None:
    """Read a product or a sum whose first operand is the constant."""
    if node.target not in (_aten.mul.Tensor, _aten.add.Tensor) or node.kwargs or len(node.args) < 2:  # noqa: PLR2004
        return None
    constant, x = node.args
    if not isinstance(x, fx.Node) or not values.is_constant(constant) or values.is_constant(x):
        return None
    if node.target is _aten.mul.Tensor:
        return _scaled(node, x, values.constant(constant))
    found = _per_channel(node, x, values.constant(constant))
    return None if found is None else Affine(x, identity(len(found[0])), found[0], found[1])


def _axes(node: fx.Node) -> int:
    return len(sizes(node) or ())


_READERS: dict[object, Callable[[fx.Node, Values], Reading | None]] = {
    _aten.conv2d.default: _conv,
    _aten.conv2d.padding: _conv,
    _aten.linear.default: _linear,
    _aten.matmul.default: _matmul,
    _aten.mm.default: _matmul,
    _aten.mul.Tensor: _product,
    _aten.div.Tensor: _quotient,
    _aten.add.Tensor: _added,
    _aten.sub.Tensor: _subtracted,
    _aten.avg_pool2d.default: _average,
    _aten.constant_pad_nd.default: _padded,
    _aten.pad.default: _padded,
    _aten.slice_scatter.default: _written_over,
    _aten.clone.default: _copied,
    _aten.alias.default: _copied,
    _aten.detach.default: _copied,
    scale_shift: _scale_shift,
}
"""ATen operator to what reads a node of it."""
