"""The pipeline: the only place that knows the order of the steps. Files are written once, at the end.

    checkpoint → trained → probe → merged → folded → traced → graph → simplified → in its precision → artifacts → bundle

Every value is compared with the probe, that is with the trained network, before the next step uses it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import nn

from repmlp_deploy.bundle import BatchRange, Bundle, Probe, check_output_folder
from repmlp_deploy.card import ModelCard
from repmlp_deploy.convert.assembly import Assembly
from repmlp_deploy.convert.engine_options import EngineOptions, with_profiles
from repmlp_deploy.convert.formats import FORMATS, check_formats, formats_that_need, parse_formats, require_engine
from repmlp_deploy.convert.graph.calibrate import Calibration, read_calibration, take_calibration
from repmlp_deploy.convert.graphs import may_trace_fixed, trace_for, verified_graphs
from repmlp_deploy.convert.job import Graphs, Job, image_preprocessing, of_whole_levels, require_images, taking_images
from repmlp_deploy.convert.memory import release_memory
from repmlp_deploy.convert.options import parse_profiles, whole_range
from repmlp_deploy.convert.proof.certificate import Certifier, batch_sizes
from repmlp_deploy.convert.proof.probe import probe_like, record_probe, run_network
from repmlp_deploy.convert.request import LowPrecision, Request
from repmlp_deploy.convert.source.description import Description
from repmlp_deploy.convert.source.opening import open_source
from repmlp_deploy.convert.source.own_network import Interface
from repmlp_deploy.convert.source.trained import SourceRequest, Trained, find_interface
from repmlp_deploy.convert.step import Tell
from repmlp_deploy.convert.target.accuracy import OpenLabelled, require_one_class_per_image
from repmlp_deploy.convert.target.meeting import Goal, artifact_within, set_goal
from repmlp_deploy.convert.transform import require_merged_modules, transform_and_prove
from repmlp_deploy.errors import InputError
from repmlp_deploy.runtime.choice import with_speeds
from repmlp_deploy.runtime.images import find_images, normalised
from repmlp_deploy.runtime.tasks import find_task

__all__ = ["export"]

PROBED = 8
"""Calibration samples in the probe: int8 is judged on what its ranges are for."""

Progress = Callable[[str], None]


def export(  # noqa: PLR0913 - one per command-line option
    model_or_checkpoint: nn.Module | str | Path,
    *,
    module: str | None = None,
    model: str | None = None,
    example_input: Any = None,
    card: str | Path | ModelCard | None = None,
    formats: str | Sequence[str] = ("onnx",),
    graph: str = "folded",
    merge: str = "auto",
    input: str = "float32",  # noqa: A002 - the word of the command line
    precision: str = "fp32",
    batch: str | int | BatchRange = "1:8:64",
    opset: int | None = None,
    engine: EngineOptions | None = None,
    calibration: str | Path | Mapping[str, NDArray[Any]] | None = None,
    calibration_method: str | None = None,
    keep_fp32: Sequence[str] = (),
    sensitivity: bool = False,
    max_drop: float | None = None,
    labelled: OpenLabelled | None = None,
    weights: str | None = None,
    state_key: str | None = None,
    ignore: Sequence[str] = (),
    input_size: tuple[int, int] | None = None,
    description: Description | None = None,
    out: str | Path | None = None,
    allow_merged: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Merge, prove, export: return a bundle on disk whose every artifact was compared with the trained network.

    Args:
        model_or_checkpoint: a weights file; a network of `get_model`; or, with `example_input`, any module.
        module: `package.module:factory` of the network that the weights file is for, if it is no family's.
        model: `timm:NAME[,key=value…]`, the network of timm that the weights file is for, if names and shapes do not
            tell it; needs the extra `timm`.
        example_input: a tensor, or several by position or name, whose first axis is the batch.
        card: see `load_trained`; for a network of your own, what it says of images, labels and the name.
        formats: of `FORMATS`, as a sequence or comma-separated.
        graph: `folded`, or `merged` for what upstream's own merge leaves.
        merge: `auto` for every structure that can be merged, `blocks` for RepMLP's blocks alone, `regions` for what is
            found in the traced graph alone, `hooks` for the methods of the network's own package, or
            `PACKAGE:FUNCTION`, a function that merges the network.
        input: `float32` for normalised images; `uint8` for graphs that take (N, H, W, C) levels and normalise them.
        precision: of the graph, an entry of `PRECISIONS`.
        batch: `MIN:OPT:MAX`, or one size that is fixed; several, comma-separated, are engines' profiles.
        opset: of the ONNX graph, for older runtimes, by default 20 or the first that the precision needs; before 20,
            GELU is made of other operators.
        engine: how to build engines.
        calibration: for int8, fp8 and fp16: a folder of images, a `.npz`, or arrays (n, …) by the names of the inputs.
        calibration_method: of `CALIBRATION_METHODS`, by default `minmax`.
        keep_fp32: patterns of module or node names that stay in float32, such as `stages.0.*`.
        sensitivity: also measure the error of lowering each block alone.
        max_drop: percentage points of top-1 on `labelled` that int8 or fp8 may lose: blocks return to float32, the most
            sensitive first, until every artifact holds that.
        labelled: the images, as `LabelledFolder(path)`.
        weights: see `load_trained`.
        state_key: see `load_trained`.
        ignore: see `load_trained`.
        input_size: see `load_trained`.
        allow_merged: see `load_trained`.
        description: what you say of images and labels instead of a card.
        out: the bundle's folder, default `artifacts/<name>-<precision>`.
        progress: called with the name of every step as it begins.

    Raises:
        InputError, VerificationError, MissingDependency, MissingDevice, BuildError, OutputError: see `errors`. Nothing
            is written then, and an earlier bundle in `out` is untouched.
    """
    profiles = (batch,) if isinstance(batch, BatchRange) else parse_profiles(batch)
    options = with_profiles(engine or EngineOptions(), profiles if len(profiles) > 1 else ())
    low = LowPrecision(
        precision=precision,
        calibration=calibration,
        asked_method=calibration_method,
        keep_fp32=tuple(keep_fp32),
        sensitivity=sensitivity,
        max_drop=max_drop,
    )
    request = Request(
        formats=parse_formats(formats),
        graph=graph,
        batch=whole_range(profiles),
        engine=options,
        low=low,
        asked_opset=opset,
        merge=merge,
        input=input,
    )
    own = SourceRequest(
        module=module,
        example_input=example_input,
        card=card,
        weights=weights,
        state_key=state_key,
        ignore=tuple(ignore),
        input_size=input_size,
        described=description or Description(),
        allow_merged=allow_merged,
        model=model,
    )
    clock = _Clock(progress)
    request.check()
    if (max_drop is None) != (labelled is None):
        raise InputError("--max-drop POINTS and --eval FOLDER go together: give both, or neither")
    _require_use(request)
    check_formats(request)
    if out is not None:
        check_output_folder(Path(out))
    target = None if out is None else Path(out)
    bundle, target = _made(model_or_checkpoint, own, request, target, labelled, clock)
    with clock.step("save"):
        return with_speeds(bundle).save(target)


