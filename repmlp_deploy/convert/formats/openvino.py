"""OpenVINO IR from a verified ONNX graph: fp32, fp16, bf16, and int8 through NNCF.

Products are convolutions and matrix products with constant weights; they hold nearly all of a network's bytes and
arithmetic, and a precision is one of theirs:

| precision | weights of products | what the CPU plugin computes them in |
|---|---|---|
| fp32 | float32 | float32 |
| fp16 | float16 | float32: the file is half as large, the speed the same |
| bf16 | bfloat16 | bfloat16, asked for by the runner: the plugin rounds weights to it in any case |
| int8 | int8, symmetric, a scale an output channel | uint8 × int8 into int32; what lies between in float32 |

**Convolutions on single points.** A 1×1 convolution on a 1×1 map is a product over channels. With a symbolic batch
OpenVINO 2026.4 gives wrong results for it at batch 1 where it fuses an activation and a channel-wise product into it
and computes in bfloat16 or int8, by up to half of the value: the gates of the global perceptron. As MatMul it is right.

**Large products in bf16.** FC3 of a single shareset reads a matrix of 20 MB for every few rows, so that memory is the
limit: 1.1 TFLOP/s of 2.5 that the same CPU reaches on smaller ones. Cut by columns into products of 5 MB each, side by
side, the cache holds what many rows need: B224 took 0.89 of the time at batch 8 and 16, bit by bit the same. With fewer
rows there is nothing to gain (1.02 at batch 1, 1.04 at 4), nor in float32 and int8, whose limit is arithmetic.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert.capture import captured_output
from repmlp_deploy.convert.formats.candidate import BY_ACCURACY
from repmlp_deploy.convert.formats.openvino_float import with_float_nodes
from repmlp_deploy.convert.formats.openvino_graph import PRODUCTS, products, weights_of, with_all_inputs
from repmlp_deploy.convert.formats.openvino_levels import arrange_levels
from repmlp_deploy.convert.graph.lowering.patterns import match_patterns, module_and_parents
from repmlp_deploy.errors import BuildError, InputError, MissingDependency
from repmlp_deploy.precision import PRECISIONS, OpenVinoNames
from repmlp_deploy.runtime.openvino.int8 import fit_weights, int8_kernels
from repmlp_deploy.text import first_line

try:
    import openvino as ov
    from openvino import opset15 as ops
except ImportError:
    raise MissingDependency("openvino", "openvino") from None

__all__ = ["IR", "build_ir", "check_precision", "quantize_ir"]

_LARGE_MATRIX, _COLUMNS_OF_A_TILE = 5_000_000, 16  # bytes; bfloat16 numbers
_ROWS_ENOUGH = 8  # images a call from which cutting large products pays
_POINTWISE: Mapping[str, Any] = MappingProxyType({"Relu": ops.relu, "Sigmoid": ops.sigmoid})
_SUFFIX = "/WithoutBiases"  # which the ONNX reader adds to a product whose bias it splits off


@dataclass(frozen=True)
class IR:
    """An OpenVINO model.

    Attributes:
        xml: the topology.
        weights: its constants, what a `.bin` file holds.
        details: version, what is stored and computed in what, and why.
    """

    xml: bytes
    weights: bytes
    details: dict[str, Any]


def check_precision(precision: str, keep_fp32: Sequence[str] = ()) -> None:
    """Raise, before minutes are spent, unless an IR of this precision can be made here.

    Raises:
        InputError: there is no such precision, or nothing can be kept out of it.
        MissingDependency: int8 needs nncf.
    """
    names = _names_of(precision)
    if names.computes != "f32" and keep_fp32:
        raise InputError(
            f"openvino computes a whole model in {precision} or none of it: use --keep-fp32 with fp16 or int8"
        )
    if PRECISIONS[precision].lowering == "quantize":
        _import_nncf()


def _names_of(precision: str) -> OpenVinoNames:
    """Return what OpenVINO calls a precision.

    Raises:
        InputError: OpenVINO has no such precision.
    """
    names = PRECISIONS[precision].openvino if precision in PRECISIONS else None
    if names is None:
        known = ", ".join(name for name, entry in PRECISIONS.items() if entry.openvino)
        raise InputError(f"openvino has no precision {precision}; it has {known}")
    return names


def build_ir(  # noqa: PLR0913 - the graph, and all that decides what becomes of it
    graph: bytes,
    *,
    precision: str,
    batch: BatchRange,
    inputs: Mapping[str, Sequence[int]],
    calibration: Sequence[Mapping[str, NDArray[Any]]] | None = None,
    keep_fp32: Sequence[str] = (),
) -> IR:
    """Build the IR of a serialized fp32 ONNX graph.

    Args:
        graph: the model, weights inside.
        precision: of `PRECISIONS`.
        batch: sizes to serve; a range stays symbolic.
        inputs: name of every input to its shape without the batch, (C, H, W).
        calibration: for int8, feeds of the fixed batch, else of 1: name of every input to its array (n, C, H, W).
        keep_fp32: patterns as in a shell, of node names or of module names such as `stages.0.*`, that stay in float32.

    Raises:
        InputError: the precision cannot be had, calibration is missing, or a pattern matches nothing.
        BuildError: OpenVINO or NNCF refuses the graph.
        MissingDependency: int8 needs nncf.
    """
    if precision in PRECISIONS and PRECISIONS[precision].lowering == "quantize":
        feeds = calibration or ()
        return quantize_ir(graph, precision, batch=batch, inputs=inputs, calibration=feeds, keep_fp32=keep_fp32)(())
    check_precision(precision, keep_fp32)
    model = _prepared(graph, batch, inputs)
    kept = _kept_nodes(model, keep_fp32)
    names = _names_of(precision)
    if names.stored is not None:
        if names.computes == "bf16" and batch.opt >= _ROWS_ENOUGH:
            _cut_large_products(model)
        kept |= _store_weights(model, getattr(ov.Type, names.stored), kept)
    return IR(*_serialized(model), {"version": ov.__version__} | _report(model, kept))


def quantize_ir(  # noqa: PLR0913 - see `build_ir`
    graph: bytes,
    precision: str,
    *,
    batch: BatchRange,
    inputs: Mapping[str, Sequence[int]],
    calibration: Sequence[Mapping[str, NDArray[Any]]],
    keep_fp32: Sequence[str] = (),
) -> Callable[[Collection[str]], IR]:
    """Quantize once; return a function from names of further ONNX nodes to the IR with these in float32, too."""
    check_precision(precision, keep_fp32)
    model = _prepared(graph, batch, inputs)
    kept = _kept_nodes(model, keep_fp32)
    if not calibration:
        raise InputError(f"{precision} needs calibration inputs: pass --calibration DIR or FILE.npz")
    quantized = _quantized(model, calibration, kept)
    details = {"version": ov.__version__, "nncf": _import_nncf().__version__, "calibration_samples": len(calibration)}

    def built(further: Collection[str]) -> IR:
        names = set(further)
        changed = with_float_nodes(quantized, model, lambda op: _name(op) in names) if names else quantized
        return IR(*_serialized(changed), details | _report(changed, dict.fromkeys(names, BY_ACCURACY) | kept))

    return built


def _prepared(graph: bytes, batch: BatchRange, inputs: Mapping[str, Sequence[int]]) -> Any:
    """Return the model of a graph, for the batch sizes that are served."""
    model = with_all_inputs(_read(graph), graph, tuple(inputs))
    n = batch.min if batch.min == batch.max else -1
    model.reshape({name: [n, *shape] for name, shape in inputs.items()})
    if n < 0:
        _turn_point_convolutions(model)
    return model


def _read(graph: bytes) -> Any:
    try:
        return ov.Core().read_model(graph)
    except RuntimeError as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise BuildError(f"OpenVINO cannot read the graph: {said[-1]}") from None


def _name(product: Any) -> str:
    """Return a product's name in the ONNX graph."""
    return str(product.get_friendly_name()).removesuffix(_SUFFIX)


