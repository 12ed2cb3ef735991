"""Multiply-adds, parameters and traffic are those of the network and graph at hand."""

import math
from decimal import Decimal

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from repmlp_deploy.bench.counting.count import count_graph, count_network
from repmlp_deploy.bench.counting.counts import Counts, stage_of
from repmlp_deploy.bench.subjects.seeding import seeded_network
from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.card import ModelCard, list_cards, load_card
from repmlp_deploy.convert.graph.export import export_graph, trace_network
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches, upstream_form
from repmlp_deploy.nets.families import build_network

pytestmark = pytest.mark.slow  # many exports, seconds each

PUBLISHED = [name for name in list_cards() if load_card(name).published is not None]


def _tolerated(published: float) -> tuple[float, float]:
    """What a count may be to agree with a published figure: 1 % beyond every number that rounds to the figure.

    Figures are printed with as few as two digits. 2.8 G stands for anything from 2.75 to 2.85, which alone is 1.8 %;
    1 % of a rounded figure would reject the exact number behind it.
    """
    half_unit = 0.5 * 10.0 ** _exponent(published)
    return 0.99 * (published - half_unit), 1.01 * (published + half_unit)


def _exponent(figure: float) -> int:
    """The decimal exponent of the last digit that was printed, in the figure's own unit of M or G."""
    unit = 9 if figure >= 1e9 else 6
    digits = Decimal(repr(figure)).scaleb(-unit).normalize().as_tuple()
    return unit + int(digits.exponent)


@pytest.mark.parametrize("name", PUBLISHED)
def test_trained_networks_count_as_published(name):
    """Parameters and multiply-adds of every card's trained network are the published ones."""
    card = load_card(name)
    with torch.device("meta"):
        network = build_network(card)
    counts = count_network(network, (3, *card.input_size))
    low, high = _tolerated(card.published.parameters)
    assert low <= counts.parameters <= high
    low, high = _tolerated(card.published.macs)
    assert low <= counts.macs <= high


@pytest.mark.parametrize(("figure", "inside", "outside"), [(2.8e9, 2.86e9, 2.95e9), (68.2e6, 68.8e6, 69.5e6)])
def test_the_published_tolerance_rejects_other_networks(figure, inside, outside):
    low, high = _tolerated(figure)
    assert low <= inside <= high
    assert not low <= outside <= high


def test_a_missing_stage_would_not_pass_for_the_published_network():
    """Twin of the published figures: a network with one unit less is told apart."""
    card = load_card("repmlpnet-t224")
    smaller = card.model_copy(update={"network": {**card.network, "depths": [2, 2, 5, 2]}})
    with torch.device("meta"):
        network = build_network(smaller)
    low, high = _tolerated(card.published.macs)
    assert not low <= count_network(network, (3, 224, 224)).macs <= high


def _tiny(**network) -> ModelCard:
    card = load_card("repmlp-digits")
    return card.model_copy(update={"network": {**card.network, **network}})


def _graph(network: nn.Module, shape) -> onnx.ModelProto:
    traced = trace_network(network, [torch.zeros(1, *shape)], BatchRange(min=1, opt=2, max=4))
    return export_graph(traced, input_names=["images"], output_names=["logits"])


@pytest.mark.parametrize(
    "network", [{}, {"sharesets": [2, 8, 32]}, {"partitions": [[4, 4], [2, 2], [2, 2]]}], ids=["card", "S", "parts"]
)
def test_pytorch_and_onnx_counts_of_the_folded_network_agree_exactly(network):
    """Multiply-adds and parameters of the ONNX graph are those of the PyTorch network it was exported from."""
    card = _tiny(**network)
    shape = (3, *card.input_size)
    folded = fold_affine(merge_branches(seeded_network(card)))
    ours, theirs = count_network(folded, shape), count_graph(_graph(folded, shape))
    assert theirs.macs == ours.macs
    assert theirs.parameters == ours.parameters
    assert theirs.by("stage") == ours.by("stage")
    assert theirs.io_elements == ours.io_elements == 3 * 32 * 32 + 10


def test_counts_tell_trained_merged_and_folded_networks_apart():
    card = _tiny()
    shape = (3, *card.input_size)
    trained = seeded_network(card)
    merged = merge_branches(trained)
    folded = fold_affine(merged)
    counts = [count_network(network, shape) for network in (trained, merged, folded)]
    assert counts[0].macs > counts[1].macs == counts[2].macs
    assert counts[0].activation_elements > counts[1].activation_elements > counts[2].activation_elements
    assert counts[0].parameters == sum(p.numel() for p in trained.parameters())


