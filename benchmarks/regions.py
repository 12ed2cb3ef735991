"""Count what is left of networks of timm after timm's own merge and after region merging, and how exact both are.

python benchmarks/regions.py [NAME…]

Every BatchNorm is redrawn first, so that none is near the identity. The nodes that are counted are Conv, MatMul and
Gemm. The trained network's graph is counted as it was traced. The graphs of timm and ours are simplified first, both in
the same way. An error is the largest difference from the trained network over its largest output, in float64; ours is
the largest row of the export's certificate. timm builds its convolutions in the default dtype, which stays float32 here
as it is for its users.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections import Counter
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from repmlp_deploy import export
from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert.graph.export import export_graph, trace_network
from repmlp_deploy.convert.graph.simplify import simplify_graph
from support.timm_networks import redrawn_timm

NETWORKS = {
    "repvgg_a0": 64,
    "mobileone_s0": 64,
    "fastvit_t8": 64,
    "repvit_m0_9": 64,
    "repghostnet_050": 64,
    "ghostnetv3_050": 64,
    "levit_128s": 224,
    "shvit_s1": 128,
    "efficientvit_m0": 224,
    "tiny_vit_5m_224": 224,
    "nextvit_small": 64,
    "starnet_s1": 64,
    "resnet18": 64,
    "convnext_atto": 64,
}
"""Network to the edge of its input: small where the network lets us choose."""

PRODUCTS = ("Conv", "MatMul", "Gemm")


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def _nodes(graph: onnx.ModelProto) -> str:
    """Return the products and the BatchNorms of a graph."""
    kinds = Counter(node.op_type for node in graph.graph.node)
    return f"{sum(kinds[kind] for kind in PRODUCTS)} / {kinds['BatchNormalization']}"


def _exported(network: nn.Module, x: Tensor, *, optimize: bool = True) -> onnx.ModelProto:
    traced = trace_network(network, (x,), BatchRange(min=1, opt=1, max=1))
    return export_graph(traced, input_names=["x"], output_names=["y"], optimize=optimize)


@torch.no_grad()
def row(name: str) -> str:
    """Return one line of the table."""
    from timm.utils.model import reparameterize_model  # noqa: PLC0415 - importable once support.timm_networks is

    network, x = redrawn_timm(name, NETWORKS.get(name, 224))
    expected = network(x)
    by_timm = reparameterize_model(copy.deepcopy(network)).double()
    error = _error(by_timm(x), expected)
    x = x.float()
    before = _exported(copy.deepcopy(network).float(), x[:1], optimize=False)
    theirs = simplify_graph(_exported(by_timm.float(), x[:1]))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        bundle = export(network.float(), example_input=x[:1], formats="onnx", batch="1", out=out)
        ours = onnx.load(out / "model.onnx")
    exact = [hop.max_rel for hop in bundle.manifest.certificate if hop.precision == "fp64" and hop.kind == "output"]
    return f"| {name} | {_nodes(before)} | {_nodes(theirs)} | {_nodes(ours)} | {error:.0e} | {max(exact):.0e} |"


def main() -> None:
    """Print the table of the networks that are named, or of all."""
    print("| network | nodes / BatchNorms, trained | timm | ours | error of timm's | ours |")
    print("|---|---|---|---|--:|--:|", flush=True)
    for name in sys.argv[1:] or NETWORKS:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
