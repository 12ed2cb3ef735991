"""Classify a folder of images into a CSV file, a few hundred at a time; a row per image, also for unreadable ones.

python examples/batch_job.py BUNDLE FOLDER FILE.csv
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from repmlp_deploy import Predictor, RepMLPError

AT_A_TIME = 256


def classified(predictor: Predictor, images: list[Path]) -> Iterator[tuple[str, str, str]]:
    """Yield the name, the class and the error of every image; one unreadable image does not cost the others."""
    try:
        answers: list[Any] = predictor(images)
    except RepMLPError as error:
        if len(images) == 1:
            yield images[0].name, "", str(error)
            return
        for image in images:
            yield from classified(predictor, [image])
        return
    for image, answer in zip(images, answers, strict=True):
        yield image.name, str(answer.pred_class), ""


def main(bundle: str, folder: str, out: str) -> None:
    """Write the file, and print how many images were read."""
    images = sorted(path for path in Path(folder).iterdir() if path.is_file())
    failed = 0
    with Predictor(bundle, check=True) as predictor, Path(out).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("image", "class", "error"))
        for start in range(0, len(images), AT_A_TIME):
            for row in classified(predictor, images[start : start + AT_A_TIME]):
                table.writerow(row)
                failed += bool(row[2])
    print(f"{len(images)} images, {failed} unreadable")


if __name__ == "__main__":
    main(*sys.argv[1:])
