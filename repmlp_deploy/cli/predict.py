"""`repmlp-predict BUNDLE IMAGE…`: what a bundle says of images."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from repmlp_deploy.cli.shared.console import print_json, print_table, print_warnings, run_command, typer
from repmlp_deploy.errors import InputError, OutputError
from repmlp_deploy.runtime.images import IMAGE_SUFFIXES, find_images
from repmlp_deploy.runtime.predictor import Predictor
from repmlp_deploy.runtime.tasks import find_task
from repmlp_deploy.text import printable

__all__ = ["main"]


def main() -> None:
    """Run the command of this process."""
    run_command(predict_command)


def predict_command(  # noqa: PLR0913 - one per option
    bundle: Annotated[Path, typer.Argument(help="The folder that repmlp-export wrote.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, and folders of them.")],
    artifact: Annotated[str | None, typer.Option("--format", help="Artifact; default: the best here.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, tensorrt or rtx; default: the best here.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of one inference.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for compiled int8 models; the next start is quicker."),
    ] = None,
    decode: Annotated[
        str,
        typer.Option(help="exact, or fast: decode large JPEG files at a fraction of their size; some levels differ."),
    ] = "exact",
    streams: Annotated[
        str,
        typer.Option(
            metavar="latency|throughput|N", help="Inferences at a time; throughput: measure which number is best."
        ),
    ] = "latency",
    top: Annotated[int, typer.Option(help="Classes to show.")] = 1,
    out: Annotated[Path | None, typer.Option(help="segment: folder for NAME-mask.png and NAME-overlay.png.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Run the probe first; exit 3 if it fails.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Run a bundle on images, and print classes, masks or embeddings."""
    if top < 1:
        raise InputError(f"--top is {top}; it must be at least 1")
    files = _files(images)
    how = {"format": artifact, "device": device, "threads": threads, "cache": cache, "decode": decode}
    with Predictor(bundle, **how, streams=streams) as predictor:  # type: ignore[arg-type]
        for name, why in predictor.details.get("passed_over", {}).items():
            sys.stderr.write(f"note: the {name} artifact was passed over: {printable(why)}\n")
        print_warnings(predictor.warnings)
        if check:
            predictor.self_check()
        show = _SHOWN.get(predictor.manifest.task)
        if show is None:
            raise InputError(f"{predictor.manifest.name} {find_task(predictor.manifest.task).refusal}")
        if out is not None and show is not _show_segmentations:
            raise InputError(f"--out keeps masks; {predictor.manifest.name} is made to {predictor.manifest.task}")
        shown = show(_Answers(files, predictor(files), predictor.labels, top, out))
        title = f"{predictor.manifest.name}, {predictor.format} on {predictor.device}"
        about = {"bundle": str(bundle), "format": predictor.format, "device": predictor.device}
        about |= {key: predictor.details[key] for key in ("chosen", "streams_chosen") if key in predictor.details}
    if json:
        print_json({**about, "predictions": shown.report})
    else:
        print_table(title, shown.columns, shown.rows, left=2)


def _files(given: Sequence[Path]) -> list[Path]:
    """Return the files that were named, and the images in the folders among them, in sorted order."""
    found: list[Path] = []
    for path in given:
        if not os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises where a name is too long
            found.append(path)
            continue
        inside = find_images(path)
        if not inside:
            raise InputError(f"{path} holds no images; expected {', '.join(IMAGE_SUFFIXES)} files")
        found += inside
    return found


@dataclass(frozen=True)
class _Answers:
    """The predictions for images, and what to show of them."""

    images: Sequence[Path]
    answers: Sequence[Any]
    labels: Sequence[str] | None
    top: int
    out: Path | None

    def name(self, label: int) -> str:
        return str(label) if self.labels is None else self.labels[label]


@dataclass(frozen=True)
class _Shown:
    """Answers for a table and for JSON."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    report: list[dict[str, Any]]


def _show_predictions(said: _Answers) -> _Shown:
    tops = [[(said.name(label), label, score) for label, score in answer.top(said.top)] for answer in said.answers]
    pairs = list(zip(said.images, tops, strict=True))
    return _Shown(
        ("image", "class", "score"),
        [(str(path), name, f"{score:.4f}") for path, best in pairs for name, _, score in best],
        [
            {
                "image": str(path),
                "top": [{"label": label, "class": name, "score": score} for name, label, score in best],
            }
            for path, best in pairs
        ],
    )


def _show_segmentations(said: _Answers) -> _Shown:
    if said.out is not None and len({path.stem for path in said.images}) < len(said.images):
        raise InputError("--out names masks after their images, and two of these have one name: run them apart")
    rows, report = [], []
    for path, answer in zip(said.images, said.answers, strict=True):
        shares = [(said.name(label), label, share) for label, share in answer.shares()]
        rows += [(str(path), name, f"{100 * share:.2f} %") for name, _, share in shares]
        about = {"image": str(path), "size": list(answer.mask.shape)}
        about["classes"] = [{"label": label, "class": name, "share": share} for name, label, share in shares]
        if said.out is not None:
            about |= _save_mask(said.out, path, answer)
        report.append(about)
    return _Shown(("image", "class", "share of pixels"), rows, report)


def _save_mask(out: Path, path: Path, answer: Any) -> dict[str, str]:
    """Write the mask and the overlay of one image; their paths."""
    made = {"mask": out / f"{path.stem}-mask.png", "overlay": out / f"{path.stem}-overlay.png"}
    try:
        out.mkdir(parents=True, exist_ok=True)
        answer.mask_image().save(made["mask"])
        answer.overlay(path).save(made["overlay"])
    except OSError as error:
        raise OutputError(f"could not write to {out}: {error.strerror or error}") from None
    return {kind: str(file) for kind, file in made.items()}


def _show_embeddings(said: _Answers) -> _Shown:
    first = said.answers[0]
    cosines = [first.similarity(answer) for answer in said.answers]
    return _Shown(
        ("image", "compared with", "cosine"),
        [(str(path), str(said.images[0]), f"{c:.4f}") for path, c in zip(said.images, cosines, strict=True)],
        [
            {"image": str(path), "embedding": answer.vector.tolist(), "similarity_to_first": cosine}
            for path, answer, cosine in zip(said.images, said.answers, cosines, strict=True)
        ],
    )


_SHOWN: dict[str, Callable[[_Answers], _Shown]] = {
    "classify": _show_predictions,
    "segment": _show_segmentations,
    "embed": _show_embeddings,
}
"""Task to how its answers are shown."""
