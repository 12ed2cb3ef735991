"""Preprocessing as an ONNX graph of its own, for servers that run graphs and no Python: images to a network's input.

Its levels equal Pillow's, which rounds twice. A weight is rounded to 22 bits: output i of an edge of n levels, resized
to m, is the sum over j of q[i, j] u[j], with c = (i + 1/2) n / m, t = max(n / m, 1) and a filter f of radius r:

    q[i, j] = round(2^22 f((j - c + 1/2) / t) / sum over j of f(...)),  floor(c - r t + 1/2) <= j < floor(c + r t + 1/2)

Rows are summed and rounded to levels, then columns. Pillow 13 sums columns first where the height shrinks by more than
twice what the width does, and so does the graph; earlier releases do not, and some levels differ there by one.

Float64 holds these sums exactly, so a multiplication by the dense matrix q, in any order, gives the same bits. Only
the rows of q that the crop keeps are computed.

Source of the arithmetic: Pillow's `Resample.c`. ONNX Runtime has no operator that decodes, so images come decoded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import TensorSpec
from repmlp_deploy.card import Preprocessing
from repmlp_deploy.convert.graph.run import onnx_run
from repmlp_deploy.errors import InputError, MissingDependency, VerificationError
from repmlp_deploy.runtime.images import network_input

try:
    import onnx
    from onnx import parser
except ImportError:
    raise MissingDependency("onnx", "export") from None

__all__ = ["IMAGE", "preprocessing_graph"]

IMAGE = "image"
"""The graph's input: (N, H, W, C) uint8, in RGB order or one gray level."""

_MODEL = '<ir_version: 8, opset_import: ["" : 18, "repmlp" : 1], producer_name: "repmlp-deploy">'
_FUNCTION = '<opset_import: ["" : 18], domain: "repmlp">'
_EDGES = 3  # of an image with its channels
_SAMPLE = (1, 61, 83, 1)  # (N, H, W, C) of the sample where any will do; wide, so that every Pillow sums rows first
_WORD = re.compile(r"\w+")

_FILTERS: Mapping[str, tuple[int, str]] = MappingProxyType(
    {
        "bilinear": (
            1,
            """
  falling = Sub (one, distance)
  value = Max (falling, zero)""",
        ),
        "bicubic": (  # the cubic convolution of a = -1/2, in the order in which Pillow computes it
            2,
            """
  a1 = Mul (one_and_half, distance)
  a2 = Sub (a1, two_and_half)
  a3 = Mul (a2, distance)
  a4 = Mul (a3, distance)
  inner = Add (a4, one)
  b1 = Sub (distance, five)
  b2 = Mul (b1, distance)
  b3 = Add (b2, eight)
  b4 = Mul (b3, distance)
  b5 = Sub (b4, four)
  outer = Mul (b5, minus_half)
  is_near = Less (distance, one)
  near = Cast <to = 11> (is_near)
  is_far = Less (distance, two)
  within = Cast <to = 11> (is_far)
  far = Sub (within, near)
  inside = Mul (near, inner)
  outside = Mul (far, outer)
  value = Add (inside, outside)""",
        ),
    }
)
"""Pillow's filter to its radius and how its `value` follows from a `distance`."""

_NUMBERS: Mapping[str, float] = MappingProxyType(
    {
        "zero": 0,
        "half": 0.5,
        "minus_half": -0.5,
        "one": 1,
        "one_and_half": 1.5,
        "two": 2,
        "two_and_half": 2.5,
        "four": 4,
        "five": 5,
        "eight": 8,
        "bits": 1 << 22,
        "half_bit": 1 << 21,
        "most": 255,
        "longest": 1 << 14,
    }
)