def _require_use(request: Request) -> None:
    """Raise InputError if an option is about something that none of the formats has."""
    low, formats = request.low, ",".join(request.formats)
    require_engine(request.engine, request.formats)
    if request.asked_opset is not None and not formats_that_need(request, "fp32", "lowered"):
        raise InputError(f"--opset is about the ONNX graph, of which --format {formats} has none: drop one of them")
    measured = low.sensitivity and low.max_drop is None
    if (measured or low.asked_method is not None) and not formats_that_need(request, "lowered"):
        option = "--sensitivity" if measured else "--calibration-method"
        raise InputError(f"{option} is about the {request.precision} ONNX graph: drop it, or add --format onnx")


def _made(  # noqa: PLR0913 - what an export is of
    source: nn.Module | str | Path,
    own: SourceRequest,
    request: Request,
    out: Path | None,
    labelled: OpenLabelled | None,
    clock: _Clock,
) -> tuple[Bundle, Path]:
    """Return the bundle, in memory, and its folder: the steps, top to bottom."""
    trained = _loaded(source, own, clock)  # here and not in a caller, whose name for it would keep the weights
    target = Path("artifacts", f"{trained.card.name}-{request.precision}") if out is None else out
    check_output_folder(target)
    require_merged_modules(trained, request.graph, request.formats, request.merge)
    interface = find_interface(trained)
    samples = _samples(trained, request, interface, clock)
    if request.input == "uint8":
        require_images(trained, interface)
    probe = _probe(trained, interface, samples, request, clock)
    certifier = Certifier(
        probe,
        batch_sizes(request.batch),
        class_axes=find_task(trained.card.task).class_axes,
        outputs=interface.outputs,
    )
    job = Job(trained, interface, request, samples, certifier, clock.step)
    made = Assembly.begun(probe, trained, samples, certifier.floor_rows())
    goal = None if labelled is None else _goal(job, made, labelled)
    form = transform_and_prove(trained, request.graph, certifier, clock.step, request.merge)
    made = (made if goal is None else made.warning(goal.images.warnings)).after(form)
    for name in formats_that_need(request, "form"):
        made = made.having(name, FORMATS[name].build(name, job, form.value))
    network = form.value.network
    del form
    trained = trained.without_weights()
    job = replace(job, trained=trained)
    release_memory()  # once, not after every step: memory that is taken again costs more than it is worth
    programs, graphs = formats_that_need(request, "trace"), formats_that_need(request, "fp32", "lowered")
    if not programs and not graphs:
        return made.bundle(job, clock.seconds), target
    served, shown = taking_images(job, probe) if request.input == "uint8" else (job, probe)
    fixed = may_trace_fixed(job, program_is_kept=bool(programs))
    traced = trace_for(job, network, fixed=fixed)
    for name in programs:
        made = made.having(name, FORMATS[name].build(name, served, traced))
    if not graphs:
        return made.with_probe(shown).bundle(served, clock.seconds), target
    needs = {"fp32"} if goal is not None else {FORMATS[name].needs for name in graphs}
    proved = verified_graphs(job, network, traced, fixed=fixed, needs=needs, served=served)
    del network, traced
    made = _with_artifacts(made.after_graphs(proved).with_probe(shown), served, graphs, proved.value, goal)
    return made.bundle(served, clock.seconds), target


