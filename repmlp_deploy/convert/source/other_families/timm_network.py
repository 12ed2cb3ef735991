"""Networks of timm by name: how they are built, how they take images, and what their classes are called.

Nothing is downloaded: weights come from a file of the user's. What timm says of its own weights, in `pretrained_cfg`,
describes how such a network takes images; whether it is true of the user's weights, only the user knows.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from repmlp_deploy.card import ModelCard, Preprocessing, Resize
from repmlp_deploy.convert.capture import captured_output
from repmlp_deploy.convert.options import parse_model
from repmlp_deploy.convert.source.own_network import Interface, default_card
from repmlp_deploy.errors import InputError, MissingDependency, optional_imports
from repmlp_deploy.text import first_line, kind_and_line

try:
    with optional_imports(), captured_output("timm"):
        import timm
except RuntimeError as error:  # a torchvision for another PyTorch cannot register its operators
    remedy = f"install the torchvision that belongs to PyTorch {torch.__version__}, from the same place as PyTorch"
    raise MissingDependency("torchvision", "timm", first_line(error), remedy) from None

__all__ = ["TimmNetwork", "fitting_models", "make_timm_network"]

_LEVELS = 255.0
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
_IMAGENET_CLASSES = 1000
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class TimmNetwork:
    """A network of timm, without weights of its own.

    Attributes:
        name: as timm has it, with the tag of its weights if one was given.
        network: in evaluation mode.
        input_size: (H, W) that it takes.
        channels: of an image.
        preprocessing: what timm says of its own weights; None where a card cannot say it.
        labels: class names, or the name of their list; None if timm does not say.
    """

    name: str
    network: nn.Module
    input_size: tuple[int, int]
    channels: int
    preprocessing: Preprocessing | None
    labels: tuple[str, ...] | str | None

    def described(self, interface: Interface, *, names_in_file: bool) -> tuple[ModelCard, str, tuple[str, ...]]:
        """Return the card, whose preprocessing it assumes, and what to say of it.

        Args:
            interface: how the network is called.
            names_in_file: the weights file names the classes itself.
        """
        classifies = bool(interface.classes) and interface.classes == getattr(self.network, "num_classes", None)
        card = default_card(self.network, interface, with_images=classifies)
        labels = self.labels if classifies and not names_in_file else None
        card = card.model_copy(
            update={
                "name": re.sub(r"[^A-Za-z0-9._-]", "-", self.name),
                "labels": labels,
                "preprocessing": self.preprocessing or card.preprocessing,
                "input_size": self.input_size,
            }
        )
        said = f"class names: those of timm's own weights of {self.name}; --labels FILE gives others"
        assumed = "ImageNet" if self.preprocessing is None else f"timm's own weights of {self.name}"
        return card, assumed, () if labels is None else (said,)


def make_timm_network(model: str, input_size: tuple[int, int] | None = None) -> TimmNetwork:
    """Build a network of timm.

    Args:
        model: `timm:NAME[,key=value…]`, as `parse_model` reads it.
        input_size: (H, W); by default timm's own, or the `img_size` among the arguments.

    Raises:
        InputError: timm has no such network, or it cannot be built with these arguments.
    """
    name, arguments = parse_model(model)
    if not timm.is_model(name):
        raise InputError(f"--model {model}: timm {timm.__version__} has no {name}{_near(name)}")
    try:
        with captured_output("timm"):
            network = timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # noqa: BLE001 - a constructor of another package raises anything
        raise InputError(f"--model {model}: timm cannot build it: {kind_and_line(error)}") from None
    about: Mapping[str, Any] = dict(getattr(network, "pretrained_cfg", None) or {})
    size = input_size or _size(about, arguments)
    channels = int(arguments.get("in_chans", about.get("input_size", (3,))[0]))
    classes = getattr(network, "num_classes", None)
    preprocessing, labels = _preprocessing(about, size, channels), _labels(about, classes)
    return TimmNetwork(name, network.eval(), size, channels, preprocessing, labels)


def fitting_models(shapes: Mapping[str, Sequence[int]], pattern: str) -> list[str]:
    """Return the networks of timm whose weights have these names and shapes, as `timm:NAME[,key=value…]`.

    Networks are built without memory for weights, each with as many classes and channels as the shapes say.

    Args:
        shapes: key under timm's name to shape; what begins every key is taken off.
        pattern: of the names that are tried, as in a shell.
    """
    given = {key: tuple(shape) for key, shape in shapes.items() if not key.endswith(_COUNTER)}
    found = (_fitting_model(name, given) for name in timm.list_models(pattern))
    return [model for model in found if model is not None]


def _fitting_model(name: str, given: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return `timm:NAME[,key=value…]` if the weights of this network are the given ones, else None."""
    about = timm.get_pretrained_cfg(name)
    first, head = (f"{_first(names)}.weight" for names in (about.first_conv, about.classifier))
    starts = (key.removesuffix(first) for key in given if key.endswith(f".{first}"))
    start = "" if first in given else next(starts, "")
    own = {key.removeprefix(start): shape for key, shape in given.items() if key.startswith(start)}
    usual = {"num_classes": about.num_classes, "in_chans": about.input_size[0]}
    found = {"num_classes": own.get(head, (0,))[0], "in_chans": own[first][1] if len(own.get(first, ())) > 1 else 0}
    try:
        with captured_output("timm"), torch.device("meta"):
            network = timm.create_model(name, pretrained=False, **found)
    except Exception:  # noqa: BLE001 - a constructor of another package raises anything, here for odd shapes
        return None
    expected = {key: tuple(x.shape) for key, x in network.state_dict().items() if not key.endswith(_COUNTER)}
    if own != expected:
        return None
    return ",".join([f"timm:{name}", *(f"{key}={value}" for key, value in found.items() if value != usual[key])])


