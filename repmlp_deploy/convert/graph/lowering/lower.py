"""Precision: a property of the ONNX graph, so that what is verified on a CPU is what an engine is built from.

A precision of the table is reached by casts (`cast`) or by quantization (`quantize`). Every node that stays in float32
is listed with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from repmlp_deploy.convert.graph.lowering.cast import cast_graph
from repmlp_deploy.convert.graph.lowering.lowered import PRODUCTS, Kept, Lowered, is_product
from repmlp_deploy.convert.graph.lowering.patterns import match_patterns
from repmlp_deploy.convert.graph.lowering.quantize import quantize_graph
from repmlp_deploy.convert.graph.nodes import module_of, names_of, scopes_of
from repmlp_deploy.errors import InputError, MissingDependency
from repmlp_deploy.precision import PRECISIONS

try:
    import onnx
except ImportError:
    raise MissingDependency("onnx", "export") from None

__all__ = ["PRODUCTS", "Kept", "Lowered", "blocks_of", "product_tensors", "set_precision"]

_IN_A_MODULE = 2  # scopes of an operation of the network itself


def set_precision(
    graph: onnx.ModelProto,
    precision: str,
    *,
    ranges: Mapping[str, float] | None = None,
    keep_fp32: Sequence[str] = (),
) -> Lowered:
    """Return `graph` in a precision; `graph` itself does not change.

    Args:
        graph: float32, simplified.
        precision: a key of `PRECISIONS`.
        ranges: for int8: largest absolute value of every tensor of `product_tensors`.
        keep_fp32: patterns as in a shell, of node names or of module names such as `stages.0.*`.

    Raises:
        InputError: a pattern matches nothing, or nothing is left to lower, or int8 has no ranges.
        VerificationError: a weight is beyond float16's range.
    """
    entry = PRECISIONS[precision]
    kept = match_patterns(
        keep_fp32,
        ((node.name, names_of(node)) for node in graph.graph.node),
        (module_of(node) for node in graph.graph.node if node.op_type in PRODUCTS),
    ).keys()
    if entry.lowering == "none":
        return Lowered(graph, {}, ())
    if entry.lowering == "quantize":
        if ranges is None:
            raise InputError(f"{precision} needs calibration images: pass --calibration DIR|FILE.npz")
        lowered = quantize_graph(graph, entry, ranges, kept)
    else:
        lowered = cast_graph(graph, entry, kept)
    if not any(op in PRODUCTS for op in lowered.lowered):
        raise InputError(f"--keep-fp32 leaves no product for {precision}; ask for --precision fp32")
    return lowered


def product_tensors(graph: onnx.ModelProto) -> tuple[str, ...]:
    """Return the tensors whose ranges int8 needs: inputs of products with constant weights, outputs of convolutions."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    products = [node for node in graph.graph.node if is_product(node, weights)]
    names = [node.input[0] for node in products] + [node.output[0] for node in products if node.op_type == "Conv"]
    return tuple(dict.fromkeys(names))


def blocks_of(graph: onnx.ModelProto) -> dict[str, list[str]]:
    """Return every block with products, such as `stages.0.1`, and the names of all its nodes."""
    blocks: dict[str, list[str]] = {}
    with_products = set()
    for node in graph.graph.node:
        scopes = scopes_of(node)
        block = scopes[1] if len(scopes) > _IN_A_MODULE else module_of(node).partition(".")[0]
        blocks.setdefault(block, []).append(node.name)
        if node.op_type in PRODUCTS:
            with_products.add(block)
    return {block: names for block, names in blocks.items() if block in with_products}
