"""`repmlp-eval BUNDLE --data FOLDER`: how good a bundle is on labelled data."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from repmlp_deploy.bundle import Bundle, hash_file
from repmlp_deploy.cli.shared.console import (
    print_json,
    print_line,
    print_table,
    print_warnings,
    run_command,
    typer,
)
from repmlp_deploy.cli.shared.progress import counting
from repmlp_deploy.errors import InputError, optional_imports
from repmlp_deploy.evaluation.datasets import Dataset, read_dataset
from repmlp_deploy.evaluation.judging import TRAINED, Engine, Run
from repmlp_deploy.evaluation.loop import (
    Evaluation,
    discard_state,
    evaluate,
    state_folder,
    state_key,
)
from repmlp_deploy.reading import require_file
from repmlp_deploy.runtime.images import normalised
from repmlp_deploy.runtime.predictor import Predictor
from repmlp_deploy.text import printable

__all__ = ["main"]

_SHARES = ("top1", "top5", "mean_iou", "pixel_accuracy", "accuracy", "deviation")


def main() -> None:
    """Run the command of this process."""
    run_command(eval_command)


def eval_command(  # noqa: PLR0913 - one per option
    bundle: Annotated[Path, typer.Argument(help="The folder that repmlp-export wrote.")],
    data: Annotated[Path, typer.Option(help="Class folders, images/ and masks/, or a list file.")],
    formats: Annotated[
        str | None, typer.Option("--format", help="Artifacts, comma-separated; default: the best here.")
    ] = None,
    ckpt: Annotated[
        Path | None, typer.Option(help="The trained checkpoint: score it too, and count agreement with it.")
    ] = None,
    card: Annotated[str | None, typer.Option(help="Its card, if models/ has none of the bundle's name.")] = None,
    module: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE.MODULE:FACTORY", help="Function that returns the network, if it is your own."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, tensorrt or rtx; default: the best here.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of one inference.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per batch; default: the bundle's best.")] = None,
    engine: Annotated[str, typer.Option(help="local: this process; ray: actors, on RAY_ADDRESS or here.")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Threads that decode images, default one per CPU; or actors of Ray.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="State file: the same command continues an interrupted run.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again; discard what an earlier run has done.")] = False,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Count unreadable images instead of stopping.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Score a bundle on labelled data: accuracy, intersection over union, or verification of faces."""
    for option, value in (("--batch", batch), ("--workers", workers)):
        if value is not None and value < 1:
            raise InputError(f"{option} is {value}; it must be at least 1")
    if engine not in {"local", "ray"}:
        raise InputError(f"--engine is {printable(engine)}; expected local or ray")
    origin = _origin(ckpt, card, module)
    loaded = Bundle.load(bundle)
    print_warnings(loaded.manifest.warnings)
    dataset = read_dataset(data, loaded.manifest)
    print_warnings(dataset.warnings)
    wanted = [None] if formats is None else list(dict.fromkeys(part.strip() for part in formats.split(",")))
    with ExitStack() as stack:
        predictors = [
            stack.enter_context(Predictor(loaded, format=name, device=device, threads=threads)) for name in wanted
        ]
        runs: dict[str, Run] = {predictor.format: predictor.logits for predictor in predictors}
        trained = None if origin is None else origin.run(loaded)
        about_it = "" if origin is None or trained is None else origin.identity(loaded, trained)
        key = state_key(loaded.manifest, tuple(runs), dataset, trained=about_it)
        if trained is not None:
            runs[TRAINED] = trained
        file = state if state is not None else state_folder() / f"{key[:32]}.json"
        if fresh:
            discard_state(file)
        how: dict[str, Any] = {"batch": batch, "workers": workers, "skip_unreadable": skip_unreadable}
        if engine == "ray":
            names = [predictor.format for predictor in predictors]
            opened = partial(_opened, bundle.resolve(), names, device, threads or 1, origin)
            how |= {"workers": None, "engine": _judges(opened, device, threads, workers)}
        found = _evaluated(runs, loaded, dataset, file, key, how)
    about = {"bundle": str(bundle), "task": loaded.manifest.task, "data": str(data), "read": dataset.remark}
    about["devices"] = {predictor.format: predictor.device for predictor in predictors}  # type: ignore[assignment]
    if json:
        counts = {"count": found.count, "resumed": found.resumed, "unreadable": list(found.unreadable)}
        print_json({**about, **counts, "seconds": round(found.seconds, 3), "scores": dict(found.scores)})
    else:
        _print_scores(loaded.manifest.name, found, loaded.manifest.labels)
        print_line(f"{data}: {dataset.remark}")


