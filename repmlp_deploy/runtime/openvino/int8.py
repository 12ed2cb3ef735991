"""What some CPUs make of int8 products in OpenVINO, and weights for which they make no mistake.

A CPU without VNNI multiplies pairs of uint8 and int8 numbers and adds the two products in 16 bits, where a sum beyond
32,767 is cut off. With weights of up to ±127 sums are cut off, 255 · 127 · 2 = 64,770, and with weights of up to ±63
none is: 255 · 63 · 2 = 32,130. And a product that is batched over its weights, as FC3 of several sharesets, takes the
scales of the first one for all (seen in OpenVINO 2026.4 on AVX2 and on AVX-512 with VNNI, not with AMX).

What a CPU does is found out by two products whose results are known: neither the system's list of instructions nor the
plugin's says what its kernels use. Where one of them is wrong, weights are rounded to what is computed right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.errors import MissingDependency

try:
    import openvino as ov
    from openvino import opset15 as ops
except ImportError:
    raise MissingDependency("openvino", "openvino") from None

__all__ = ["Int8Kernels", "fit_weights", "int8_kernels"]

_PAIRS_FIT = 64
"""The largest weight of which two products with uint8 fit 16 bits: 255 · 64 · 2 = 32,640."""
_BATCHED = 3  # axes of weights that are batched


@dataclass(frozen=True)
class Int8Kernels:
    """What the plugin's int8 products get right on this CPU.

    Attributes:
        full_range: weights of up to ±127.
        scale_per_batch: a scale for every one of several batched matrices.
    """

    full_range: bool
    scale_per_batch: bool

    def describe(self) -> str:
        """Return what is done about what they get wrong; empty if nothing is."""
        seven_bits = "weights in 7 bits, since this CPU adds products in 16"
        one_scale = "one scale for the sharesets of a block"
        told = (seven_bits, not self.full_range), (one_scale, not self.scale_per_batch)
        return "; ".join(said for said, is_so in told if is_so)


@cache
def int8_kernels() -> Int8Kernels:
    """Find out by two products, which takes some hundredths of a second, once in a process."""
    largest, equal = np.full((1, 16, 16), 127, np.int8), np.ones((2, 16, 16), np.int8)
    scales = np.array([1, 3], np.float32).reshape(2, 1, 1)
    products = [(largest, np.ones((1, 1, 1), np.float32), 255.0), (equal, scales, 1.0)]
    given = [ops.parameter([len(weights), -1, 16], np.float32) for weights, _, _ in products]
    low, high = np.float32(0), np.float32(255)
    results = [
        ops.matmul(
            ops.fake_quantize(parameter, low, high, low, high, 256),
            ops.multiply(ops.convert(ops.constant(weights), np.float32), ops.constant(scale)),
            False,
            False,
        )
        for parameter, (weights, scale, _) in zip(given, products, strict=True)
    ]
    compiled = ov.Core().compile_model(ov.Model(results, given), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    inputs = [np.full((len(weights), 4, 16), value, np.float32) for weights, _, value in products]
    answers = compiled(inputs)
    right = [
        bool(np.allclose(answers[i], inputs[i] @ (weights * scale), rtol=1e-3))
        for i, (weights, scale, _) in enumerate(products)
    ]
    return Int8Kernels(full_range=right[0], scale_per_batch=right[1])


def fit_weights(model: Any, kernels: Int8Kernels) -> int:
    """Round the int8 weights of `model` to what the kernels compute right; return how many tensors changed."""
    changed = 0
    if kernels.full_range and kernels.scale_per_batch:
        return changed
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Multiply":
            continue
        found = _weights_and_scale(node)
        if found is None:
            continue
        weights, scale = found
        codes, factor = weights.get_data(), scale.get_data()
        readers = {port.get_node().get_type_name() for port in node.output(0).get_target_inputs()}
        is_batched = readers == {"MatMul"} and codes.ndim >= _BATCHED and factor.ndim == codes.ndim
        fresh = _fitting(codes, factor, kernels, share=is_batched)
        if fresh is None:
            continue
        node.input_value(0).get_node().input(0).replace_source_output(ops.constant(fresh[0]).output(0))
        node.input(1).replace_source_output(ops.constant(fresh[1]).output(0))
        changed += 1
    return changed


def _weights_and_scale(node: Any) -> tuple[Any, Any] | None:
    """Return the constants of Multiply(Convert(int8 weights), scale); None if the node is something else."""
    convert, scale = (node.input_value(i).get_node() for i in range(2))
    if convert.get_type_name() != "Convert" or scale.get_type_name() != "Constant":
        return None
    weights = convert.input_value(0).get_node()
    if weights.get_type_name() != "Constant" or weights.get_element_type() != ov.Type.i8:
        return None
    return weights, scale


def _fitting(
    codes: NDArray[np.int8], scale: NDArray[np.float32], kernels: Int8Kernels, *, share: bool
) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None:
    """Return codes and scale that the kernels compute right; None if these are."""
    fresh = scale
    if share and not kernels.scale_per_batch and scale.shape[0] > 1:
        fresh = np.broadcast_to(np.abs(scale).max(axis=0, keepdims=True), scale.shape)
    if not kernels.full_range and np.abs(codes.astype(np.int16)).max() > _PAIRS_FIT:
        fresh = fresh * np.float32(127 / _PAIRS_FIT)
    if fresh is scale:
        return None
    rounded = np.rint(codes * (scale / fresh))
    return rounded.astype(np.int8), np.ascontiguousarray(fresh, np.float32)
