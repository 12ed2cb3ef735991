"""Faults to plant: each is a real function replaced by one with a mistake that people make there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from repmlp_deploy.convert import graphs, transform
from repmlp_deploy.convert.source import state_dict, trained
from repmlp_deploy.nets.blocks import algebra, conv_bn, repmlp_unit
from repmlp_deploy.nets.blocks import repmlp2021 as repmlp
from repmlp_deploy.nets.blocks import repmlp2022 as blocks
from repmlp_deploy.nets.networks.repmlpnet import RepMLPNet

Plant = Callable[[pytest.MonkeyPatch], None]
Affine = tuple[torch.Tensor, torch.Tensor]


def wide(block: nn.Module) -> bool:
    """Whether a block is of the second stage, so that the first place to blame is not simply the first block."""
    return block.C == 16


# --- merging


def merged_fc3(change: Callable[[Any, Callable[[], nn.Conv2d]], nn.Conv2d]) -> Plant:
    """Replace `RepMLPBlock.merged_fc3` in the second stage by `change(block, right)`."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        right = blocks.RepMLPBlock.merged_fc3
        patch.setattr(
            blocks.RepMLPBlock,
            "merged_fc3",
            lambda self: change(self, lambda: right(self)) if wide(self) else right(self),
        )

    return plant


def without_its_3x3_branch(block: Any, right: Callable[[], nn.Conv2d]) -> nn.Conv2d:
    kernels, block.kernels = block.kernels, (1,)
    try:
        return right()
    finally:
        block.kernels = kernels


def with_edges_swapped(block: Any, right: Callable[[], nn.Conv2d]) -> nn.Conv2d:
    block.h, block.w = block.w, block.h
    try:
        return right()
    finally:
        block.h, block.w = block.w, block.h


def changed_matrix(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., nn.Conv2d]:
    def changed(block: Any, right: Callable[[], nn.Conv2d]) -> nn.Conv2d:
        fc3 = right()
        area = block.h * block.w
        weight = change(fc3.weight.detach().clone().view(block.S, area, area))
        fc3.weight = nn.Parameter(weight.reshape(fc3.weight.shape), requires_grad=False)
        return fc3

    return changed


def perturb(matrix: torch.Tensor) -> torch.Tensor:
    matrix[2, 1, 4] += 1e-3
    return matrix


def branch_counted_twice(patch: pytest.MonkeyPatch) -> None:
    right = blocks.sum_kernels
    patch.setattr(blocks, "sum_kernels", lambda kernels: right([*kernels, kernels[0]]))