@dataclass(frozen=True)
class _Origin:
    """The trained network that a bundle is compared with; can be sent to another process.

    Attributes:
        ckpt: its checkpoint, a path from the root.
        card: see `load_origin`.
        module: see `load_origin`.
    """

    ckpt: Path
    card: str | None
    module: str | None

    def identity(self, bundle: Bundle, run: Run) -> str | tuple[str, str]:
        """Return what tells this network from others, as JSON can hold it.

        A card or a factory may be edited between two runs, so its outputs on the bundle's probe tell.
        """
        digest = hash_file(self.ckpt)
        if self.card is None and self.module is None:
            return digest
        return digest, hashlib.sha256(run(bundle.probe().inputs).tobytes()).hexdigest()

    def run(self, bundle: Bundle) -> Run:
        """Return the network, in float32.

        Raises:
            InputError: it takes other images than the bundle (CheckpointError among them: it cannot be read).
        """
        import torch  # noqa: PLC0415 - only with --ckpt

        from repmlp_deploy.convert.proof.probe import run_network  # noqa: PLC0415 - loads torch
        from repmlp_deploy.convert.rework.locate import load_origin  # noqa: PLC0415 - loads torch

        trained = load_origin(bundle, self.ckpt, self.card, self.module)
        network, takes = trained.network, bundle.manifest.image_size
        fits = trained.card.input_size == takes and trained.card.task == bundle.manifest.task
        if not fits and trained.interface is None:  # a network of one's own was called with the bundle's inputs
            size, wanted = "x".join(map(str, trained.card.input_size)), "x".join(map(str, takes))
            raise InputError(
                f"--ckpt {self.ckpt} is made to {trained.card.task} {size} images; {bundle.manifest.name} to "
                f"{bundle.manifest.task} {wanted}: give the checkpoint that the bundle was made from"
            )
        how = bundle.manifest.preprocessing

        def run(batch: Any) -> Any:
            batch = normalised(batch, how) if how.input == "uint8" else batch
            with torch.no_grad():
                return np.asarray(run_network(network, batch)[0], np.float32)

        return run


def _origin(ckpt: Path | None, card: str | None, module: str | None) -> _Origin | None:
    """Return the trained network that was named, if there is one.

    Raises:
        InputError: its checkpoint is not there, or none was given.
    """
    if ckpt is None:
        for option, value in (("--card", card), ("--module", module)):
            if value is not None:
                raise InputError(f"{option} is about the trained network: pass --ckpt FILE, too")
        return None
    require_file(ckpt, f"--ckpt {ckpt}")
    return _Origin(ckpt.resolve(), card, module)


def _opened(
    bundle: Path, formats: Sequence[str], device: str | None, threads: int, origin: _Origin | None
) -> dict[str, Run]:
    """Return what runs the artifacts of a bundle and its checkpoint: for an actor, which keeps them open."""
    loaded = Bundle.load(bundle)
    runs: dict[str, Run] = {
        name: Predictor(loaded, format=name, device=device, threads=threads, check=True).logits for name in formats
    }
    return runs if origin is None else runs | {TRAINED: origin.run(loaded)}


def _judges(
    opened: Callable[[], Mapping[str, Run]], device: str | None, threads: int | None, workers: int | None
) -> Engine:
    """Return the engine `ray`.

    Raises:
        MissingDependency: it is not installed.
    """
    with optional_imports():
        from repmlp_deploy.evaluation.ray_engine import Judges  # noqa: PLC0415 - needs the extra `ray`
    return Judges(opened, threads=threads or 1, gpus=0 if device in {None, "cpu"} else 1, count=workers)


def _evaluated(  # noqa: PLR0913 - what an evaluation is of, and where it can go on
    runs: dict[str, Run], bundle: Bundle, dataset: Dataset, file: Path, key: str, how: dict[str, Any]
) -> Evaluation:
    """Run the evaluation with a progress display; after an interruption, say where it can go on."""
    try:
        with counting() as count, redirect_stdout(sys.stderr):  # Ray prints what its processes suffer

            def show(done: int, total: int, scores: Mapping[str, Any]) -> None:
                count(done, total, _brief(scores))

            return evaluate(runs, bundle.manifest, dataset, state_file=file, key=key, progress=show, **how)
    except KeyboardInterrupt:
        sys.stderr.write(f"note: run the same command again to go on from {printable(file)}\n")
        raise


def _brief(scores: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {100 * value:.2f} %" for name, value in scores.items())


def _print_scores(title: str, found: Evaluation, labels: tuple[str, ...] | None) -> None:
    """Print the table of scores, the scores of classes if there are any, and the notes."""
    first = next(iter(found.scores.values()))
    columns = [name for name in (*_SHARES, "threshold", "agreement") if any(name in s for s in found.scores.values())]
    rows = [(name, *(_cell(column, scores.get(column)) for column in columns)) for name, scores in found.scores.items()]
    print_table(title, ("artifact", *columns), rows)
    if "iou" in first:
        names = labels or tuple(map(str, range(len(first["iou"]))))
        shown = [(name, *(_cell("iou", s["iou"][i]) for s in found.scores.values())) for i, name in enumerate(names)]
        print_table("IoU", ("class", *found.scores), shown)
    print_line(f"{found.count} samples, {found.resumed} of them from an earlier run, {found.seconds:.1f} s")
    if found.unreadable:
        print_line(f"note: {len(found.unreadable)} unreadable, such as {found.unreadable[0]}")


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if column == "threshold" else f"{100 * value:.2f} %"
