"""What a builder's network holds: kinds of layers, and the types that its products compute in.

Networks are strongly typed, so these are the types of the engine. They are read back because a graph that was asked for
in float16 and came out in float32 is correct but slow: nothing else would notice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from repmlp_deploy.errors import VerificationError
from repmlp_deploy.precision import PRECISIONS

__all__ = ["NetworkTypes", "read_types", "require_precision"]

_PRODUCTS = ("CONVOLUTION", "MATRIX_MULTIPLY")


@dataclass(frozen=True)
class NetworkTypes:
    """What was read.

    Attributes:
        layers: how many.
        tensors: how many, inputs among them.
        kinds: kind of layer to how many.
        types: data type to how many layers give it.
        products: convolution or matrix product to the type it multiplies in.
    """

    layers: int
    tensors: int
    kinds: dict[str, int]
    types: dict[str, int]
    products: dict[str, str]

    def describe(self) -> dict[str, Any]:
        """Return the counts, for the manifest."""
        return {
            "layers": self.layers,
            "tensors": self.tensors,
            "layer_kinds": self.kinds,
            "layer_types": self.types,
            "product_types": dict(Counter(self.products.values())),
        }


def read_types(network: Any) -> NetworkTypes:
    """Return the layers of a network definition and their types."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    outputs = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    given = {network.get_input(i).name for i in range(network.num_inputs)}
    kinds = Counter(layer.type.name.lower() for layer in layers)
    types = Counter(layer.get_output(0).dtype.name.lower() for layer in layers if layer.num_outputs)
    products = {layer.name: _factor_type(layer, outputs) for layer in layers if layer.type.name in _PRODUCTS}
    return NetworkTypes(len(layers), len(given | outputs.keys()), dict(kinds), dict(types), products)


def require_precision(
    types: NetworkTypes,
    precision: str,
    *,
    where: str,
    kept: Collection[str] = (),
    describe: Callable[[str], str] = "node {}".format,
) -> None:
    """Raise unless products multiply in what was asked for.

    Args:
        types: what was read back.
        precision: of the graph.
        where: the builder, for the message.
        kept: products that stay in float32, by the graph's own account.
        describe: a product's name to how the message calls it.

    Raises:
        VerificationError: a product has another type, or none has the one that was asked for.
    """
    wanted = PRECISIONS[precision].tensorrt_type
    odd = [name for name, found in types.products.items() if found != wanted and name not in kept]
    if odd:
        raise VerificationError(
            f"{where}: {len(odd)} of {len(types.products)} products are not in {precision}; "
            f"{describe(odd[0])} multiplies in {types.products[odd[0]]}"
        )
    if types.products and wanted not in types.products.values():
        raise VerificationError(f"{where}: no product is in {precision}: all {len(types.products)} stay in float32")


def _factor_type(layer: Any, outputs: dict[str, Any]) -> str:
    """Return the type of a product's factors; for a dequantized one, the type before."""
    types = [_stored_type(layer.get_input(i), outputs) for i in range(layer.num_inputs) if layer.get_input(i)]
    return types[0] if len(set(types[:2])) == 1 else " × ".join(types[:2])


def _stored_type(tensor: Any, outputs: dict[str, Any]) -> str:
    maker = outputs.get(tensor.name)
    while maker is not None and maker.type.name == "SHUFFLE":  # reshapes between the dequantization and the product
        maker = outputs.get(maker.get_input(0).name)
    if maker is not None and maker.type.name == "DEQUANTIZE":
        tensor = maker.get_input(0)
    return str(tensor.dtype.name.lower())
