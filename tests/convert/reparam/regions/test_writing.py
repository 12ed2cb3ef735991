"""How regions are written, chosen and moved: names, borders, readers."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repmlp_deploy.convert.reparam.regions import checking, merge_regions
from repmlp_deploy.convert.reparam.regions.choosing import choose
from repmlp_deploy.convert.reparam.regions.commuting import move_norms
from repmlp_deploy.convert.reparam.regions.reading import scale_shift
from repmlp_deploy.convert.reparam.regions.tracing import Values, trace
from repmlp_deploy.convert.reparam.regions.writing import Writer
from repmlp_deploy.errors import VerificationError
from support.networks import randomize
from support.region_cases import CASES


class Uneven(nn.Module):
    """Pads that differ from side to side, and that cut."""

    def __init__(self, *pads: int) -> None:
        super().__init__()
        self.pads = pads
        self.conv, self.norm = nn.Conv2d(4, 4, (3, 2), stride=2, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(F.pad(x, self.pads))))


@pytest.mark.parametrize("pads", [(0, 1, 0, 1), (1, 0, 2, 1), (1, 1, 1, 1), (-1, 0, 0, -2), (2, -1, -1, 3)])
def test_uneven_pads_stay_exact(pads: tuple[int, ...]) -> None:
    network, x = randomize(Uneven(*pads)).double(), torch.randn(2, 4, 9, 8, dtype=torch.float64)
    merged = merge_regions(network, (x,))
    torch.testing.assert_close(merged.value(x), network(x), rtol=0, atol=1e-13)
    assert merged.report.after == {"products": 1, "BatchNorms": 0, "additions": 0}


def test_a_value_with_two_readers_is_computed_once() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.conv = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.first(x))
            return self.conv(y) * F.relu(y)

    graph = trace(randomize(Two()), (torch.zeros(1, 4, 9, 8),))
    choice = choose(graph.graph, Values(graph))
    assert len([form for form in choice.forms.values() if len(form.covers) == 2]) == 1


@pytest.mark.parametrize("name", ["attention", "norm before a mean"])
def test_norms_move_through_reshapes(name: str) -> None:
    network, x = CASES[name].network(), CASES[name].inputs()
    graph = trace(network, (x,))
    expected = graph(x)
    move_norms(graph)
    assert any(node.target is scale_shift for node in graph.graph.nodes)
    torch.testing.assert_close(graph(x), expected, rtol=0, atol=1e-12)


def test_a_node_that_was_added_later_is_no_constant() -> None:
    graph = trace(nn.Conv2d(4, 4, 1).eval(), (torch.zeros(1, 4, 9, 8),))
    values = Values(graph)
    (conv,) = (node for node in graph.graph.nodes if node.op == "call_function")
    with graph.graph.inserting_after(conv):
        added = graph.graph.call_function(torch.relu, (conv,))
    assert not values.is_constant(added)
    assert values.is_constant(conv.args[1])


def test_weights_are_named_after_the_module_and_nodes_say_where_they_come_from() -> None:
    network = nn.Sequential(nn.ReLU(), CASES["repvgg"].network(), CASES["residual"].network()).float().eval()
    x = CASES["repvgg"].inputs().float()
    merged = merge_regions(network, (x,)).value
    assert set(merged.state_dict()) == {"1.merged.weight", "1.merged.bias", "2.merged.weight", "2.merged.bias"}
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.onnx.export(merged, (x,), dynamic_shapes=({0: batch},), dynamo=True, verbose=False)
    assert program is not None
    scopes = [
        entry.value
        for node in program.model_proto.graph.node
        if node.op_type == "Conv"
        for entry in node.metadata_props
        if entry.key == "pkg.torch.onnx.name_scopes"
    ]
    assert [scope.split(", ")[1] for scope in scopes] == ["'1'", "'2'"]
    onnx.checker.check_model(program.model_proto)


def test_what_is_written_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Writer.parameter

    def rounded(self: Writer, holder: nn.Module, name: str, key: str, value: Tensor) -> object:
        return original(self, holder, name, key, value.float().double())

    monkeypatch.setattr(Writer, "parameter", rounded)
    with pytest.raises(VerificationError, match="the layers that were written are not the maps that were found"):
        merge_regions(CASES["repvgg"].network(), (CASES["repvgg"].inputs(),))
    assert checking.share_of_error(-torch.ones(2), [torch.zeros(2) + 3, torch.ones(2)]) == (1, "left out")
