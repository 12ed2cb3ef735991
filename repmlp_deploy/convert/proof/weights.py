"""The weights inside an ONNX graph against those of the network it was exported from: bit for bit.

An exporter and a simplifier may rename and reshape constants, but have no reason to change a value. A weight that they
do change may be too small to show in any output, and is still not the trained one.

Where a BatchNorm is left, as in upstream's own form, exporters fuse it with the convolution before it; and what a
network of one's own does with its weights, slicing or scaling them, they may compute beforehand. Outside RepMLP blocks,
weights of such networks are matched if they are found and counted if they are not. FC3 must always be there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from repmlp_deploy.bundle import Hop
from repmlp_deploy.errors import MissingDependency, VerificationError
from repmlp_deploy.nets.blocks.algebra import has_batch_norms
from repmlp_deploy.nets.blocks.protocol import Reparameterizable
from repmlp_deploy.numerics import allowed_error

try:
    import onnx
except ImportError:
    raise MissingDependency("onnx", "export") from None

__all__ = ["match_weights"]

Weights = Mapping[str, NDArray[Any]]

_ROUNDING = 2.0**-24  # relative error of one rounding to float32


def match_weights(  # noqa: PLR0913 - what is compared, and how
    name: str,
    graph: onnx.ModelProto,
    network: nn.Module,
    *,
    own: bool = False,
    exact: bool = True,
    as_stored: Callable[[Weights], Weights] | None = None,
) -> Hop:
    """Return the row of the weight of `network` that is farthest from the constant of `graph` that holds it.

    A weight is looked for under its own name, then, its axes aside, by its values.

    Args:
        name: of the row.
        graph: float32.
        network: float32.
        own: only the blocks in the network are ours; the rest is its owner's.
        exact: allow no difference; otherwise that of sums in another order, as another machine's may be.
        as_stored: returns, for the network's weights by name, what the graph is to hold; by default the same.

    Raises:
        VerificationError: a weight is nowhere in the graph, or nothing reads it.
    """
    constants, norms = _constants(graph), has_batch_norms(network)
    may_change = _changeable(network) if own or norms else set()
    by_size: dict[int, list[onnx.TensorProto]] = {}
    for constant in constants.values():
        by_size.setdefault(math.prod(constant.dims), []).append(constant)
    worst, equal, changed = (0.0, 0.0, ""), 0, 0
    weights = _weights(network)
    for key, weight in (weights if as_stored is None else as_stored(weights)).items():
        same = _values(constants[key]) if key in constants else None
        alike = same is not None and (same.shape, same.dtype) == (weight.shape, weight.dtype)
        if alike and np.array_equal(same, weight):  # type: ignore[arg-type]
            equal += 1
        elif alike and key not in may_change:
            error = float(np.abs(np.subtract(same, weight, dtype=np.float64)).max())  # type: ignore[arg-type]
            size = float(np.abs(weight).max()) or 1.0
            worst = max(worst, (error / size if np.isfinite(error) else np.inf, size, key))
        elif _neutral(weight) or any(_same_values(weight, _values(other)) for other in by_size.get(weight.size, ())):
            equal += 1
        elif key in may_change:
            changed += 1
        else:
            raise VerificationError(f"{name}: {key} is not among the constants that the graph reads")
    relative, size, key = worst
    said = f"farthest: {key}" if key else f"{equal} are equal" + (f", {changed} changed on the way" if changed else "")
    return _row(name, relative, size, said, exact=exact)


def _row(name: str, relative: float, size: float, note: str, *, exact: bool) -> Hop:
    """Return the row of a weight's error, relative to the largest number of the weight, `size`."""
    floor, error = _ROUNDING * size, relative * size
    allowed = 0.0 if exact else allowed_error("weights", floor)
    return Hop(
        name=name,
        kind="weights",
        artifact="onnx",
        precision="fp32",
        batch=None,
        max_abs=error,
        mean_abs=error,
        max_rel=relative,
        between=None,
        cosine=1.0,
        top1=None,
        floor=floor,
        allowed=allowed,
        passed=error <= allowed,
        ratio=error / floor if floor else None,
        margin=allowed / error if error else None,
        note=note,
    )


def _weights(network: nn.Module) -> Weights:
    """Return the float parameters and buffers, by name."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {key: t.detach().numpy() for key, t in tensors.items() if t.is_floating_point() and t.numel()}


def _neutral(weight: NDArray[Any]) -> bool:
    """Return whether an optimiser may leave it out: it adds nothing, or multiplies by one."""
    return not weight.any() or bool((weight == 1).all())


def _constants(graph: onnx.ModelProto) -> Mapping[str, onnx.TensorProto]:
    """Return the constants that nodes of the graph read, by name."""
    read = {name for node in graph.graph.node for name in node.input}
    found = {t.name: t for t in graph.graph.initializer if t.name in read}
    for node in graph.graph.node:
        if node.op_type == "Constant" and node.output[0] in read and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return found


def _values(tensor: onnx.TensorProto) -> NDArray[Any]:
    """Return the tensor's values as a new array. Call it for one tensor at a time: protobuf copies."""
    if tensor.data_type == onnx.TensorProto.FLOAT and tensor.raw_data:
        return np.frombuffer(tensor.raw_data, np.float32).reshape(tensor.dims)
    return onnx.numpy_helper.to_array(tensor)


def _changeable(network: nn.Module) -> set[str]:
    """Return the weights outside RepMLP blocks, and those of their gates, which may be any module."""
    exact, free = [], []
    for name, module in network.named_modules():
        if isinstance(module, Reparameterizable) and module.exported_whole:
            prefix = f"{name}." if name else ""
            exact.append(prefix)
            free += [f"{prefix}{part}." for part in module.foreign_parts]
    return {key for key in _weights(network) if not key.startswith(tuple(exact)) or key.startswith(tuple(free))}


def _same_values(weight: NDArray[Any], constant: NDArray[Any]) -> bool:
    """Return whether two arrays of one size hold the same values in whatever order of axes."""
    if constant.dtype != weight.dtype:
        return False
    return np.array_equal(weight.ravel(), constant.ravel()) or np.array_equal(
        np.sort(weight, axis=None), np.sort(constant, axis=None)
    )
