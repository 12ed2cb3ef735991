"""Peer: mmpretrain's `inference_model` on its own merged model, an image array a call, preprocessing included."""

from __future__ import annotations

import importlib.util
import time

import numpy as np
from common import answer, arguments, missing

PEER = "mmpretrain inference_model"


def main() -> None:
    """Build, merge, time."""
    options = arguments(__doc__ or "")
    if importlib.util.find_spec("mmpretrain") is None:
        missing(PEER, "mmpretrain")
    import torch  # noqa: PLC0415 - as mmpretrain's environment has it
    from mmpretrain.apis import ImageClassificationInferencer, get_model  # noqa: PLC0415 - may not be installed

    torch.set_num_threads(options.threads)
    picture = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    started = time.perf_counter()
    model = get_model(options.model, pretrained=False, device="cpu")
    model.backbone.switch_to_deploy()
    inferencer = ImageClassificationInferencer(model)
    pictures = [picture] * options.batch
    inferencer(pictures, batch_size=options.batch)
    setup_s = time.perf_counter() - started
    answer(PEER, options, lambda: inferencer(pictures, batch_size=options.batch), setup_s)


if __name__ == "__main__":
    main()