def norm_in_merge(is_meant: Callable[[Any, nn.Module], bool], change: Callable[[Any, Affine], Affine]) -> Plant:
    """Take one of a block's BatchNorms for something else while it is merged."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        right, merge, current = blocks.affine_of_batch_norm, blocks.RepMLPBlock.merged_fc3, []

        def remember(self: Any) -> nn.Conv2d:
            current[:] = [self]
            return merge(self)

        def affine(bn: Any) -> Affine:
            return change(bn, right(bn)) if is_meant(current[0], bn) else right(bn)

        patch.setattr(blocks.RepMLPBlock, "merged_fc3", remember)
        patch.setattr(blocks, "affine_of_batch_norm", affine)

    return plant


def with_variance_as_deviation(bn: Any, _right: Affine) -> Affine:
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps)
    return scale, bn.bias.double() - bn.running_mean.double() * scale


def with_another_eps(bn: Any, _right: Affine) -> Affine:
    scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + 1e-3)
    return scale, bn.bias.double() - bn.running_mean.double() * scale


def without_bias(bn: Any, right: Affine) -> Affine:
    return right[0], right[1] - bn.bias.double()


def without_mean(bn: Any, right: Affine) -> Affine:
    return right[0], bn.bias.double()


def without_shift(_bn: Any, right: Affine) -> Affine:
    return right[0], 0 * right[1]


def kernel_in_merge(change: Callable[[torch.Tensor], torch.Tensor]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        right = blocks.set_convolution
        patch.setattr(
            blocks,
            "set_convolution",
            lambda result, matrix, scale, kernel: right(result, matrix, scale, change(kernel)),
        )

    return plant


def partition_swapped(patch: pytest.MonkeyPatch) -> None:
    right = blocks.RepMLPBlock.merged

    def swapped(block: Any) -> Any:
        merged = right(block)
        if wide(block):
            merged.h, merged.w = merged.w, merged.h
        return merged

    patch.setattr(blocks.RepMLPBlock, "merged", swapped)


def left_training(patch: pytest.MonkeyPatch) -> None:
    right = transform.merge_branches

    def forgetful(network: Any) -> Any:
        merged = copy.deepcopy(right(network))
        merged.stages[1][0].prebn2.train()
        return merged

    patch.setattr(transform, "merge_branches", forgetful)


# --- merging, the block of 2021


def pool_norm_in_merge(patch: pytest.MonkeyPatch) -> None:
    right, merge, current = repmlp.affine_of_batch_norm, repmlp.RepMLP.merged_perceptron, []

    def remember(self: Any) -> Any:
        current[:] = [self.avg.bn] if self.avg is not None and self.C == 8 else []
        return merge(self)

    patch.setattr(repmlp.RepMLP, "merged_perceptron", remember)
    patch.setattr(
        repmlp, "affine_of_batch_norm", lambda bn: without_shift(bn, right(bn)) if bn in current else right(bn)
    )


def kernel_in_merge_of_2021(patch: pytest.MonkeyPatch) -> None:
    right = repmlp.set_convolution
    patch.setattr(
        repmlp,
        "set_convolution",
        lambda result, matrix, scale, kernel: right(result, matrix, scale, kernel.transpose(-1, -2)),
    )


def conv_fused_without_mean(patch: pytest.MonkeyPatch) -> None:
    right = conv_bn.fuse_batch_norm

    def fuse(conv: nn.Conv2d, bn: Any) -> nn.Conv2d:
        fused = right(conv, bn)
        fused.bias = nn.Parameter(bn.bias.detach().clone(), requires_grad=False)
        return fused

    patch.setattr(conv_bn, "fuse_batch_norm", fuse)


# --- folding


def norm_in_fold(part: str, change: Callable[[Any, Affine], Affine]) -> Plant:
    """Take `prebn1` or `prebn2` of the second stage for something else while a unit is folded."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        right, fold, current = repmlp_unit.affine_of_batch_norm, repmlp_unit.FoldedUnit.__init__, []

        def remember(self: Any, unit: Any) -> None:
            current[:] = [getattr(unit, part)] if wide(unit.repmlp_block) else []
            fold(self, unit)

        patch.setattr(repmlp_unit.FoldedUnit, "__init__", remember)
        patch.setattr(
            repmlp_unit, "affine_of_batch_norm", lambda bn: change(bn, right(bn)) if bn in current else right(bn)
        )

    return plant


def gate_of_the_raw_map(patch: pytest.MonkeyPatch) -> None:
    right = repmlp_unit._gate_of_affine
    patch.setattr(repmlp_unit, "_gate_of_affine", lambda gp, a, b: gp if len(a) == 16 else right(gp, a, b))


def gate_before_the_shift(patch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        J, S, h, w = self.J, self.S, self.h, self.w
        rows, columns = x.shape[2] // h, x.shape[3] // w
        cut = x.reshape(-1, J * S, rows, h, columns, w).permute(0, 2, 4, 1, 3, 5)
        y = self._product(cut.reshape(-1, S, h * w)).reshape(-1, J, S, h * w) * self.scale
        offset = (self.offset * self.scale if self.divided else self.offset).expand_as(y)

        def back(y: torch.Tensor) -> torch.Tensor:
            return y.reshape(-1, rows, columns, S, h, w).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)

        z = x + back(y) * self.gp(x) + back(offset)
        return z + self.ffn(z)

    patch.setattr(repmlp_unit.FoldedUnit, "forward", forward)


