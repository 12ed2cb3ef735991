"""Export a trained checkpoint, and classify images with the bundle.

python examples/export_and_predict.py [CHECKPOINT IMAGE...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from repmlp_deploy import Predictor, export

MODELS = Path("models")


def main(checkpoint: Path, images: list[Path]) -> None:
    """Write `artifacts/example` and print what it says of every image."""
    bundle = export(checkpoint, formats="onnx", out="artifacts/example")
    compared = [row for row in bundle.manifest.certificate if row.passed is not None]
    print(f"{bundle.manifest.name}: equal to the trained network, in {len(compared)} comparisons")
    with Predictor(bundle.folder) as predictor:
        for image, answer in zip(images, predictor(images), strict=True):
            print(f"{image}: {answer.pred_class}")


if __name__ == "__main__":
    given = [Path(word) for word in sys.argv[1:]]
    main(
        given[0] if given else MODELS / "weights" / "repmlp-digits.safetensors",
        given[1:] or sorted((MODELS / "samples" / "digits").glob("*.png")),
    )
