"""What a graph says of itself: names by module, the batch's name, opset and IR version, and no BatchNorm apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from repmlp_deploy import Bundle, export
from repmlp_deploy.errors import InputError
from support.networks import randomize


def graph_of(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load_from_string(bundle.read(bundle.artifact("onnx")))


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_nodes_are_named_after_their_modules_and_no_two_alike(bundle: Bundle) -> None:
    names = [node.name for node in graph_of(bundle).graph.node]
    assert len(set(names)) == len(names)
    assert {"conv_embedding.conv/Conv", "stages.0.0.fc3/MatMul", "head/Gemm"} <= set(names)


def test_the_graph_is_ours_and_needs_no_newer_runtime_than_its_operators(bundle: Bundle) -> None:
    """IR 9 is what ONNX Runtime 1.17 of early 2024 reads."""
    model = graph_of(bundle)
    assert (model.producer_name, model.ir_version, model.opset_import[0].version) == ("repmlp-deploy", 9, 20)


@pytest.mark.parametrize("form", ["folded", "merged"])
def test_the_batch_axis_has_its_name_in_every_form(digits_checkpoint: Path, tmp_path: Path, form: str) -> None:
    bundle = export(digits_checkpoint, graph=form, batch="1:2:4", out=tmp_path / form)
    model = graph_of(bundle)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_an_older_opset_is_proved_like_any_other(digits_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(digits_checkpoint, opset=18, batch="1:2:4", out=tmp_path / "bundle")
    model = graph_of(bundle)
    assert (model.opset_import[0].version, model.ir_version) == (18, 8)
    assert operators(model)["Gelu"] == 0 < operators(model)["Erf"]
    assert bundle.manifest.verdict.passed
    assert bundle.artifact("onnx").model_dump()["opset"] == 18


@pytest.mark.parametrize(("opset", "precision", "said"), [(17, "fp32", "expected 18 to 23"), (18, "bf16", "opset 22")])
def test_an_opset_that_cannot_be_is_refused(
    digits_checkpoint: Path, tmp_path: Path, opset: int, precision: str, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        export(digits_checkpoint, opset=opset, precision=precision, out=tmp_path / "bundle")


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Plain(nn.Module):
    """A user's network that never names its batch, so that it is traced with a fixed one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 16, stride=2), conv_bn(16, 16, groups=16), conv_bn(16, 8, kernel=1))
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stem(images).mean((2, 3)))
        return logits


@pytest.mark.parametrize("batch", ["1:8:64", "4"])
def test_no_batch_norm_stays_apart_from_its_convolution(tmp_path: Path, batch: str) -> None:
    torch.manual_seed(0)
    network = randomize(Plain())
    example = torch.randn(2, 3, 32, 32)
    bundle = export(network, example_input=example, allow_merged=True, batch=batch, out=tmp_path / "bundle")
    assert operators(graph_of(bundle)) == {"Conv": 3, "Relu": 3, "ReduceMean": 1, "Gemm": 1}
