"""`get_model` and `inference_model`, with the names and behaviour that mmpretrain's users know.

model = get_model("repmlp-base_3rdparty_8xb64_in1k", pretrained=True)
model.switch_to_deploy()
inference_model(model, "bird.jpg")["pred_class"]
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import numpy as np
import torch
from torch import nn

from repmlp_deploy.bundle import hash_file
from repmlp_deploy.card import ModelCard, data_root, load_card, load_labels
from repmlp_deploy.convert.source.trained import load_trained
from repmlp_deploy.errors import CardError, InputError
from repmlp_deploy.files import cache_folder
from repmlp_deploy.nets.families import build_network
from repmlp_deploy.runtime.images import ImageLike, preprocess, to_image
from repmlp_deploy.runtime.tasks import predictions_from_logits

__all__ = ["cache_folder", "download_weights", "get_model", "inference_model"]


def get_model(
    name: str | ModelCard, pretrained: bool | str | os.PathLike[str] = False, *, progress: bool = True
) -> nn.Module:
    """Build the network of a card, in evaluation mode, with its card in `model.card`.

    Args:
        name: a card in `models/`, or the path of one.
        pretrained: False for fresh weights; the path of a checkpoint; or True for the card's own weights, which are
            downloaded once, checked against the card's SHA-256, and kept in `cache_folder()`.
        progress: show the download.

    Raises:
        CardError: there is no such card, or it names no weights.
        CheckpointError: the weights do not fit.
        InputError: the download failed.
    """
    card = name if isinstance(name, ModelCard) else load_card(name)
    if pretrained is False:
        model = build_network(card)
    else:
        path = _own_weights(card, progress=progress) if pretrained is True else Path(pretrained)
        model = load_trained(path, card, allow_merged=True).network
    model.card = card  # type: ignore[assignment]
    return model


@torch.no_grad()
def inference_model(model: nn.Module | str, image: ImageLike) -> dict[str, Any]:
    """Return what a network of `get_model` predicts for one image, in mmpretrain's terms.

    Args:
        model: the network; or a card's name, for its pretrained weights.
        image: a path, the bytes of a file, a Pillow image, or an (H, W, 3) uint8 array in BGR order, as OpenCV reads
            and mmpretrain expects it. (`Predictor` takes RGB unless told otherwise.)

    Returns:
        `pred_label` int, `pred_score` float, `pred_scores` (classes,) float32, and `pred_class` str where the classes
        have names.
    """
    network = get_model(model, pretrained=True) if isinstance(model, str) else model
    card = getattr(network, "card", None)
    if not isinstance(card, ModelCard):
        raise InputError(f"{type(network).__name__} carries no card: make it with get_model(), or set model.card")
    if card.task != "classify":
        raise InputError(f"{card.name} is made to {card.task}; inference_model classifies: export it and use Predictor")
    inputs = preprocess(to_image(image, array_order="BGR"), card.preprocessing)
    logits = network(torch.from_numpy(inputs[None])).numpy()
    prediction = predictions_from_logits(np.asarray(logits, np.float32), load_labels(card), card.scores)[0]
    result = {key: prediction[key] for key in prediction.keys()}  # noqa: SIM118 - keys() is the mapping protocol
    if prediction.pred_class is None:
        del result["pred_class"]
    return result


def download_weights(card: ModelCard, *, progress: bool = True) -> Path:
    """Return the card's weights on this disk; download them if they are not there.

    A download goes to a temporary file, is checked against the card's SHA-256, and only then takes its name. A file
    that is there is checked too, and downloaded again if it is another.

    Raises:
        CardError: the card names no download.
        InputError: the network is not there, or the file is not what the card says.
    """
    if card.weights is None or card.weights.url is None:
        raise CardError(f"{card.name} names no weights to download: pass pretrained='path/to/weights.pth'")
    url, prefix = card.weights.url, card.weights.sha256_prefix or ""
    published = Path(urlparse(url).path)
    # the digest is part of the name: several cards may publish a "weights.pth"
    name = published.name if prefix in published.stem else f"{published.stem}-{prefix}{published.suffix}"
    target = cache_folder() / name
    try:
        if target.is_file() and hash_file(target).startswith(prefix):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), hash_prefix=prefix, progress=progress)
    except (URLError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            f"could not download {url}: {reason}; fetch it on a machine with a network, "
            f"then pass pretrained='path/to/{published.name}'"
        ) from None
    except RuntimeError as error:  # the hash
        raise InputError(f"{url} is not what {card.name} names: {error}") from None
    except OSError as error:
        raise InputError(f"could not keep {url} in {target.parent}: {error.strerror or error}") from None
    return target


def _own_weights(card: ModelCard, *, progress: bool) -> Path:
    if card.weights is not None and card.weights.file is not None:
        return data_root() / card.weights.file
    return download_weights(card, progress=progress)