def test_upstream_form_has_the_same_multiply_adds_as_the_batched_product():
    card = _tiny()
    merged = merge_branches(seeded_network(card))
    shape = (3, *card.input_size)
    assert count_network(upstream_form(merged), shape).macs == count_network(merged, shape).macs


def test_a_convolution_counts_by_hand():
    """3→8 channels in 1 group, 3×3 on a 6×5 map: 8·6·5·3·9 multiply-adds; weights, input and output move once."""
    counts = count_network(nn.Conv2d(3, 8, 3, padding=1, bias=False).eval(), (3, 6, 5))
    assert counts.macs == 8 * 6 * 5 * 3 * 9
    assert counts.parameters == counts.weight_elements == 8 * 3 * 9
    assert counts.activation_elements == counts.io_elements == (3 + 8) * 30
    assert counts.least_bytes(4) == 4 * (216 + 4 * 330)
    assert counts.least_bytes(4, "bf16") * 2 == counts.least_bytes(4)
    assert counts.intensity(1) == pytest.approx(2 * counts.macs / (4 * (216 + 330)))


def test_stages_sum_to_the_whole():
    card = _tiny()
    counts = count_network(seeded_network(card), (3, *card.input_size))
    assert list(counts.by("stage")) == ["embedding", "stage 0", "stage 1", "stage 2", "head"]
    assert sum(counts.by("stage").values()) == sum(counts.by("op").values()) == counts.macs


def test_an_uncounted_product_is_refused_not_forgotten():
    class Attention(nn.Module):
        def forward(self, x):
            return torch.einsum("nchw,nchw->nc", x, x) + torch.dot(x.flatten(), x.flatten())

    with pytest.raises(ValueError, match="dot"):
        count_network(Attention(), (3, 4, 4))
    value = onnx.helper.make_tensor_value_info
    float32 = onnx.TensorProto.FLOAT
    node = onnx.helper.make_node("Einsum", ["x"], ["y"], equation="nc->n")
    graph = onnx.helper.make_graph([node], "g", [value("x", float32, [1, 4])], [value("y", float32, [1])])
    with pytest.raises(ValueError, match="Einsum"):
        count_graph(onnx.helper.make_model(graph))


def test_what_depends_on_weights_alone_is_not_counted():
    """A slice of a weight, which runtimes take when they load, is neither an operation nor traffic of every call."""
    value, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    float32 = onnx.TensorProto.FLOAT
    weights = [
        onnx.numpy_helper.from_array(np.ones((1, 4, 5), np.float32), "w"),
        onnx.numpy_helper.from_array(np.array(0), "first"),
    ]
    nodes = [node("Gather", ["w", "first"], ["m"], axis=0), node("MatMul", ["x", "m"], ["y"])]
    ends = [value("x", float32, ["n", 4])], [value("y", float32, ["n", 5])]
    counts = count_graph(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", *ends, weights)))
    assert [op.op for op in counts.operations] == ["MatMul"]
    assert (counts.macs, counts.weight_elements, counts.activation_elements) == (20, 20, 9)


def test_counting_leaves_the_network_alone():
    network = seeded_network(_tiny())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    count_network(network, (3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(not module._forward_pre_hooks for module in network.modules())


def test_counts_survive_json():
    counts = count_network(seeded_network(_tiny()), (3, 32, 32))
    assert Counts.model_validate_json(counts.model_dump_json()) == counts


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("stages.2.0.fc3", "stage 2"),
        ("embeds.0.conv.weight", "stage 1"),
        ("conv_embedding.conv.weight", "embedding"),
        ("head.weight", "head"),
        ("val_15", None),
        ("layer1.0.conv1.weight", "layer1"),
    ],
)
def test_stages_are_read_off_names(name, stage):
    assert stage_of(name) == stage


def test_seeded_weights_repeat_and_exercise_every_batch_norm():
    first, second = seeded_network(_tiny()).state_dict(), seeded_network(_tiny()).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    variances = torch.cat([value for name, value in first.items() if name.endswith("running_var")])
    assert variances.min() > 0
    assert variances.std() > 0.2
    assert math.isfinite(float(seeded_network(_tiny())(torch.zeros(1, 3, 32, 32)).sum()))
