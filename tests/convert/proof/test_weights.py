"""The weights in an ONNX graph: bit for bit those of the network, and any other is named."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert.graph.export import export_graph, trace_network
from repmlp_deploy.convert.proof.weights import match_weights
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches, upstream_form
from repmlp_deploy.errors import VerificationError
from repmlp_deploy.nets.blocks.repmlp2022 import RepMLPBlock
from repmlp_deploy.nets.networks.repmlpnet import RepMLPNet
from support.networks import randomize


def exported(network: nn.Module) -> onnx.ModelProto:
    traced = trace_network(network, [torch.zeros(1, 3, 16, 24)], BatchRange(min=1, opt=2, max=4))
    return export_graph(traced, input_names=["images"], output_names=["logits"])


def initializer(graph: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in graph.graph.initializer if tensor.name == name)


def change(tensor: onnx.TensorProto, by: float) -> None:
    """Move the largest value of a tensor by this part of it."""
    values = numpy_helper.to_array(tensor).copy()
    values.flat[np.abs(values).argmax()] *= np.float32(1 + by)
    tensor.raw_data = values.tobytes()


def test_every_weight_of_a_folded_network_is_in_its_graph(small_network: RepMLPNet) -> None:
    folded = fold_affine(merge_branches(small_network))
    graph = exported(folded)
    count = len(list(folded.parameters()))
    hop = match_weights("weights", graph, folded)
    assert (hop.passed, hop.max_abs, hop.note) == (True, 0.0, f"{count} are equal")

    change(initializer(graph, "stages.1.1.fc3"), 1e-3)
    hop = match_weights("weights", graph, folded)
    assert not hop.passed
    assert hop.note == "farthest: stages.1.1.fc3"
    assert hop.max_rel == pytest.approx(1e-3, rel=1e-3)


def test_another_machines_sums_may_differ_by_a_rounding_and_no_more(small_network: RepMLPNet) -> None:
    folded = fold_affine(merge_branches(small_network))
    graph = exported(folded)
    change(initializer(graph, "head.bias"), 2.0**-22)
    assert not match_weights("weights", graph, folded).passed
    assert match_weights("weights", graph, folded, exact=False).passed
    change(initializer(graph, "head.bias"), 1e-5)
    assert not match_weights("weights", graph, folded, exact=False).passed


def test_a_weight_that_nothing_reads_is_not_in_the_graph(small_network: RepMLPNet) -> None:
    """As in a graph that computes with a stale copy."""
    folded = fold_affine(merge_branches(small_network))
    graph = exported(folded)
    stale = onnx.TensorProto()
    stale.CopyFrom(initializer(graph, "head.weight"))
    stale.name = "stale"
    change(stale, 1e-3)
    graph.graph.initializer.append(stale)
    for node in graph.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = "stale" if name == "head.weight" else name
    with pytest.raises(VerificationError, match=r"head.weight is not among the constants that the graph reads"):
        match_weights("weights", graph, folded)


def test_values_are_found_under_another_name_and_shape() -> None:
    network = nn.PReLU(5)
    network.weight.data = torch.rand(5)
    slope = numpy_helper.from_array(network.weight.detach().numpy().reshape(1, 5, 1, 1), "val_3")
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 5, 2, 2])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 5, 2, 2])
    graph = helper.make_graph([helper.make_node("PRelu", ["x", "val_3"], ["y"])], "g", [value], [out], [slope])
    model = helper.make_model(graph)
    assert match_weights("weights", model, network).passed
    change(model.graph.initializer[0], 1e-3)
    with pytest.raises(VerificationError, match="weight is not among"):
        match_weights("weights", model, network)


def test_what_adds_nothing_may_be_left_out() -> None:
    network = nn.Linear(2, 2)
    network.bias.data.zero_()
    weight = numpy_helper.from_array(network.weight.detach().numpy(), "weight")
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 2])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 2])
    node = helper.make_node("Gemm", ["x", "weight"], ["y"], transB=1)
    model = helper.make_model(helper.make_graph([node], "g", [value], [out], [weight]))
    assert match_weights("weights", model, network).passed
    network.bias.data += 1e-3
    with pytest.raises(VerificationError, match="bias is not among"):
        match_weights("weights", model, network)


def test_convolutions_may_be_fused_with_batch_norms_but_fc3_may_not_change(small_network: RepMLPNet) -> None:
    """Upstream's own form keeps BatchNorms, which exporters fuse; what merging made must still be there."""
    network = upstream_form(merge_branches(small_network))
    graph = exported(network)
    hop = match_weights("weights", graph, network)
    assert hop.passed
    assert "changed on the way" in hop.note
    change(initializer(graph, "stages.1.0.repmlp_block.fc3.weight"), 1e-3)
    hop = match_weights("weights", graph, network)
    assert not hop.passed
    assert hop.note == "farthest: stages.1.0.repmlp_block.fc3.weight"


class Scaled(nn.Module):
    """A part of one's own that computes with its weight before it meets the input, beside a RepMLP block."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Parameter(torch.randn(3, 5))
        self.block = RepMLPBlock(3, 16, 24, sharesets=1, hidden=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).mean((2, 3)) @ torch.exp(self.project)


def test_what_a_network_of_ones_own_computes_beforehand_is_counted() -> None:
    torch.manual_seed(0)
    network = fold_affine(merge_branches(randomize(Scaled())))
    graph = exported(network)
    hop = match_weights("weights", graph, network, own=True)
    assert hop.passed
    assert hop.note.endswith("1 changed on the way")
    with pytest.raises(VerificationError, match="project is not among the constants"):
        match_weights("weights", graph, network)
    change(initializer(graph, "block.weight"), 1e-3)
    assert not match_weights("weights", graph, network, own=True).passed
