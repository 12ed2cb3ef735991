"""MobileFaceNet with RepMLP units: face recognition, an embedding for every aligned face.

Published: MobileFaceNet (arXiv 1804.07573, table 1) at 112×112: a stem, three stages that begin with a downsampling
bottleneck and go on with residual ones, a global depthwise convolution in the place of average pooling, PReLU as the
non-linearity. RepMLP (arXiv 2105.01883) reports what its blocks do for face recognition, whose aligned images have the
positional patterns that fully-connected layers see.
Our choice: the residual bottlenecks of a stage are units of `UNITS`, chosen stage by stage; `repmlp` is the unit of
CVPR 2022 and not the block of 2021. No weights were published for this combination.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import ConfigDict, model_validator
from torch import Tensor, nn

from repmlp_deploy.nets.blocks.conv_bn import ConvBN
from repmlp_deploy.nets.blocks.repmlp2022 import RepMLPBlock
from repmlp_deploy.nets.blocks.repmlp_unit import RepMLPUnit
from repmlp_deploy.nets.networks.bounds import Count, Counts, Depths, PerStage
from repmlp_deploy.nets.networks.input_size import require_input
from repmlp_deploy.nets.networks.shapes import branch_kernels, count_layers
from repmlp_deploy.nets.surgery import switch_blocks

__all__ = ["UNITS", "Bottleneck", "ConvPReLU", "FaceStage", "MobileFaceNet", "MobileFaceNetSpec", "infer_mobilefacenet"]

Unit = Literal["bottleneck", "repmlp"]

_STEM_STRIDE = 2


class MobileFaceNetSpec(PerStage):
    """Hyper-parameters of a MobileFaceNet; sequences have one entry per stage.

    Attributes:
        input_size: (H, W) of the aligned faces, divisible by 2 for the stem and 2 for every stage.
        stem: channels of the stem.
        channels: C.
        down: expansion of the bottleneck that begins a stage.
        depths: units after it.
        units: what they are, an entry of `UNITS`.
        sharesets: S of `repmlp` units; divides C.
        kernels: branch kernels k of `repmlp` units, odd.
        reduction: C over the width of the global perceptron.
        expansion: width over C inside every unit.
        final: channels before the global depthwise convolution.
        embedding: its length.
        in_channels: 3 for RGB.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    per_stage = ("channels", "down", "depths", "units", "sharesets")

    input_size: tuple[Count, Count]
    stem: Count = 64
    channels: Counts = (64, 128, 128)
    down: Counts = (2, 4, 4)
    depths: Depths = (4, 6, 2)
    units: tuple[Unit, ...] = ("repmlp", "repmlp", "repmlp")
    sharesets: Counts = (1, 4, 16)
    kernels: Counts = (1, 3)
    reduction: Count = 4
    expansion: Count = 2
    final: Count = 512
    embedding: Count = 128
    in_channels: Count = 3

    @model_validator(mode="after")
    def _whole_maps(self) -> MobileFaceNetSpec:
        stride = _STEM_STRIDE * 2 ** len(self.channels)
        if self.input_size[0] % stride or self.input_size[1] % stride:
            raise ValueError(f"input_size is {self.input_size}; expected multiples of {stride}")
        return self

    def maps(self) -> list[tuple[int, int]]:
        """Return (H, W) of the map that every stage works on."""
        strides = [_STEM_STRIDE * 2 ** (i + 1) for i in range(len(self.channels))]
        return [(self.input_size[0] // stride, self.input_size[1] // stride) for stride in strides]


class ConvPReLU(nn.Module):
    """A convolution with BatchNorm, and a PReLU of one slope a channel: (N, C, H, W) -> (N, O, H', W')."""

    def __init__(  # noqa: PLR0913 - a convolution has that many numbers
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv = ConvBN(in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=groups)
        self.act = nn.PReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.conv(x))
        return y


class Bottleneck(nn.Module):
    """MobileFaceNet's inverted bottleneck: 1×1 wide, 3×3 depthwise, 1×1 narrow without a non-linearity.

    (N, C, H, W) -> (N, O, H/stride, W/stride); residual where nothing changes size.
    """

    def __init__(self, in_channels: int, out_channels: int, *, expansion: int, stride: int = 1) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.expand = ConvPReLU(in_channels, wide, 1)
        self.depthwise = ConvPReLU(wide, wide, 3, stride=stride, padding=1, groups=wide)
        self.project = ConvBN(wide, out_channels, 1)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


def _bottleneck_unit(spec: MobileFaceNetSpec, stage: int, *, deploy: bool) -> nn.Module:
    del deploy  # it has nothing to merge
    return Bottleneck(spec.channels[stage], spec.channels[stage], expansion=spec.expansion)


def _repmlp_unit(spec: MobileFaceNetSpec, stage: int, *, deploy: bool) -> nn.Module:
    C, (h, w) = spec.channels[stage], spec.maps()[stage]
    block = RepMLPBlock(
        C,
        h,
        w,
        sharesets=spec.sharesets[stage],
        kernels=spec.kernels,
        hidden=max(1, C // spec.reduction),
        deploy=deploy,
    )
    return RepMLPUnit(block, ffn_hidden=C * spec.expansion)


UNITS: dict[str, Callable[..., nn.Module]] = {"bottleneck": _bottleneck_unit, "repmlp": _repmlp_unit}
"""What a stage repeats after its downsampling: (spec, stage, deploy=…) -> a module of (N, C, H, W) -> (N, C, H, W)."""


class FaceStage(nn.Module):
    """A downsampling bottleneck and the units after it: (N, C, H, W) -> (N, O, H/2, W/2)."""

    def __init__(self, spec: MobileFaceNetSpec, stage: int, *, deploy: bool) -> None:
        super().__init__()
        before = spec.stem if stage == 0 else spec.channels[stage - 1]
        self.down = Bottleneck(before, spec.channels[stage], expansion=spec.down[stage], stride=2)
        build = UNITS[spec.units[stage]]
        self.units = nn.ModuleList(build(spec, stage, deploy=deploy) for _ in range(spec.depths[stage]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        for unit in self.units:
            x = unit(x)
        return x


class MobileFaceNet(nn.Module):
    """MobileFaceNet: (N, in_channels, H, W) float -> (N, embedding), not normalised.

    Args:
        spec: the hyper-parameters.
        deploy: build every RepMLP block in its merged form.

    Raises:
        ValueError: sizes that do not fit one another.
    """

    def __init__(self, spec: MobileFaceNetSpec, *, deploy: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.stem = ConvPReLU(spec.in_channels, spec.stem, 3, stride=_STEM_STRIDE, padding=1)
        self.stem_depthwise = ConvPReLU(spec.stem, spec.stem, 3, padding=1, groups=spec.stem)
        self.stages = nn.ModuleList(FaceStage(spec, i, deploy=deploy) for i in range(len(spec.channels)))
        self.widen = ConvPReLU(spec.channels[-1], spec.final, 1)
        self.gdc = ConvBN(spec.final, spec.final, spec.maps()[-1], groups=spec.final)  # global depthwise convolution
        self.embed = ConvBN(spec.final, spec.embedding, 1)

    def forward(self, x: Tensor) -> Tensor:
        require_input(x, self.spec.in_channels, self.spec.input_size)
        x = self.stem_depthwise(self.stem(x))
        for stage in self.stages:
            x = stage(x)
        y: Tensor = self.embed(self.gdc(self.widen(x)))  # (N, C, h, w) -> (N, embedding, 1, 1)
        return y.reshape(-1, self.spec.embedding)

    def switch_to_deploy(self) -> None:
        """Merge every block in place; `merge_branches` leaves its input untouched."""
        switch_blocks(self)


def infer_mobilefacenet(shapes: Mapping[str, Sequence[int]], input_size: tuple[int, int] | None) -> MobileFaceNetSpec:
    """Infer the hyper-parameters of a MobileFaceNet from the keys and shapes of its state dict.

    The global depthwise convolution is as large as the last map, so the input's size is among the shapes.

    Raises:
        KeyError: a key that every MobileFaceNet has is missing.
        ValueError: the shapes fit no MobileFaceNet, or contradict `input_size`.
    """
    stages = count_layers(shapes, "stages.")
    stride, last = _STEM_STRIDE * 2**stages, shapes["gdc.conv.weight"]  # (final, 1, h, w)
    size = (last[2] * stride, last[3] * stride)
    if input_size is not None and input_size != size:
        raise ValueError(
            f"--input-size {input_size[0]}x{input_size[1]} contradicts the global depthwise convolution: "
            f"it is {last[2]}x{last[3]}, of a {size[0]}x{size[1]} input"
        )
    stem = shapes["stem.conv.conv.weight"]
    found = [_infer_stage(shapes, i) for i in range(stages)]
    repmlp = next((stage for stage in found if stage["unit"] == "repmlp"), found[0])
    return MobileFaceNetSpec(
        input_size=size,
        stem=stem[0],
        channels=tuple(stage["channels"] for stage in found),
        down=tuple(stage["down"] for stage in found),
        depths=tuple(stage["depth"] for stage in found),
        units=tuple(stage["unit"] for stage in found),
        sharesets=tuple(stage["sharesets"] for stage in found),
        kernels=repmlp["kernels"],
        reduction=repmlp["reduction"],
        expansion=found[0]["expansion"],
        final=last[0],
        embedding=shapes["embed.conv.weight"][0],
        in_channels=stem[1],
    )


def _infer_stage(shapes: Mapping[str, Sequence[int]], stage: int) -> dict[str, Any]:
    """Infer the hyper-parameters of one stage."""
    start = f"stages.{stage}."
    wide, before = shapes[f"{start}down.expand.conv.conv.weight"][:2]
    C = shapes[f"{start}down.project.conv.weight"][0]
    first = f"{start}units.0."
    about: dict[str, Any] = {
        "channels": C,
        "down": wide // before,
        "depth": count_layers(shapes, f"{start}units."),
        "unit": "bottleneck",
    }
    about |= {"sharesets": 1, "kernels": (1, 3), "reduction": 4}
    fc3 = shapes.get(f"{first}repmlp_block.fc3.weight")  # (S·h·w, h·w, 1, 1)
    if fc3 is None:
        return about | {"expansion": shapes[f"{first}expand.conv.conv.weight"][0] // C}
    return about | {
        "unit": "repmlp",
        "sharesets": fc3[0] // fc3[1],
        "kernels": branch_kernels(shapes, f"{first}repmlp_block."),
        "reduction": max(1, C // shapes[f"{first}repmlp_block.gp.fc1.weight"][0]),
        "expansion": shapes[f"{first}ffn_block.ffn_fc1.conv.weight"][0] // C,
    }