def _turn_point_convolutions(model: Any) -> None:
    """Make every 1×1 convolution on a 1×1 map, (N, C, 1, 1) -> (N, O, 1, 1), a MatMul, (N, C) -> (N, O).

    What follows a channel at a time, biases and activations, follows in two axes as well: it fuses into the product,
    and a gate keeps a few nodes of the dozen that a runtime would visit for every batch.
    """
    flat: dict[str, Any] = {}  # name of a node to its twin in two axes
    ordered = model.get_ordered_ops()
    for op in ordered:
        twin = _in_two_axes(op, flat)
        if twin is not None:
            twin.set_friendly_name(op.get_friendly_name())
            flat[op.get_friendly_name()] = twin
    for op in ordered:
        readers = [port for port in op.output(0).get_target_inputs() if port.get_node().get_friendly_name() not in flat]
        if op.get_friendly_name() in flat and readers:
            shape = ops.constant([-1, op.get_output_partial_shape(0)[1].get_length(), 1, 1], ov.Type.i64)
            point = ops.reshape(flat[op.get_friendly_name()], shape, special_zero=False)
            for reader in readers:
                reader.replace_source_output(point.output(0))


def _in_two_axes(op: Any, flat: Mapping[str, Any]) -> Any:
    """Return the copy of a node on 1×1 maps, reading the copies of its inputs; None if the node stays."""
    kind, sources = op.get_type_name(), [value.get_node() for value in op.input_values()]
    twins = [flat.get(source.get_friendly_name()) for source in sources]
    if kind == "Convolution" and (weights := weights_of(op)) is not None and _is_on_points(op):
        rows, columns = weights.get_output_shape(0)[:2]
        matrix = ops.constant(weights.data.reshape(rows, columns))
        matrix.set_friendly_name(weights.get_friendly_name())
        x = twins[0]
        if x is None:
            x = ops.reshape(op.input_value(0), ops.constant([-1, columns], ov.Type.i64), special_zero=False)
        return ops.matmul(x, matrix, transpose_a=False, transpose_b=True)
    if kind in _POINTWISE and twins[0] is not None:
        return _POINTWISE[kind](twins[0])
    if kind == "Add" and any(twins):
        i = 0 if twins[0] is not None else 1
        bias = sources[1 - i]
        on_points = [str(edge) for edge in bias.get_output_partial_shape(0)][2:] == ["1", "1"]
        values = bias.input_value(0).get_node() if bias.get_type_name() == "Reshape" else bias
        if on_points and values.get_type_name() == "Constant":
            row = ops.constant(values.data.reshape(1, -1))
            row.set_friendly_name(values.get_friendly_name())
            return ops.add(twins[i], row)
    return None