# (count, edge): row i holds what every level of the edge adds to the output first + i; all float64.
_WEIGHTS = """  radius = Constant <value = double {{{radius}}}> ()
  end = Add (first, count)
  rows = Range (first, end, one)
  scale = Div (edge, resized)
  stretch = Max (scale, one)
  shrink = Div (one, stretch)
  reach = Mul (radius, stretch)
  row_middles = Add (rows, half)
  row_centres = Mul (row_middles, scale)
  last_axis = Constant <value_ints = [1]> ()
  centres = Unsqueeze (row_centres, last_axis)
  left = Sub (centres, reach)
  left_middle = Add (left, half)
  left_edge = Floor (left_middle)
  right = Add (centres, reach)
  right_middle = Add (right, half)
  right_edge = Floor (right_middle)
  columns = Range (zero, edge, one)
  is_after = GreaterOrEqual (columns, left_edge)
  is_before = Less (columns, right_edge)
  is_within = And (is_after, is_before)
  counted = Cast <to = 11> (is_within)
  offset = Sub (columns, centres)
  offset_middle = Add (offset, half)
  place = Mul (offset_middle, shrink)
  distance = Abs (place){value}
  taps = Mul (value, counted)
  total = ReduceSum (taps, last_axis)
  shares = Div (taps, total)
  fixed = Mul (shares, bits)
  size = Abs (fixed)
  size_half = Add (size, half)
  whole = Floor (size_half)
  sign = Sign (fixed)
  weights = Mul (whole, sign)"""

# An edge, or an error of Gather where q would need more memory than a server has to spare.
_BOUNDED = """  is_longer = Greater (edge, longest)
  index = Cast <to = 7> (is_longer)
  ones = Constant <value = double[1] {1}> ()
  factor = Gather (ones, index)
  bounded = Mul (edge, factor)"""

_LEVELS = """  middle = Add (sums, half_bit)
  quotient = Div (middle, bits)
  floor = Floor (quotient)
  levels = Clip (floor, zero, most)"""


def preprocessing_graph(how: Preprocessing, network: TensorSpec) -> tuple[onnx.ModelProto, TensorSpec, TensorSpec]:
    """Return the graph from decoded images of one size to the network's input, and the graph's own input and output.

    It ran in ONNX Runtime, and gave the bits that `Predictor` feeds its network.

    Args:
        how: from the card.
        network: the network's input.

    Raises:
        InputError: the network takes no such images, the card's filter has no graph, or some images would become
            another size.
        VerificationError: the graph computed something else.
    """
    batch, *edges = network.shape
    channels_first = how.input == "float32"
    shape = (how.channels, *edges[1:]) if channels_first else (*edges[:2], how.channels)
    if len(edges) != _EDGES or None in edges or tuple(edges) != shape or network.dtype != how.input:
        raise InputError(
            f"the network takes {network.dtype} {network.shape}, which is no image: it has no preprocessing"
        )
    height, width = (edge or 0 for edge in (edges[1:] if channels_first else edges[:2]))
    _check(how, (height, width))
    any_size = how.resize is not None or how.crop is not None
    image = TensorSpec(
        name=IMAGE, dtype="uint8", shape=(batch, *((None, None) if any_size else (height, width)), how.channels)
    )
    result = TensorSpec(name="tensor", dtype=network.dtype, shape=network.shape)
    steps = [*_sizes(how, (height, width)), *(_resized() if how.resize is not None else _cropped())]
    steps += _normalised(how, result.name) if channels_first else _levels_last(result.name)
    head = f"Preprocessing ({_declared(image)}) => ({_declared(result)})"
    functions = _functions(how.interpolation) if how.resize is not None else ""
    made = parser.parse_model(f"{_MODEL}\n{_with_numbers(head, chr(10).join(steps))}\n{functions}")
    onnx.checker.check_model(made, full_check=True)
    _verify(made, how, image)
    return made, image, result


def _declared(spec: TensorSpec) -> str:
    """Return a tensor's declaration in ONNX's text form."""
    edges = (letter if edge is None else str(edge) for letter, edge in zip("NHWC", spec.shape, strict=True))
    return f"{'uint8' if spec.dtype == 'uint8' else 'float'}[{', '.join(edges)}] {spec.name}"


