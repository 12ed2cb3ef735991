"""RepMLPNet, the hierarchical network of CVPR 2022: a patch embedding, stages of RepMLP units, a linear head.

`RepMLPTrunk` is all of it but the head, for tasks whose head is another; `RepMLPBackbone` gives the maps of its stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn

from repmlp_deploy.nets.blocks.algebra import affine_of_batch_norm, constant
from repmlp_deploy.nets.blocks.checks import Check, absorbed_checks, parameter_checks
from repmlp_deploy.nets.blocks.conv_bn import ChannelAffine, ConvBN
from repmlp_deploy.nets.blocks.protocol import Reparameterizable
from repmlp_deploy.nets.blocks.repmlp2022 import RepMLPBlock
from repmlp_deploy.nets.blocks.repmlp_unit import RepMLPUnit
from repmlp_deploy.nets.networks.bounds import Count, Counts, Depths, PerStage
from repmlp_deploy.nets.networks.input_size import require_input
from repmlp_deploy.nets.networks.shapes import branch_kernels, count_layers
from repmlp_deploy.nets.surgery import switch_blocks

__all__ = [
    "RepMLPBackbone",
    "RepMLPBackboneSpec",
    "RepMLPNet",
    "RepMLPNetSpec",
    "RepMLPTrunk",
    "RepMLPTrunkSpec",
    "infer_backbone",
    "infer_repmlpnet",
    "infer_trunk",
]


class RepMLPTrunkSpec(PerStage):
    """Hyper-parameters of a RepMLPNet without its head; sequences have one entry per stage.

    Attributes:
        input_size: (H, W) of the images; part of the model, as FC3 is tied to positions.
        channels: C.
        depths: units.
        sharesets: S; divides C.
        kernels: branch kernels k of every block, odd.
        partitions: (h, w); None for the whole map, one partition.
        reduction: C over the width of the global perceptron.
        gate_widths: of the global perceptron, where a rounded C / reduction is not it, as in mmpretrain.
        expansion: width of the FFN over C.
        patch: edge and stride of the patch embedding, or its (height, width).
        in_channels: 3 for RGB.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    per_stage = ("channels", "depths", "sharesets", "partitions", "gate_widths")

    input_size: tuple[Count, Count]
    channels: Counts
    depths: Depths
    sharesets: Counts
    kernels: Counts = (1, 3)
    partitions: tuple[tuple[Count, Count], ...] | None = None
    reduction: Count = 4
    gate_widths: Counts | None = None
    expansion: Count = 4
    patch: Count | tuple[Count, Count] = 4
    in_channels: Count = 3

    def maps(self) -> list[tuple[int, int]]:
        """Return (H, W) of the map that every stage works on."""
        height, width = self.patch_size()
        return [
            (self.input_size[0] // (height * 2**i), self.input_size[1] // (width * 2**i))
            for i in range(len(self.channels))
        ]

    def patch_size(self) -> tuple[int, int]:
        """Return the (height, width) of a patch."""
        return (self.patch, self.patch) if isinstance(self.patch, int) else self.patch

    def gate_width(self, stage: int) -> int:
        """Return the width of the global perceptron in the blocks of a stage."""
        return self.channels[stage] // self.reduction if self.gate_widths is None else self.gate_widths[stage]


class RepMLPNetSpec(RepMLPTrunkSpec):
    """Hyper-parameters of a RepMLPNet.

    Attributes:
        classes: width of the head.
    """

    classes: Count = 1000


class RepMLPBackboneSpec(RepMLPTrunkSpec):
    """Hyper-parameters of a RepMLPNet that gives feature maps.

    Attributes:
        out_indices: stages whose maps are given, rising; None for the last alone, mmpretrain's default.
    """

    out_indices: tuple[Annotated[int, Field(ge=0)], ...] | None = None

    @model_validator(mode="after")
    def _rising_stages(self) -> RepMLPBackboneSpec:
        taken = self.taken()
        if not taken or list(taken) != sorted(set(taken)) or taken[-1] >= len(self.channels):
            raise ValueError(f"out_indices is {taken}; expected rising stages of 0 to {len(self.channels) - 1}")
        return self

    def taken(self) -> tuple[int, ...]:
        """Return the stages whose maps are outputs."""
        return (len(self.channels) - 1,) if self.out_indices is None else self.out_indices

    def output_names(self) -> tuple[str, ...]:
        """Return the names of these maps."""
        return tuple(f"stage{i}" for i in self.taken())


class RepMLPTrunk(Reparameterizable):
    """A RepMLPNet without its head: (N, in_channels, H, W) float -> (N, C, h, w), the last stage's map, normalised.

    The state dict has the keys of the official release.

    Args:
        spec: the hyper-parameters.
        deploy: build every block in its merged form.

    Raises:
        ValueError: sizes that do not fit one another.
    """

    def __init__(self, spec: RepMLPTrunkSpec, *, deploy: bool = False) -> None:
        super().__init__()
        self.spec = spec
        channels, maps = spec.channels, spec.maps()
        self.conv_embedding = ConvBN(
            spec.in_channels, channels[0], spec.patch_size(), stride=spec.patch_size(), relu=True
        )
        self.stages = nn.ModuleList()
        self.embeds = nn.ModuleList()
        for i, (C, depth, S) in enumerate(zip(channels, spec.depths, spec.sharesets, strict=True)):
            h, w = maps[i] if spec.partitions is None else spec.partitions[i]
            if not all(maps[i]) or maps[i][0] % h or maps[i][1] % w:
                raise ValueError(f"stage {i} has a {maps[i][0]}x{maps[i][1]} map; {h}x{w} partitions do not divide it")
            units = [
                RepMLPUnit(
                    RepMLPBlock(C, h, w, sharesets=S, kernels=spec.kernels, hidden=spec.gate_width(i), deploy=deploy),
                    ffn_hidden=C * spec.expansion,
                )
                for _ in range(depth)
            ]
            self.stages.append(nn.ModuleList(units))
            if i + 1 < len(channels):
                self.embeds.append(ConvBN(C, channels[i + 1], 2, stride=2, relu=True))
        self.head_norm = nn.BatchNorm2d(channels[-1])

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """Return the map that every stage passes on: after its downsampling, the last one after the final norm.

        These are the places where mmpretrain's `out_indices` taps.
        """
        require_input(x, self.spec.in_channels, self.spec.input_size)
        x = self.conv_embedding(x)
        handed = []
        for i, stage in enumerate(self.stages):
            for unit in stage:  # type: ignore[attr-defined]
                x = unit(x)
            x = self.embeds[i](x) if i < len(self.embeds) else self.head_norm(x)  # (N, C, H, W) -> (N, C', H/2, W/2)
            handed.append(x)
        return handed

    def forward(self, x: Tensor) -> Any:
        return self.feature_maps(x)[-1]

    def switch_to_deploy(self) -> None:
        """Merge every block in place, as mmpretrain's users expect; `merge_branches` leaves its input untouched."""
        switch_blocks(self)

    def folded(self) -> dict[nn.Module, nn.Module]:
        """Return the a·x + b that replaces the final norm, which has nothing linear after it."""
        return {self.head_norm: ChannelAffine(self.head_norm)}


class RepMLPNet(RepMLPTrunk):
    """RepMLPNet: (N, in_channels, H, W) float -> (N, classes) logits; see `RepMLPTrunk`."""

    def __init__(self, spec: RepMLPNetSpec, *, deploy: bool = False) -> None:
        super().__init__(spec, deploy=deploy)
        self.head = nn.Linear(spec.channels[-1], spec.classes)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.feature_maps(x)[-1].mean(dim=(2, 3))  # (N, C, H, W) -> (N, C)
        logits: Tensor = self.head(pooled)
        return logits

    def folded(self) -> dict[nn.Module, nn.Module]:
        """Return the head that absorbed the final norm through the mean."""
        a, b = affine_of_batch_norm(self.head_norm)
        weight = self.head.weight.detach().double()
        head = nn.Linear(self.head.in_features, self.head.out_features, device="meta")
        head.weight = constant((weight * a).to(self.head.weight.dtype))
        head.bias = constant((self.head.bias.detach() + weight @ b).to(self.head.weight.dtype))
        return {self.head_norm: nn.Identity(), self.head: head}

    def judged_together(self, made: nn.Module) -> tuple[str, ...]:
        """Return the final norm and the head, once the head absorbed the norm."""
        folded = isinstance(made, RepMLPNet) and isinstance(made.get_submodule("head_norm"), nn.Identity)
        return ("head_norm", "head") if folded else ()

    def checks(self, made: nn.Module) -> Iterator[Check]:
        """Yield the checks of the head that absorbed the final norm, or of an unchanged network."""
        if not isinstance(made, RepMLPNet) or not self.judged_together(made):
            yield from parameter_checks(self, made, "")
            return
        weight, bias = self.head.weight.detach().double(), self.head.bias.detach().double()

        def values(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return weight * a, bias + weight @ b

        stored = [("head.weight", made.head.weight), ("head.bias", made.head.bias)]
        yield from absorbed_checks("head · head_norm fold", self.head_norm, values, stored)

    @property
    def backbone(self) -> RepMLPNet:
        """The network itself: mmpretrain's users write `model.backbone.switch_to_deploy()`."""
        return self


class RepMLPBackbone(RepMLPTrunk):
    """A RepMLPNet as a backbone: (N, in_channels, H, W) float -> {"stage0": (N, C, h, w), …}, of `feature_maps`."""

    def __init__(self, spec: RepMLPBackboneSpec, *, deploy: bool = False) -> None:
        super().__init__(spec, deploy=deploy)
        self.taken, self.names = spec.taken(), spec.output_names()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.feature_maps(x)
        return {name: maps[i] for name, i in zip(self.names, self.taken, strict=True)}


def infer_repmlpnet(shapes: Mapping[str, Sequence[int]], input_size: tuple[int, int] | None) -> RepMLPNetSpec:
    """Infer the hyper-parameters of a RepMLPNet from the keys and shapes of its state dict; see `infer_trunk`."""
    trunk = infer_trunk(shapes, input_size)
    return RepMLPNetSpec(**trunk.model_dump(), classes=shapes["head.weight"][0])


def infer_backbone(shapes: Mapping[str, Sequence[int]], input_size: tuple[int, int] | None) -> RepMLPBackboneSpec:
    """Infer the hyper-parameters of a backbone from the keys and shapes of its state dict; every map is an output.

    Which stages were tapped is not among the weights; see `infer_trunk`.
    """
    trunk = infer_trunk(shapes, input_size)
    return RepMLPBackboneSpec(**trunk.model_dump(), out_indices=tuple(range(len(trunk.channels))))


def infer_trunk(shapes: Mapping[str, Sequence[int]], input_size: tuple[int, int] | None) -> RepMLPTrunkSpec:
    """Infer the hyper-parameters of a RepMLPNet, except its head, from the keys and shapes of its state dict.

    Args:
        shapes: state-dict key to shape, trained or merged.
        input_size: (H, W), where shapes cannot tell it: FC3 holds h·w, which is taken for a square otherwise.

    Raises:
        KeyError: a key that every RepMLPNet has is missing.
        ValueError: the shapes fit no RepMLPNet, or only with an `input_size`.
    """
    stages = count_layers(shapes, "stages.")
    if not stages:
        raise KeyError("stages.0.0.repmlp_block.fc3.weight")
    firsts = [f"stages.{i}.0." for i in range(stages)]
    fc3 = [shapes[f"{first}repmlp_block.fc3.weight"] for first in firsts]  # (S·h·w, h·w, 1, 1)
    ffn = [shapes[f"{first}ffn_block.ffn_fc1.conv.weight"] for first in firsts]  # (C·expansion, C, 1, 1)
    channels = [shape[1] for shape in ffn]
    embedding = shapes["conv_embedding.conv.weight"]  # (C, in_channels, *patch)
    patch, areas = (embedding[2], embedding[3]), [shape[1] for shape in fc3]
    if input_size is None:
        input_size = _square_input(areas, patch)
    else:
        _require_whole_patches(input_size, patch, areas)
    gates = tuple(shapes[f"{first}repmlp_block.gp.fc1.weight"][0] for first in firsts)
    reduction = max(1, channels[0] // gates[0])
    spec = RepMLPTrunkSpec(
        input_size=input_size,
        channels=tuple(channels),
        depths=tuple(count_layers(shapes, f"stages.{i}.") for i in range(stages)),
        sharesets=tuple(shape[0] // shape[1] for shape in fc3),
        kernels=branch_kernels(shapes, f"{firsts[0]}repmlp_block."),
        reduction=reduction,
        gate_widths=None if gates == tuple(C // reduction for C in channels) else gates,
        expansion=max(1, ffn[0][0] // channels[0]),
        patch=patch[0] if patch[0] == patch[1] else patch,
        in_channels=embedding[1],
    )
    fitting = _fitting_inputs(areas, patch)
    partitions = tuple(_partition(area, map_, fitting) for area, map_ in zip(areas, spec.maps(), strict=True))
    return spec if list(partitions) == spec.maps() else spec.model_copy(update={"partitions": partitions})


def _square_input(areas: Sequence[int], patch: tuple[int, int]) -> tuple[int, int]:
    """Return the (H, W) of the only square input for which every stage's map is one partition."""
    fitting = _fitting_inputs(areas, patch)
    square = next(((height, width) for height, width in fitting if height == width), None)
    if square is None:
        said = ", ".join(str(area) for area in areas)
        raise ValueError(
            f"FC3 covers {said} positions a stage, no square input's maps: pass --input-size{_such_as(fitting)}"
        )
    return square


def _fitting_inputs(areas: Sequence[int], patch: tuple[int, int]) -> list[tuple[int, int]]:
    """Return every (H, W) for which each stage's map is one partition, the squarest first."""
    found = []
    for h in range(1, areas[0] + 1):
        w = areas[0] // h
        maps = [(h // 2**i, w // 2**i) for i in range(len(areas))]
        whole = h % 2 ** (len(areas) - 1) == 0 == w % 2 ** (len(areas) - 1)
        if h * w == areas[0] and whole and all(a * b == area for (a, b), area in zip(maps, areas, strict=True)):
            found.append((h * patch[0], w * patch[1]))
    return sorted(found, key=lambda size: (max(size) / min(size), size[0]))


def _such_as(fitting: Sequence[tuple[int, int]]) -> str:
    """Return ` HxW`, with sizes that fit if there are any."""
    some = " or ".join(f"{height}x{width}" for height, width in fitting[:3])
    return f" HxW, such as {some}" if some else " HxW"


def _require_whole_patches(size: tuple[int, int], patch: tuple[int, int], areas: Sequence[int]) -> None:
    """Raise unless every stage's map has whole positions: convolutions would leave the rest of the image out."""
    strides = [edge * 2 ** (len(areas) - 1) for edge in patch]
    if size[0] % strides[0] or size[1] % strides[1]:
        raise ValueError(
            f"input {size[0]}x{size[1]} is no multiple of {strides[0]}x{strides[1]}, the stride of the last stage: "
            f"pass --input-size{_such_as(_fitting_inputs(areas, patch))}"
        )


def _partition(area: int, map_: tuple[int, int], fitting: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the (h, w) of `area` positions: the whole map, or the square that divides it."""
    if map_[0] * map_[1] == area:
        return map_
    edge = math.isqrt(area)
    if not edge or edge * edge != area or map_[0] % edge or map_[1] % edge:
        raise ValueError(
            f"FC3 covers {area} positions; a {map_[0]}x{map_[1]} map does not divide into squares of them: "
            f"pass --input-size{_such_as(fitting)}"
        )
    return edge, edge