def _with_artifacts(made: Assembly, job: Job, names: Sequence[str], source: Graphs, goal: Goal | None) -> Assembly:
    """Return what was made with the artifacts that come from a graph."""
    if any(FORMATS[name].copies_weights for name in names):
        release_memory(cycles=True)
    for name in names:
        if goal is None:
            made = made.having(name, FORMATS[name].build(name, job, source))
        else:
            made = made.having(name, artifact_within(name, job, source, goal))
    return made


def _loaded(source: nn.Module | str | Path, own: SourceRequest, clock: _Clock) -> Trained:
    """Return the trained network, of a family or of the user's own."""
    if not isinstance(source, nn.Module | str | os.PathLike):
        raise InputError(
            f"got a {type(source).__name__}; expected a network, a torch.nn.Module, or the path of a weights file"
        )
    with clock.step("load"):
        return open_source(source, own)


def _goal(job: Job, made: Assembly, labelled: OpenLabelled) -> Goal:
    """Return the accuracy that artifacts have to keep, measured on the trained network.

    Raises:
        InputError: the network does not classify, or the images are not of its classes.
    """
    manifest, given, how = made.bundle(job, {}).manifest, job.request.low.calibration, job.preprocessing
    require_one_class_per_image(manifest)
    files = find_images(Path(given)) if isinstance(given, str | Path) and Path(given).is_dir() else []

    def trained(batch: NDArray[Any]) -> NDArray[Any]:
        batch = normalised(batch, how) if how.input == "uint8" else batch
        return run_network(job.trained.network, batch)[0]

    return set_goal(job.request.low.max_drop or 0.0, labelled(manifest, files), trained, job)


def _samples(trained: Trained, request: Request, interface: Interface, clock: _Clock) -> Calibration | None:
    """Return the calibration samples that were given, if any."""
    given, shapes = request.low.calibration, interface.shapes()
    if given is None:
        return None
    with clock.step("read calibration"):
        how = image_preprocessing(trained.card)
        types = {name: x.numpy().dtype for name, x in zip(interface.inputs, interface.examples, strict=True)}
        if isinstance(given, Mapping):
            return take_calibration(given, shapes, how, types)
        return read_calibration(given, shapes, how, types)


def _probe(
    trained: Trained, interface: Interface, samples: Calibration | None, request: Request, clock: _Clock
) -> Probe:
    """Return the inputs that every step runs with, and the trained network's outputs."""
    with clock.step("probe"):
        examples = interface.examples
        inputs = samples.chosen(PROBED) if samples is not None else [probe_like(x.numpy()) for x in examples]
        if request.input == "uint8":
            inputs = [of_whole_levels(values, trained.card.preprocessing) for values in inputs]
        return record_probe(trained.network, *inputs)


_TELL_SECONDS = 5.0


class _Clock:
    """The seconds of every step; tells a progress display as each begins."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[Tell]:
        """Time a part of the work; parts of one name add up. Yield what the part calls to say how far it is."""
        show = self._progress or (lambda _name: None)
        show(name)
        started = told = time.perf_counter()

        def tell(done: int, total: int) -> None:
            nonlocal told
            if done < total and time.perf_counter() - told >= _TELL_SECONDS:
                told = time.perf_counter()
                show(f"{name}: {done} of {total}")

        yield tell
        self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - started, 3)
