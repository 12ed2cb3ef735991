"""This project, for the peers to be held against: the folded ONNX graph in ONNX Runtime, exported and verified."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from common import answer, arguments, images

from repmlp_deploy import Predictor, export, load_card
from repmlp_deploy.bench.subjects.seeding import seeded_network


def main() -> None:
    """Export, load, time."""
    options = arguments(__doc__ or "")
    card = load_card(options.model)
    inputs = images(options.batch, (3, *card.input_size))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="repmlp-peer-") as folder:
        bundle = export(seeded_network(card), card=card, batch=f"1:8:{max(8, options.batch)}", out=Path(folder, "b"))
        with Predictor(bundle, device="cpu", threads=options.threads) as predictor:
            setup_s = time.perf_counter() - started
            answer("repmlp-deploy, onnx", options, lambda: predictor.logits(inputs), setup_s)


if __name__ == "__main__":
    main()