def _check(how: Preprocessing, size: tuple[int, int]) -> None:
    """Raise unless every image becomes one of (height, width) `size` by a filter that is known."""
    if how.resize is None:
        fits = how.crop is None or how.crop == size
    elif how.crop is None:
        fits = how.resize.mode == "exact" and how.resize.size == size
    else:
        fits = how.crop == size and how.crop[0] <= how.resize.size[0] and how.crop[1] <= how.resize.size[1]
    if not fits:
        resized = "not" if how.resize is None else f"{how.resize.mode} to {how.resize.size}"
        raise InputError(
            f"preprocessing resizes {resized} and crops {how.crop}: not every image becomes {size[0]}x{size[1]}; "
            "preprocess in clients"
        )
    if how.resize is not None and how.interpolation not in _FILTERS:
        known = " and ".join(_FILTERS)
        raise InputError(f"preprocessing resizes {how.interpolation}; graphs resize {known}: preprocess in clients")


def _verify(model: onnx.ModelProto, how: Preprocessing, image: TensorSpec) -> None:
    """Raise unless the graph gives the bits of `network_input` for an image of random levels."""
    batch, height, width, channels = (edge or given for edge, given in zip(image.shape, _SAMPLE, strict=True))
    if how.resize is None and how.crop is not None:
        height, width = height + how.crop[0], width + how.crop[1]
    levels = np.random.default_rng(0).integers(0, 256, (batch, height, width, channels), dtype=np.uint8)
    expected = np.stack([network_input(_shown(one), how)[0] for one in levels])
    (got,) = onnx_run(model.SerializeToString())(levels)
    if got.shape != expected.shape or got.dtype != expected.dtype or not np.array_equal(got, expected):
        raise VerificationError(
            "the preprocessing graph computes something else than Pillow here: preprocess in clients"
        )


