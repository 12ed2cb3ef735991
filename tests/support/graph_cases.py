"""Simplified float32 graphs of small networks of every family, made as the pipeline makes them, without its proofs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import onnx
import torch
from torch import nn

from golden import fill
from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert.formats.tensorrt.build import GraphSpec
from repmlp_deploy.convert.graph.export import export_graph, trace_network
from repmlp_deploy.convert.graph.simplify import simplify_graph
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches
from repmlp_deploy.nets.families import FAMILIES
from repmlp_deploy.nets.networks.pure_mlp import PureMLPSpec
from repmlp_deploy.nets.networks.repmlp_resnet import RepMLPResNetSpec
from support.task_cases import small_network

BATCH = BatchRange(min=1, opt=4, max=8)

_RES50 = {
    "input_size": (32, 48),
    "depths": (1, 2, 2, 1),
    "channels": (16, 32, 64, 32),
    "stem": 8,
    "partition": (2, 3),
    "groups": 2,
    "kernels": (1, 3),
    "reduction": 2,
    "classes": 5,
}
_PURE = {
    "input_size": (16, 24),
    "channels": (4, 8),
    "depths": (2, 1),
    "partitions": ((8, 8), (8, 12)),
    "groups": (2, 4),
    "kernels": (3,),
    "reduction": 3,
    "classes": 6,
}

SMALL = {
    "repmlpnet": (32, 32),
    "repmlpnet-backbone": (32, 32),
    "pspnet": (32, 32),
    "mobilefacenet": (32, 32),
    "repmlp-resnet": (32, 48),
    "pure-mlp": (16, 24),
}
"""Family to the input size of its small network."""

CASES = SMALL | {"repmlp-resnet, bottleneck": (32, 48)}
"""Every family, and the other block type of the one that has two: name to input size."""


@dataclass(frozen=True)
class GraphCase:
    """A folded network and its graph."""

    network: nn.Module
    model: onnx.ModelProto
    spec: GraphSpec


def trained_case(family: str, seed: int = 0) -> nn.Module:
    """A small network of `CASES`; another seed gives other weights, none of them equal to another's."""
    family, _, block = family.partition(", ")
    if family == "repmlp-resnet":
        squeeze = {"squeeze": (2, 4)} if block else {}
        network = FAMILIES[family].build(RepMLPResNetSpec(block=block or "light", **squeeze, **_RES50))
    elif family == "pure-mlp":
        network = FAMILIES[family].build(PureMLPSpec(**_PURE))
    else:
        network = small_network(family)
    if family in ("repmlp-resnet", "pure-mlp"):
        shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        network.load_state_dict({key: torch.from_numpy(x) for key, x in fill.fill_state_dict(shapes).items()})
    generator = torch.Generator().manual_seed(seed)
    for value in network.state_dict().values():
        if seed and value.is_floating_point():
            value.mul_(1 + 0.05 * torch.rand(value.shape, generator=generator))
    return network.eval().requires_grad_(requires_grad=False)


@cache
def graph_case(family: str, seed: int = 0) -> GraphCase:
    """The folded form and the simplified graph of `trained_case`, made once; not to be changed."""
    folded = fold_affine(merge_branches(trained_case(family, seed)))
    images = torch.zeros(1, 3, *CASES[family])
    outputs = 2 if family == "repmlpnet-backbone" else 1
    model = export_graph(
        trace_network(folded, [images], BATCH),
        input_names=["images"],
        output_names=[f"out{i}" for i in range(outputs)],
    )
    return GraphCase(folded, simplify_graph(model), GraphSpec({"images": (3, *CASES[family])}, BATCH))
