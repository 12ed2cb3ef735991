"""What the model that takes encoded images adds to a network: its input, and what the task makes of the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from repmlp_deploy.bundle import Manifest
from repmlp_deploy.serving.codec import decode_base64
from repmlp_deploy.serving.protocol import BadRequest, InferRequest, Tensor, TensorMetadata, UnknownModel, byte_array

__all__ = ["IMAGE_INPUT", "IMAGE_OUTPUTS", "encoded_images", "find_image_outputs"]

IMAGE_INPUT = TensorMetadata("image", "BYTES", (-1,))

_MASK_PIXELS = 1 << 25  # of all masks of a request; a photograph of 33 megapixels takes seconds and 0.7 GB
_IMAGES = 64  # of one request, where the largest batch is smaller


@dataclass(frozen=True)
class ImageOutputs:
    """What the model that takes images adds to the raw output, for one task.

    Attributes:
        metadata: of the additional outputs.
        tensors: from the task's answers to these outputs.
        sized: whether an answer is as large as its image, and takes as long.
    """

    metadata: Sequence[TensorMetadata]
    tensors: Callable[[Sequence[Any]], Sequence[Tensor]]
    sized: bool = False

    def parts(self, sizes: Sequence[tuple[int, int]]) -> list[slice]:
        """Return which images to answer together: those of a part take a short time.

        Args:
            sizes: (height, width) of the images.

        Raises:
            BadRequest: the answers would be too large.
        """
        if not self.sized:
            return [slice(0, len(sizes))]
        pixels = sum(height * width for height, width in sizes)
        if pixels > _MASK_PIXELS:
            raise BadRequest(f"the masks of these images have {pixels} pixels; a request may have {_MASK_PIXELS}")
        return [slice(i, i + 1) for i in range(len(sizes))]


def _classes(answers: Sequence[Any]) -> Sequence[Tensor]:
    return [
        Tensor("label", "BYTES", byte_array([(answer.pred_class or "").encode() for answer in answers])),
        Tensor("index", "INT64", np.array([answer.pred_label for answer in answers], np.int64)),
        Tensor("score", "FP32", np.array([answer.pred_score for answer in answers], np.float32)),
    ]


def _masks(answers: Sequence[Any]) -> Sequence[Tensor]:
    return [Tensor("mask", "BYTES", byte_array([answer.mask_png() for answer in answers]), encoded=True)]


def _vectors(answers: Sequence[Any]) -> Sequence[Tensor]:
    return [Tensor("vector", "FP32", np.stack([answer.vector for answer in answers]))]


IMAGE_OUTPUTS: Mapping[str, ImageOutputs] = MappingProxyType(
    {
        "classify": ImageOutputs(
            (
                TensorMetadata("label", "BYTES", (-1,)),
                TensorMetadata("index", "INT64", (-1,)),
                TensorMetadata("score", "FP32", (-1,)),
            ),
            _classes,
        ),
        "segment": ImageOutputs((TensorMetadata("mask", "BYTES", (-1,)),), _masks, sized=True),
        "embed": ImageOutputs((TensorMetadata("vector", "FP32", (-1, -1)),), _vectors),
    }
)
"""Task to what its images become, besides the raw output. A task that is missing has no model for images."""


def find_image_outputs(name: str, manifest: Manifest) -> ImageOutputs:
    """Return what images become.

    Raises:
        UnknownModel: the task makes nothing of images, or nobody said how the network takes them.
    """
    found = IMAGE_OUTPUTS.get(manifest.task)
    if found is None or len(manifest.inputs) > 1 or len(manifest.outputs) > 1:
        raise UnknownModel(f"no model is named {name!r}: {manifest.name} takes tensors only")
    return found


def encoded_images(request: InferRequest, largest: int) -> list[bytes]:
    """Return the encoded images of a request.

    Args:
        request: of the model that takes images.
        largest: the network's largest batch.

    Raises:
        BadRequest: it holds something else, or too many.
    """
    most = max(_IMAGES, largest)
    if request.raw is not None:
        return [bytes(request.raw)]
    if len(request.inputs) != 1 or request.inputs[0].name != IMAGE_INPUT.name:
        raise BadRequest(f"the model takes one input, {IMAGE_INPUT.name}")
    tensor = request.inputs[0]
    if tensor.datatype != "BYTES" or tensor.data.ndim not in (1, 2):  # (N, 1): what clients make of a batch
        raise BadRequest(f"{IMAGE_INPUT.name} must be BYTES of shape [N], one encoded image each")
    if not 0 < tensor.data.size <= most:
        raise BadRequest(f"{tensor.data.size} images; the model takes 1 to {most} at a time")
    return list(decode_base64(tensor).data.reshape(-1))