def _shown(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return (H, W, C) levels as images are given: those of one channel are (H, W)."""
    return levels[:, :, 0] if levels.shape[2] == 1 else levels


def _with_numbers(head: str, body: str) -> str:
    """Return a graph or a function: its head, the numbers that its body names, and its body."""
    words = set(_WORD.findall(body))
    numbers = [
        f"  {name} = Constant <value = double {{{value}}}> ()" for name, value in _NUMBERS.items() if name in words
    ]
    return "\n".join([f"{head} {{", *numbers, body, "}"])


def _functions(interpolation: str) -> str:
    radius, value = _FILTERS[interpolation]
    bodies = {
        "Weights (edge, resized, first, count) => (weights)": _WEIGHTS.format(radius=radius, value=value),
        "Bounded (edge) => (bounded)": _BOUNDED,
        "Levels (sums) => (levels)": _LEVELS,
    }
    return "\n".join(f"{_FUNCTION}\n{_with_numbers(head, body)}" for head, body in bodies.items())


def _sizes(how: Preprocessing, size: tuple[int, int]) -> list[str]:
    """Return the lines that compute the edges of the image, of the resized image, and where the crop starts."""
    lines = ["  shape = Shape (image)"]
    for i, (edge, length) in enumerate(zip(("height", "width"), size, strict=True), start=1):
        lines += [
            f"  {edge}_place = Constant <value_int = {i}> ()",
            f"  {edge}_whole = Gather (shape, {edge}_place)",
            f"  {edge}_given = Cast <to = 11> ({edge}_whole)",
            f"  {edge} = {'Identity' if how.resize is None else 'repmlp.Bounded'} ({edge}_given)",
            f"  {edge}_count = Constant <value = double {{{length}}}> ()",
        ]
    if how.resize is not None and how.resize.mode == "short-edge":
        lines.append(f"  short = Constant <value = double {{{how.resize.size[0]}}}> ()")
        lines.append("  shorter = Min (height, width)")
    for i, edge in enumerate(("height", "width")):
        if how.resize is None:
            lines.append(f"  {edge}_resized = Identity ({edge})")
        elif how.resize.mode == "exact":
            lines.append(f"  {edge}_resized = Constant <value = double {{{how.resize.size[i]}}}> ()")
        else:  # int(long * short / edge), with the product first: its quotient is rounded once
            lines += [
                f"  {edge}_product = Mul ({edge}, short)",
                f"  {edge}_quotient = Div ({edge}_product, shorter)",
                f"  {edge}_resized = Floor ({edge}_quotient)",
            ]
        lines += [  # Round takes halves to the even number, as Python's round
            f"  {edge}_beyond = Sub ({edge}_resized, {edge}_count)",
            f"  {edge}_middle = Div ({edge}_beyond, two)",
            f"  {edge}_first = Round ({edge}_middle)",
        ]
    return lines


def _resized() -> list[str]:
    """Return the lines from (N, H, W, C) to levels (N, C, h, w), resized and cropped."""
    return [
        "  exact = Cast <to = 11> (image)",
        "  planes = Transpose <perm = [0, 3, 1, 2]> (exact)",
        "  across_rows = repmlp.Weights (width, width_resized, width_first, width_count)",
        "  across = Transpose <perm = [1, 0]> (across_rows)",
        "  down = repmlp.Weights (height, height_resized, height_first, height_count)",
        "  height_less = Sub (height, height_resized)",
        "  width_less = Sub (width, width_resized)",
        "  width_less_twice = Mul (width_less, two)",
        "  at_least = Max (width_less_twice, zero)",
        "  is_tall = Greater (height_less, at_least)",
        "  levels = If (is_tall) <",
        "    then_branch = columns_first () => (double[N, C, h, w] tall_levels) {",
        "      column_sums = MatMul (down, planes)",  # (N, C, H, W) -> (N, C, h, W)
        "      columns = repmlp.Levels (column_sums)",
        "      tall_sums = MatMul (columns, across)",  # (N, C, h, W) -> (N, C, h, w)
        "      tall_levels = repmlp.Levels (tall_sums)",
        "    },",
        "    else_branch = rows_first () => (double[N, C, h, w] wide_levels) {",
        "      row_sums = MatMul (planes, across)",  # (N, C, H, W) -> (N, C, H, w)
        "      rows = repmlp.Levels (row_sums)",
        "      wide_sums = MatMul (down, rows)",  # (N, C, H, w) -> (N, C, h, w)
        "      wide_levels = repmlp.Levels (wide_sums)",
        "    }",
        "  >",
    ]


def _cropped() -> list[str]:
    """Return the lines from (N, H, W, C) to levels (N, C, h, w); an image that is too small has no such rows."""
    lines, source = [], "image"
    for axis, edge in ((1, "height"), (2, "width")):
        lines += [
            f"  {edge}_end = Add ({edge}_first, {edge}_count)",
            f"  {edge}_range = Range ({edge}_first, {edge}_end, one)",
            f"  {edge}_rows = Cast <to = 7> ({edge}_range)",
            f"  {edge}_cropped = Gather <axis = {axis}> ({source}, {edge}_rows)",
        ]
        source = f"{edge}_cropped"
    return [*lines, "  planes = Transpose <perm = [0, 3, 1, 2]> (width_cropped)", "  levels = Cast <to = 11> (planes)"]


def _levels_last(name: str) -> list[str]:
    """Return the lines from levels to (N, H, W, C) uint8, for a network that normalises."""
    return ["  last = Transpose <perm = [0, 2, 3, 1]> (levels)", f"  {name} = Cast <to = 2> (last)"]


def _normalised(how: Preprocessing, name: str) -> list[str]:
    """Return the lines from levels to (N, C, H, W) float32, less the mean over the std, in the network's order."""
    lines, source = ["  single = Cast <to = 1> (levels)"], "single"
    if how.colour_order == "BGR":
        lines += ["  order = Constant <value_ints = [2, 1, 0]> ()", "  turned = Gather <axis = 1> (single, order)"]
        source = "turned"
    for kind, values in (("mean", how.mean), ("std", how.std)):
        lines.append(f"  {kind} = Constant <value = float[{len(values)}, 1, 1] {{{_listed(values)}}}> ()")
    return [*lines, f"  shifted = Sub ({source}, mean)", f"  {name} = Div (shifted, std)"]


def _listed(values: Sequence[float]) -> str:
    return ", ".join(repr(float(value)) for value in values)