def _is_on_points(convolution: Any) -> bool:
    """Return whether input, kernel and output are 1×1 maps; a 1×1 kernel with padding is not."""
    ports = (convolution.input(0), convolution.input(1), convolution.output(0))
    return all(str(edge) == "1" for port in ports for edge in list(port.get_partial_shape())[2:])


def _cut_large_products(model: Any) -> None:
    """Cut every MatMul by a constant (K, O) that is large in bf16 into several by columns, concatenated."""
    for op in products(model):
        weights = weights_of(op)
        if op.get_type_name() != "MatMul" or weights is None or weights is not op.input_value(1).get_node():
            continue
        matrix, flags = weights.data, op.get_attributes()
        parts = -(-2 * matrix.size // _LARGE_MATRIX)
        if matrix.ndim != 2 or parts == 1 or flags["transpose_a"] or flags["transpose_b"]:  # noqa: PLR2004 - (K, O)
            continue
        tiles = -(-matrix.shape[1] // _COLUMNS_OF_A_TILE)
        edges = [min(matrix.shape[1], _COLUMNS_OF_A_TILE * (tiles * i // parts)) for i in range(parts)]
        cut = []
        for i, (a, b) in enumerate(zip(edges, [*edges[1:], matrix.shape[1]], strict=True)):
            constant = ops.constant(np.ascontiguousarray(matrix[:, a:b]))
            constant.set_friendly_name(f"{weights.get_friendly_name()}.columns{i}")
            product = ops.matmul(op.input_value(0), constant, transpose_a=False, transpose_b=False)
            product.set_friendly_name(f"{op.get_friendly_name()}.columns{i}")
            cut.append(product)
        whole = ops.concat(cut, axis=-1)
        whole.set_friendly_name(op.get_friendly_name())
        for reader in list(op.output(0).get_target_inputs()):
            reader.replace_source_output(whole.output(0))


def _kept_nodes(model: Any, patterns: Sequence[str]) -> dict[str, str]:
    """Return names of the nodes that a pattern keeps, with the pattern.

    Raises:
        InputError: a pattern matches nothing.
    """
    ordered = model.get_ordered_ops() if patterns else []
    kept = match_patterns(
        patterns, ((_name(op), (_name(op), *module_and_parents(_module(op)))) for op in ordered), map(_module, ordered)
    )
    return {name: f"--keep-fp32 {pattern}" for name, pattern in kept.items()}


def _module(op: Any) -> str:
    """Return the module whose weights a product multiplies by, `stages.0.1.fc3`; empty if there is none."""
    weights = weights_of(op) if op.get_type_name() in PRODUCTS else None
    return "" if weights is None else str(weights.get_friendly_name()).removesuffix(".weight")


def _store_weights(model: Any, kind: Any, kept: Mapping[str, str]) -> dict[str, str]:
    """Store products' weights in a smaller type; names of those it cannot hold, with the reason."""
    beyond: dict[str, str] = {}
    for op in products(model):
        weights = weights_of(op)
        if _name(op) in kept or weights is None or weights.get_element_type() != ov.Type.f32:
            continue
        if kind == ov.Type.f16 and np.abs(weights.data).max() > np.finfo(np.float16).max:
            beyond[_name(op)] = "weights beyond float16's 65504"
            continue
        small = ops.constant(_rounded(weights.data, kind))
        small.set_friendly_name(weights.get_friendly_name())
        widened = ops.convert(small, "f32")
        for reader in list(weights.output(0).get_target_inputs()):
            reader.replace_source_output(widened.output(0))
    return beyond


def _rounded(values: NDArray[np.float32], kind: Any) -> Any:
    """Return a tensor of finite values in a 16-bit type, each the nearest, ties to even."""
    tensor = ov.Tensor(kind, ov.Shape(values.shape))  # memory of its own: a constant keeps it, not numpy's
    if kind == ov.Type.f16:
        tensor.data[:] = values
        return tensor
    # bfloat16 is the upper half of float32; OpenVINO's own conversion of constants does not round to nearest
    bits = np.ascontiguousarray(values).view(np.uint32)
    upper = ((bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16).astype(np.uint16)
    tensor.data.view(np.uint16)[:] = upper
    return tensor


def _report(model: Any, kept: Mapping[str, str]) -> dict[str, Any]:
    """Count products by the type of their weights, and name those that stay in float32."""
    lowered: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    left = []
    for op in products(model):
        weights = weights_of(op)
        kind = "none" if weights is None else weights.get_element_type().get_type_name()
        stored[kind] += 1
        if kind in ("f32", "none"):
            reason = kept.get(_name(op), "its weights are no constant" if weights is None else "NNCF left it")
            left.append({"node": _name(op), "op": op.get_type_name(), "module": _module(op), "reason": reason})
        else:
            lowered[op.get_type_name()] += 1
    about: dict[str, Any] = {"product_weights": dict(stored)}
    return about | {"lowered": dict(lowered), "kept_fp32": left} if lowered else about


def _quantized(model: Any, calibration: Sequence[Mapping[str, NDArray[Any]]], kept: Collection[str]) -> Any:
    """Quantize `model` to int8: weights symmetric per channel, activations asymmetric per tensor, largest ranges.

    Symmetric activations were no faster on a CPU and a fifth further from the trained network. NNCF's own choice of
    ranges, the mean over samples of each one's largest, cuts off what outliers say: up to six times further.

    Where the CPU gets weights of 8 bits wrong, they have 7: see `runtime.openvino.int8`. NNCF then measures the
    correction of biases for these, with which outputs are a third closer than if they are rounded afterwards.
    """
    nncf, kernels = _import_nncf(), int8_kernels()
    fix = None if kernels.full_range else nncf.OverflowFix.ENABLE
    ranges = import_module("nncf.quantization.range_estimator").RangeEstimatorParametersSet.MINMAX
    names = [op.get_friendly_name() for op in model.get_ordered_ops() if _name(op) in kept]
    with captured_output("nncf"):
        try:
            quantized = nncf.quantize(
                model,
                nncf.Dataset([dict(feed) for feed in calibration]),
                preset=nncf.QuantizationPreset.MIXED,
                target_device=nncf.TargetDevice.CPU,
                subset_size=len(calibration),
                ignored_scope=nncf.IgnoredScope(names=names) if names else None,
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    activations_range_estimator_params=ranges, overflow_fix=fix
                ),
            )
        except Exception as error:
            raise BuildError(f"NNCF cannot quantize the graph: {first_line(error)}; run again with --debug") from error
    fit_weights(quantized, kernels)
    arrange_levels(quantized)
    return quantized


def _import_nncf() -> Any:
    """Import NNCF, which takes a second and a half."""
    try:
        with captured_output("nncf"):
            import nncf  # noqa: PLC0415 - int8 alone needs it
    except ImportError:
        raise MissingDependency("nncf", "export") from None
    return nncf


def _serialized(model: Any) -> tuple[bytes, bytes]:
    """Return the content of the two files of an IR; OpenVINO writes them only to a folder."""
    with tempfile.TemporaryDirectory(prefix="repmlp-openvino-") as folder:
        path = Path(folder, "model.xml")
        ov.save_model(model, path, compress_to_fp16=False)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()