def fused_in_fold(is_meant: Callable[[nn.Conv2d], bool], change: Callable[[Any, Affine], Affine]) -> Plant:
    """Take the BatchNorm behind some convolutions for something else while they are folded."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        right = algebra.fuse_batch_norm

        def fuse(conv: nn.Conv2d, bn: Any) -> nn.Conv2d:
            if not is_meant(conv):
                return right(conv, bn)
            a, b = change(bn, algebra.affine_of_batch_norm(bn))
            return algebra.convolution_with(conv, conv.weight.detach() * a[:, None, None, None], b)

        patch.setattr(repmlp_unit, "fuse_batch_norm", fuse)
        patch.setattr(conv_bn, "fuse_batch_norm", fuse)

    return plant


def head_without_shift(patch: pytest.MonkeyPatch) -> None:
    right = RepMLPNet.folded

    def fold(module: Any) -> Any:
        replaced = right(module)
        replaced[module.head].bias = module.head.bias
        return replaced

    patch.setattr(RepMLPNet, "folded", fold)


# --- export


def changed_graph(change: Callable[[onnx.ModelProto], None]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        right = graphs.export_graph

        def export(*arguments: Any, **named: Any) -> onnx.ModelProto:
            model = right(*arguments, **named)
            change(model)
            return model

        patch.setattr(graphs, "export_graph", export)

    return plant


def weight_in_graph(name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        values = np.frombuffer(tensor.raw_data, np.float32).copy()
        values[5] += 1e-3
        tensor.raw_data = values.tobytes()

    return change


def sharesets_of_the_graph(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "stages.1.0.fc3")
    values = np.frombuffer(tensor.raw_data, np.float32).reshape(tuple(tensor.dims))
    tensor.raw_data = np.roll(values, 1, axis=0).tobytes()


def gelu_by_tanh(model: onnx.ModelProto) -> None:
    node = [node for node in model.graph.node if node.op_type == "Gelu"][1]
    del node.attribute[:]
    node.attribute.append(onnx.helper.make_attribute("approximate", "tanh"))


def batch_in_a_reshape(model: onnx.ModelProto) -> None:
    """The batch that was traced, 2, where the exporter should have left -1."""
    values = {value.name: value.type.tensor_type.shape.dim for value in model.graph.value_info}
    constants = {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
    reshapes = [n for n in model.graph.node if n.op_type == "Reshape" and n.input[0] not in constants]
    node = [n for n in reshapes if n.output[0] in values][-1]
    shape = np.array([dim.dim_value or 2 for dim in values[node.output[0]]], np.int64)
    node.input[1] = "baked"
    model.graph.initializer.append(onnx.numpy_helper.from_array(shape, "baked"))


def batch_at_the_borders(patch: pytest.MonkeyPatch) -> None:
    """The batch that was traced, 2, in the graph's inputs and outputs."""
    right = graphs.with_metadata

    def fixed(model: onnx.ModelProto, metadata: Any) -> onnx.ModelProto:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 2
        return right(model, metadata)

    patch.setattr(graphs, "with_metadata", fixed)


def stale_simplified_graph(patch: pytest.MonkeyPatch) -> None:
    """The simplified graph of an epoch before: the same nodes, weights that have moved since."""
    right = graphs.simplify_graph

    def stale(model: onnx.ModelProto, simplifier: Any) -> onnx.ModelProto:
        simplified = right(model, simplifier)
        for tensor in simplified.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and tensor.raw_data:
                tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) * np.float32(0.99)).tobytes()
        return simplified

    patch.setattr(graphs, "simplify_graph", stale)


# --- loading


def loaded(change: Callable[[dict[str, torch.Tensor]], None]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        right = trained.load_network

        def load(tensors: Any, *arguments: Any, **named: Any) -> nn.Module:
            changed = dict(tensors)
            change(changed)
            return right(changed, *arguments, **named)

        patch.setattr(trained, "load_network", load)

    return plant


def key_renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["stages.1.0.repmlp_block.fc3_norm.weight"] = tensors.pop("stages.1.0.repmlp_block.fc3_bn.weight")


def fc3_transposed(tensors: dict[str, torch.Tensor]) -> None:
    key = "stages.1.0.repmlp_block.fc3.weight"
    rows, area = tensors[key].shape[:2]
    tensors[key] = tensors[key].view(rows // area, area, area).transpose(1, 2).reshape(tensors[key].shape).contiguous()


def norms_exchanged(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        one, two = f"stages.1.1.prebn1.{name}", f"stages.1.1.prebn2.{name}"
        tensors[one], tensors[two] = tensors[two], tensors[one]


def loaded_in_training_mode(patch: pytest.MonkeyPatch) -> None:
    right = trained.load_network

    def load(*arguments: Any, **named: Any) -> Any:
        network = right(*arguments, **named)
        network.stages[1][0].prebn1.train()
        return network

    patch.setattr(trained, "load_network", load)


def ema_for_model(patch: pytest.MonkeyPatch) -> None:
    right = state_dict.select_weights

    def select(content: Any, weights: str | None, name: str, state_key: str | None = None) -> Any:
        selected = right(content, weights, name, state_key)
        return replace(selected, found=dict(content["model_ema"]))

    patch.setattr(state_dict, "select_weights", select)


def off_by_one(kernel: torch.Tensor) -> torch.Tensor:
    return F.pad(kernel, (2, 0, 2, 0))


def transposed_toeplitz(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.flip(-1, -2)
