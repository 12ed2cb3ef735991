"""RepMLPNet, the hierarchical network of CVPR 2022: a patch embedding, stages of RepMLP units, a linear head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from repmlp_deploy.nets.blocks import ConvBN, RepMLPBlock, RepMLPUnit

__all__ = ["RepMLPNet"]


class RepMLPNet(nn.Module):
    """RepMLPNet: (N, in_channels, H, W) float -> (N, classes) logits.

    The state dict has the keys of the official release. Stage i works on maps of (H, W) / (patch · 2^i).

    Args:
        input_size: (H, W) of the images; part of the model, as FC3 is tied to positions.
        channels: C of every stage.
        depths: units in every stage.
        sharesets: S of every stage.
        kernels: branch kernels of every block.
        partitions: (h, w) of every stage; by default the whole map, one partition.
        reduction: C over the width of the global perceptron.
        expansion: width of the FFN over C.
        patch: edge and stride of the patch embedding.
        in_channels: 3 for RGB.
        classes: width of the head.
        deploy: build every block in its merged form.
    """

    def __init__(  # noqa: PLR0913 - the paper's hyper-parameters
        self,
        *,
        input_size: tuple[int, int],
        channels: Sequence[int],
        depths: Sequence[int],
        sharesets: Sequence[int],
        kernels: Sequence[int] = (1, 3),
        partitions: Sequence[tuple[int, int]] | None = None,
        reduction: int = 4,
        expansion: int = 4,
        patch: int = 4,
        in_channels: int = 3,
        classes: int = 1000,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        self.input_size = (input_size[0], input_size[1])
        self.in_channels = in_channels
        self.conv_embedding = ConvBN(in_channels, channels[0], patch, stride=patch, relu=True)
        self.stages = nn.ModuleList()
        self.embeds = nn.ModuleList()
        maps = [(input_size[0] // (patch * 2**i), input_size[1] // (patch * 2**i)) for i in range(len(channels))]
        for i, (C, depth, S) in enumerate(zip(channels, depths, sharesets, strict=True)):
            h, w = maps[i] if partitions is None else partitions[i]
            if not h or not w or maps[i][0] % h or maps[i][1] % w:
                raise ValueError(f"stage {i} has a {maps[i][0]}x{maps[i][1]} map; {h}x{w} partitions do not divide it")
            units = [
                RepMLPUnit(
                    RepMLPBlock(C, h, w, sharesets=S, kernels=kernels, hidden=C // reduction, deploy=deploy),
                    ffn_hidden=C * expansion,
                )
                for _ in range(depth)
            ]
            self.stages.append(nn.ModuleList(units))
            if i + 1 < len(channels):
                self.embeds.append(ConvBN(C, channels[i + 1], 2, stride=2, relu=True))
        self.head_norm = nn.BatchNorm2d(channels[-1])
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != (self.in_channels, *self.input_size):
            expected = f"(N, {self.in_channels}, {self.input_size[0]}, {self.input_size[1]})"
            raise ValueError(f"input is {tuple(x.shape)}; this network takes {expected}")
        x = self.conv_embedding(x)
        for i, stage in enumerate(self.stages):
            for unit in stage:  # type: ignore[attr-defined]
                x = unit(x)
            if i < len(self.embeds):
                x = self.embeds[i](x)  # (N, C, H, W) -> (N, C', H/2, W/2)
        x = self.head_norm(x).mean(dim=(2, 3))  # (N, C, H, W) -> (N, C)
        logits: Tensor = self.head(x)
        return logits

    @property
    def backbone(self) -> RepMLPNet:
        """The network itself: mmpretrain's users write `model.backbone.switch_to_deploy()`."""
        return self

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Merge every block in place, as mmpretrain's users expect; `merge_branches` leaves its input untouched."""
        for module in list(self.modules()):
            if isinstance(module, RepMLPBlock):
                module.switch_to_deploy()
