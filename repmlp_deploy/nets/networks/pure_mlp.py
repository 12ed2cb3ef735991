"""A pure MLP for small images: RepMLP blocks of 2021 interleaved with fully-connected layers over channels.

The paper (arXiv 2105.01883, section 4.1, on CIFAR-10) specifies: no kernel above 1×1 at inference; RepMLP blocks
interleaved with regular FC layers, that is 1×1 convolutions; three stages of 16, 32 and 64 channels with max pooling
between them, on 32×32 images. No code or weights of it were released. Ours are the choices it leaves open: a 1×1 layer
from the image to the first stage and from stage to stage, after the pool; a BatchNorm and a ReLU after every 1×1
layer and a ReLU after every RepMLP block; how many units a stage has, their partitions, groups and branches; and a
linear head on the mean of the last map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from repmlp_deploy.nets.blocks.conv_bn import MergeableConvBN
from repmlp_deploy.nets.blocks.repmlp2021 import RepMLP
from repmlp_deploy.nets.networks.bounds import Count, Counts, Depths, PerStage
from repmlp_deploy.nets.networks.input_size import require_input
from repmlp_deploy.nets.networks.shapes import count_layers, partition_of, read_block, square_input
from repmlp_deploy.nets.surgery import switch_blocks

__all__ = ["PureMLP", "PureMLPSpec", "PureUnit", "infer_pure_mlp"]


class PureMLPSpec(PerStage):
    """Hyper-parameters of a pure MLP; sequences have one entry per stage.

    Attributes:
        input_size: (H, W) of the images; part of the model, as FC3 is tied to positions.
        channels: C.
        depths: units, each a RepMLP block and an FC layer.
        partitions: (h, w); divides the stage's map.
        groups: of FC3 and its branches.
        kernels: branch kernels k of every block, odd.
        reduction: inputs of the global perceptrons over their width.
        in_channels: 3 for RGB.
        classes: width of the head.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    per_stage = ("channels", "depths", "partitions", "groups")

    input_size: tuple[Count, Count] = (32, 32)
    channels: Counts = (16, 32, 64)
    depths: Depths
    partitions: tuple[tuple[Count, Count], ...]
    groups: Counts
    kernels: Counts = (1, 3)
    reduction: Count = 1
    in_channels: Count = 3
    classes: Count = 10

    def maps(self) -> list[tuple[int, int]]:
        """Return (H, W) of the map that every stage works on."""
        return [(self.input_size[0] // 2**i, self.input_size[1] // 2**i) for i in range(len(self.channels))]


class PureUnit(nn.Module):
    """A RepMLP block and an FC layer over channels, a ReLU after each: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, repmlp: RepMLP, *, deploy: bool) -> None:
        super().__init__()
        self.repmlp = repmlp
        self.fc = MergeableConvBN(repmlp.O, repmlp.C, 1, relu=True, deploy=deploy)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(F.relu(self.repmlp(x)))
        return y


class PureMLP(nn.Module):
    """A pure MLP: (N, in_channels, H, W) float -> (N, classes) logits.

    Args:
        spec: the hyper-parameters.
        deploy: build every block and FC layer in its merged form.

    Raises:
        ValueError: sizes that do not fit one another.
    """

    def __init__(self, spec: PureMLPSpec, *, deploy: bool = False) -> None:
        super().__init__()
        self.spec = spec
        stages = list(zip(spec.channels, spec.depths, spec.partitions, spec.groups, spec.maps(), strict=True))
        self.stem = MergeableConvBN(spec.in_channels, spec.channels[0], 1, relu=True, deploy=deploy)
        self.stages = nn.ModuleList()
        self.embeds = nn.ModuleList()
        for i, (C, depth, partition, groups, map_) in enumerate(stages):
            units = [PureUnit(self._block(C, map_, partition, groups, deploy), deploy=deploy) for _ in range(depth)]
            self.stages.append(nn.ModuleList(units))
            if i + 1 < len(stages):
                self.embeds.append(MergeableConvBN(C, spec.channels[i + 1], 1, relu=True, deploy=deploy))
        self.head = nn.Linear(spec.channels[-1], spec.classes)

    def _block(
        self, channels: int, map_: tuple[int, int], partition: tuple[int, int], groups: int, deploy: bool
    ) -> RepMLP:
        if not all(map_):
            raise ValueError(f"input size {self.spec.input_size} leaves a stage a {map_[0]}x{map_[1]} map")
        return RepMLP(
            channels,
            channels,
            map_,
            partition,
            groups=groups,
            kernels=self.spec.kernels,
            reduction=self.spec.reduction,
            deploy=deploy,
        )

    def forward(self, x: Tensor) -> Tensor:
        require_input(x, self.spec.in_channels, self.spec.input_size)
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            for unit in stage:  # type: ignore[attr-defined]
                x = unit(x)
            if i < len(self.embeds):
                x = self.embeds[i](F.max_pool2d(x, 2))  # (N, C, H, W) -> (N, C', H/2, W/2)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))  # (N, C, H, W) -> (N, C)
        return logits

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Merge every block and FC layer in place; `merge_branches` leaves its input untouched."""
        switch_blocks(self)


def infer_pure_mlp(shapes: Mapping[str, Sequence[int]], input_size: tuple[int, int] | None) -> PureMLPSpec:
    """Infer the hyper-parameters of a pure MLP from the keys and shapes of its state dict.

    Args:
        shapes: state-dict key to shape, trained or merged.
        input_size: (H, W), where shapes cannot tell it: they hold areas, which are taken for squares otherwise.

    Raises:
        KeyError: a key that every pure MLP has is missing.
        ValueError: the shapes fit no pure MLP, or only with an `input_size`.
    """
    stages = count_layers(shapes, "stages.")
    depths = [count_layers(shapes, f"stages.{i}.") for i in range(stages)]
    channels = [shapes[f"stages.{i}.0.fc.conv.weight"][0] for i in range(stages)]
    blocks = [read_block(shapes, f"stages.{i}.0.repmlp.", channels=C) for i, C in enumerate(channels)]
    if input_size is None:
        input_size = square_input([(2**i, block) for i, block in enumerate(blocks)])
    maps = [(input_size[0] // 2**i, input_size[1] // 2**i) for i in range(stages)]
    stem = shapes["stem.conv.weight"]  # (C, in_channels, 1, 1)
    return PureMLPSpec.model_validate(
        {
            "input_size": input_size,
            "channels": channels,
            "depths": depths,
            "partitions": [partition_of(block.area, [map_]) for block, map_ in zip(blocks, maps, strict=True)],
            "groups": [block.groups for block in blocks],
            "kernels": blocks[0].kernels,
            "reduction": max(block.reduction for block in blocks),
            "in_channels": stem[1],
            "classes": shapes["head.weight"][0],
        }
    )