def _first(names: str | Sequence[str] | None) -> str:
    """Return the name of a layer; of several, the first."""
    return names if isinstance(names, str) else next(iter(names or ()), "")


def _near(name: str) -> str:
    near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def _size(about: Mapping[str, Any], arguments: Mapping[str, Any]) -> tuple[int, int]:
    given = arguments.get("img_size")
    if given is not None:
        return (given, given) if isinstance(given, int) else (int(given[0]), int(given[1]))
    _, height, width = about.get("input_size", (3, 224, 224))
    return int(height), int(width)


def _preprocessing(about: Mapping[str, Any], size: tuple[int, int], channels: int) -> Preprocessing | None:
    """Return timm's evaluation transform as a card says it; None for those that resize in a way that no card has.

    The image is resized to size / crop_pct, rounded down, and its centre cropped: with `center` the shorter edge has
    that length, with `squash` both edges have theirs.
    """
    mean, std = (tuple(float(v) for v in about.get(key, ())) for key in ("mean", "std"))
    percent, mode = float(about.get("crop_pct") or 1.0), about.get("crop_mode") or "center"
    interpolation = about.get("interpolation", "bicubic")
    height, width = (math.floor(edge / percent) for edge in size)
    shown = mode == "squash" or (mode == "center" and height == width)
    if not mean or not shown or interpolation not in _INTERPOLATIONS:
        return None
    if channels != len(mean):
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return Preprocessing(
        resize=Resize(mode="exact" if mode == "squash" else "short-edge", size=(height, width)),
        crop=None if (height, width) == size and mode == "squash" else size,
        mean=tuple(value * _LEVELS for value in mean),
        std=tuple(value * _LEVELS for value in std),
        interpolation=interpolation,
    )


def _labels(about: Mapping[str, Any], classes: int | None) -> tuple[str, ...] | str | None:
    """Return the names of the classes that timm's weights have, if the network has as many."""
    if classes != about.get("num_classes"):
        return None
    names = about.get("label_names")
    if names:
        return tuple(str(name) for name in names)
    trained_on = re.search(r"(?:^|_)in1k", str(about.get("tag", "")))
    return "imagenet-1k" if classes == _IMAGENET_CLASSES and trained_on else None
