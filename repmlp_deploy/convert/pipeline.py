"""The pipeline: the only place that knows the order of the steps. Files are written once, at the end.

    checkpoint → trained → probe → merged → folded → traced → graph → simplified → in its precision → engine → bundle

Every value is compared with the probe, that is with the trained network, before the next step uses it.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn

import repmlp_deploy
from repmlp_deploy.bundle import (
    PROBE,
    ArtifactEntry,
    BatchRange,
    Bundle,
    FileEntry,
    Hop,
    Manifest,
    Probe,
    TensorSpec,
    Verdict,
    check_output_folder,
)
from repmlp_deploy.card import ModelCard, load_labels
from repmlp_deploy.convert.diagnosis.bisect import blame_graph, said_by_runtime
from repmlp_deploy.convert.diagnosis.blame import Blame, blame_network, blamed, describe_blame
from repmlp_deploy.convert.formats.tensorrt.build import GraphSpec, build_engine, kept_products
from repmlp_deploy.convert.formats.tensorrt.flavours import FLAVOURS, check_options
from repmlp_deploy.convert.formats.tensorrt.options import EngineOptions, with_profiles
from repmlp_deploy.convert.graph.calibrate import Calibration, measure_ranges, read_calibration, take_calibration
from repmlp_deploy.convert.graph.emulate import runnable_graphs
from repmlp_deploy.convert.graph.export import (
    OPSET,
    TRACED,
    Traced,
    export_graph,
    trace_network,
    with_metadata,
    with_symbolic_batch,
)
from repmlp_deploy.convert.graph.lower import blocks_of, product_tensors, set_precision
from repmlp_deploy.convert.graph.proto import serialize_model
from repmlp_deploy.convert.graph.simplify import SimplificationFailed, Simplifier, simplifier_started, simplify_graph
from repmlp_deploy.convert.memory import release_memory
from repmlp_deploy.convert.options import (
    CALIBRATION_METHODS,
    GRAPHS,
    parse_formats,
    parse_profiles,
    require_choice,
    whole_range,
)
from repmlp_deploy.convert.proof.algebra import Step, prove_algebra
from repmlp_deploy.convert.proof.certificate import Certifier, Run, batch_sizes
from repmlp_deploy.convert.proof.probe import probe_like, record_probe, run_network
from repmlp_deploy.convert.proof.weights import match_weights
from repmlp_deploy.convert.provenance import describe_provenance
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches, upstream_form
from repmlp_deploy.convert.source.own_network import Interface
from repmlp_deploy.convert.source.state_dict import to_layout
from repmlp_deploy.convert.source.trained import OwnRequest, Trained, find_interface, load_own, take_trained
from repmlp_deploy.errors import BundleError, InputError, VerificationError
from repmlp_deploy.nets.flat import Flat
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.runtime.onnx.runner import open_session
from repmlp_deploy.runtime.runner import RunnerOptions
from repmlp_deploy.runtime.tasks import find_task

__all__ = ["export", "reparameterize"]

PROBED = 8
"""Calibration samples in the probe: int8 is judged on what its ranges are for."""

Progress = Callable[[str], None]
Find = Callable[..., Blame | None]
"""Bytes of a graph, and its precision where it is not fp32, to the first place where it strays from the trace."""


def export(  # noqa: PLR0913 - one a command-line option
    model_or_checkpoint: nn.Module | str | Path,
    *,
    module: str | None = None,
    example_input: Any = None,
    card: str | Path | ModelCard | None = None,
    formats: str | Sequence[str] = ("onnx",),
    graph: str = "folded",
    precision: str = "fp32",
    batch: str | int | BatchRange = "1:8:64",
    engine: EngineOptions | None = None,
    calibration: str | Path | Mapping[str, NDArray[Any]] | None = None,
    calibration_method: str = "minmax",
    keep_fp32: Sequence[str] = (),
    sensitivity: bool = False,
    weights: str | None = None,
    input_size: tuple[int, int] | None = None,
    out: str | Path | None = None,
    allow_merged: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Merge, prove, export: a bundle on disk whose every artifact was compared with the trained network.

    Args:
        model_or_checkpoint: a weights file; a network of `get_model`; or, with `example_input`, any module that
            contains RepMLP blocks, ours, official or mmpretrain's. Its other parts, inputs and outputs are its own.
        module: `package.module:factory` of the network that the weights file is for, where that is no family's.
        example_input: a tensor, a sequence of them by position or a mapping of them by name, whose first axis is the
            batch; by default the network's own attribute `example_input`, or images of `input_size`.
        card: see `load_trained`; for a network that is no family's, only what it says of images, labels and the name.
        formats: of `FORMATS`, as a sequence or comma-separated.
        graph: `folded`, or `merged` for what upstream's own merge leaves.
        precision: of the graph: `fp32`, `fp16`, `bf16` or `int8`.
        batch: sizes to serve, `MIN:OPT:MAX`, or one that is fixed; several ranges, comma-separated, are engines'
            optimisation profiles.
        engine: how to build engines.
        calibration: for int8: a folder of images, a `.npz` of arrays, or arrays (n, …) by the names of the inputs. A
            few of its samples become the probe, and so part of the bundle.
        calibration_method: of `CALIBRATION_METHODS`: how ranges are chosen.
        keep_fp32: patterns of module or node names that stay in float32, such as `stages.0.*`.
        sensitivity: also measure the error of lowering each block alone, so that the worst can be kept; it takes a
            verification a block.
        weights: see `load_trained`.
        input_size: see `load_trained`.
        out: the bundle's folder, default `artifacts/<name>-<precision>`.
        allow_merged: see `load_trained`.
        progress: called with the name of every step as it begins.

    Returns:
        The bundle in `out`.

    Raises:
        InputError: unusable arguments or input (CheckpointError, CardError among them).
        VerificationError: a step strays from the trained network; nothing is written.
        MissingDependency, MissingDevice, BuildError: a format cannot be made here.
        OutputError: `out` could not be written; an earlier bundle is untouched.
    """
    profiles = (batch,) if isinstance(batch, BatchRange) else parse_profiles(batch)
    request = _Request(
        formats=parse_formats(formats),
        graph=graph,
        precision=precision,
        batch=whole_range(profiles),
        engine=with_profiles(engine or EngineOptions(), profiles if len(profiles) > 1 else ()),
        calibration=calibration,
        calibration_method=calibration_method,
        keep_fp32=tuple(keep_fp32),
        sensitivity=sensitivity,
    )
    request.check()
    if out is not None:
        check_output_folder(Path(out))
    clock = _Clock(progress)
    with clock.step("load"):
        if module is not None or example_input is not None:
            own = OwnRequest(module, example_input, card, weights, input_size, allow_merged)
            trained = load_own(model_or_checkpoint, own)
        else:
            trained = take_trained(model_or_checkpoint, card, weights, input_size, allow_merged=allow_merged)
    out = Path("artifacts", f"{trained.card.name}-{precision}") if out is None else Path(out)
    check_output_folder(out)

    interface = find_interface(trained)
    samples = None
    if request.calibration is not None:
        with clock.step("read calibration"):
            samples = _calibration(request.calibration, trained.card, interface)
    with clock.step("probe"):
        inputs = [probe_like(x.numpy()) for x in interface.examples] if samples is None else samples.chosen(PROBED)
        probe = record_probe(trained.network, *inputs)
    certifier = Certifier(
        probe,
        batch_sizes(request.batch),
        class_axes=find_task(trained.card.task).class_axes,
        outputs=interface.outputs,
    )
    made = _Artifacts(request.precision, notes=[*trained.notes, *([] if samples is None else samples.remarks())])
    job = _Job(trained, interface, request, samples, certifier, made, clock)
    merged, network = reparameterize(trained, request.graph, certifier, clock.step)
    if "checkpoint" in request.formats:
        with clock.step("checkpoint"):
            made.add("checkpoint", *_checkpoint_file(trained, merged))
    del merged
    trained = trained.without_weights()
    release_memory()  # once, not after every step: memory that is taken again costs more than it is worth
    job = replace(job, trained=trained)
    if request.needs_trace:
        with clock.step("trace"):
            traced = trace_network(network, interface.examples, TRACED if request.quick else request.batch)
        if "torch" in request.formats:
            with clock.step("torch program"):
                certifier.require("torch.export program", partial(run_network, traced.program.module()))
                made.add("torch", "model.pt2", _program_file(traced))
        if request.needs_onnx:
            graphs = _make_graphs(job, network, traced)
            del network, traced
            _make_artifacts(job, graphs)
    made.add_file(PROBE, probe.to_bytes())
    manifest = _manifest(job, probe)
    with clock.step("save"):
        return Bundle(manifest, contents=made.contents).save(out)


@dataclass(frozen=True)
class _Job:
    """An export under way: what every step needs."""

    trained: Trained
    interface: Interface
    request: _Request
    samples: Calibration | None
    certifier: Certifier
    made: _Artifacts
    clock: _Clock

    def match_weights(self, name: str, model: onnx.ModelProto, network: nn.Module) -> Hop:
        """The line that compares a graph's weights with the network's."""
        return match_weights(name, model, network=network, own=self.trained.interface is not None)


@dataclass(frozen=True)
class _Request:
    """What was asked for, in the pipeline's own types."""

    formats: tuple[str, ...]
    graph: str
    precision: str
    batch: BatchRange
    engine: EngineOptions
    calibration: str | Path | Mapping[str, NDArray[Any]] | None
    calibration_method: str
    keep_fp32: tuple[str, ...]
    sensitivity: bool

    @property
    def needs_trace(self) -> bool:
        return bool(set(self.formats) - {"checkpoint"})

    @property
    def needs_onnx(self) -> bool:
        return bool(set(self.formats) & {"onnx", "openvino", *FLAVOURS})

    @property
    def quick(self) -> bool:
        """Whether a fixed batch may be traced although several are served; not upstream's form, whose code names it."""
        return self.batch.min != self.batch.max and self.graph == "folded" and "torch" not in self.formats

    def check(self) -> None:
        """Raise, before minutes are spent, if it cannot be had here."""
        require_choice("--graph", self.graph, GRAPHS)
        require_choice("--precision", self.precision, tuple(PRECISIONS))
        require_choice("--calibration-method", self.calibration_method, CALIBRATION_METHODS)
        calibrated = PRECISIONS[self.precision].needs_calibration
        if calibrated and self.calibration is None:
            raise InputError(f"{self.precision} needs calibration images: pass --calibration DIR|FILE.npz")
        if not calibrated and self.calibration is not None:
            raise InputError(f"--calibration is for int8, and --precision is {self.precision}: drop one of them")
        if self.precision == "fp32" and (self.keep_fp32 or self.sensitivity):
            option = "--keep-fp32" if self.keep_fp32 else "--sensitivity"
            raise InputError(f"{option} says nothing where everything is fp32: name a --precision")
        if self.precision != "fp32" and (plain := [f for f in self.formats if f in ("torch", "checkpoint")]):
            raise InputError(f"--format {plain[0]} is float32, not {self.precision}: drop one of them")
        for name in self.formats:
            if name in FLAVOURS:
                check_options(name, self.engine)
        if "openvino" in self.formats:
            _openvino().check_precision(self.precision, self.keep_fp32)


def reparameterize(
    trained: Trained, graph: str, certifier: Certifier, step: Callable[[str], AbstractContextManager[None]]
) -> tuple[nn.Module, nn.Module]:
    """The merged network, and the one to be traced; both verified.

    Args:
        trained: left alone.
        graph: of `GRAPHS`.
        certifier: where every line is kept.
        step: around every step, told its name.

    Raises:
        InputError: a block is none that merges.
        VerificationError: a step strays from the trained network.
    """
    with step("merge"):
        merged = trained.network if trained.merged else _merged(trained)
    find = partial(blame_network, trained.network)
    with step("verify merged"), blamed(partial(find, merged, certifier.inputs)):
        certifier.require("merged", partial(run_network, merged))
    steps = [] if trained.merged else [Step("merged", partial(merge_branches, use_up=True), merged)]
    network = upstream_form(merged) if graph == "merged" else None
    if network is None:
        fold = partial(fold_affine, keep_unknown=trained.interface is not None)
        with step("fold"):
            network = fold(merged)
        with step("verify folded"), blamed(partial(find, network, certifier.inputs)):
            certifier.require("folded", partial(run_network, network))
        steps.append(Step("folded", partial(fold, use_up=True), network))
    last = merged if graph == "merged" else network
    with step("verify algebra"), blamed(partial(find, last, certifier.inputs)):
        prove_algebra(trained.network, steps, certifier)
    return merged, network


@dataclass(frozen=True)
class _Graphs:
    """The verified graph, serialized.

    Attributes:
        fp32: simplified; None where nothing is made of it.
        lowered: in the precision that was asked for: the same where that is fp32, None where nothing is made of it.
        about: of the lowered one.
        sha256: of it, where it is known.
    """

    fp32: bytes | None
    lowered: bytes | None
    about: dict[str, Any]
    sha256: str | None


def _make_graphs(job: _Job, network: nn.Module, traced: Traced) -> _Graphs:
    """The graph, simplified, and in its precision; verified each time."""
    made, wanted = job.made, set(job.request.formats)
    with simplifier_started() as simplifier, tempfile.TemporaryFile(prefix="repmlp-exported-") as exported:
        find = _verified_graph(job, network, traced, exported)  # on disk, out of memory while others are tried
        with job.clock.step("simplify"):
            data = _simplified(job, network, exported, find, simplifier) or _content(exported)
    about: dict[str, Any] = {"opset": OPSET}
    if job.request.precision == "fp32":
        return _Graphs(data, data, about, made.graphs.get("simplified", made.graphs["exported"]))
    lowered = None
    if wanted & {"onnx", *FLAVOURS}:
        lowered, more = _lowered(job, data, find)
        about |= more
    return _Graphs(data if "openvino" in wanted else None, lowered, about, None)


def _make_artifacts(job: _Job, graphs: _Graphs) -> None:
    """What is built from the graphs."""
    request, made = job.request, job.made
    if set(request.formats) & {"openvino", *FLAVOURS}:
        release_memory(cycles=True)  # builders take copies of all weights
    if "openvino" in request.formats and graphs.fp32 is not None:
        _make_openvino(job, graphs.fp32)
    if graphs.lowered is None:
        return
    if "onnx" in request.formats:
        made.add("onnx", "model.onnx", graphs.lowered, graphs.about, sha256=graphs.sha256)
    for name in (name for name in request.formats if name in FLAVOURS):
        with job.clock.step(name):
            spec = GraphSpec(job.interface.shapes(), request.batch, request.precision, kept_products(graphs.about))
            engine = build_engine(name, graphs.lowered, spec, request.engine)
        made.add(name, f"model.{name}.engine", engine.plan, engine.details)
        made.notes.append(f"the {name} engine was built from the verified graph and has not run here")


def _verified_graph(job: _Job, network: nn.Module, traced: Traced, file: BinaryIO) -> Find:
    """Write the ONNX graph of a traced network, verified; how to find a fault in what is made of it."""
    if not job.request.quick:
        return _exported(job, network, traced, file)
    try:
        return _exported(job, network, traced, file, quick=True)
    except VerificationError:  # the network's own code names the batch it was traced with
        with job.clock.step("trace again"):
            traced = trace_network(network, job.interface.examples, job.request.batch)
    return _exported(job, network, traced, file)


def _exported(job: _Job, network: nn.Module, traced: Traced, file: BinaryIO, *, quick: bool = False) -> Find:
    interface, certifier = job.interface, job.certifier
    with job.clock.step("export"):
        model = export_graph(traced, input_names=interface.inputs, output_names=interface.outputs, optimize=not quick)
        model = with_symbolic_batch(model) if job.request.batch.min != job.request.batch.max else model
        model = with_metadata(model, _metadata(job.trained, job.request.batch))
        data = serialize_model(model)
        del model  # before a runtime takes its own copies
    find = partial(blame_graph, traced.program, batches=certifier.batches(*([TRACED.opt] if quick else [])))
    with job.clock.step("verify exported"), nullcontext() if quick else blamed(partial(find, data)):
        certifier.require("exported ONNX", _onnx_run(data))
    with job.clock.step("verify weights"), blamed(partial(find, data)):
        certifier.record([job.match_weights("exported ONNX weights", onnx.load_from_string(data), network)], "weights")
        job.made.graphs["exported"] = hashlib.sha256(data).hexdigest()
    file.write(data)
    return find


def _content(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


def _simplified(job: _Job, network: nn.Module, exported: BinaryIO, find: Find, simplifier: Simplifier) -> bytes | None:
    """The simplified graph, verified and serialized; None, with a note, where onnxsim failed or changed the output."""
    try:
        simplified = simplify_graph(onnx.load_from_string(_content(exported)), simplifier)
    except SimplificationFailed as error:
        job.made.notes.append(f"not simplified: {error}")
        return None
    data = serialize_model(simplified)
    try:
        weights = job.match_weights("simplified ONNX weights", simplified, network)
        del simplified  # before a runtime takes its own copies
        hops = [*job.certifier.measure("simplified ONNX", _onnx_run(data), "fp32"), weights]
    except (VerificationError, InputError) as error:
        said = str(error)
    else:
        failed = next((hop for hop in hops if not hop.passed), None)
        if failed is None:
            job.certifier.hops += hops
            job.made.graphs["simplified"] = hashlib.sha256(data).hexdigest()
            return data
        what = "the output" if failed.batch else f"a weight ({failed.note})"
        said = f"onnxsim changed {what} by {failed.max_abs:.2e}"
    job.made.notes.append(f"not simplified: {said}; {describe_blame(partial(find, data))}")
    return None


def _make_openvino(job: _Job, data: bytes) -> None:
    """The IR of the float32 graph in the precision, verified as its runner runs it."""
    request, made = job.request, job.made
    with job.clock.step("openvino"):
        ir = _openvino().build_ir(
            data,
            precision=request.precision,
            batch=request.batch,
            inputs=job.interface.shapes(),
            calibration=None if job.samples is None else job.samples.feeds(),
            keep_fp32=request.keep_fp32,
        )
    with job.clock.step("verify openvino"):
        runner = import_module("repmlp_deploy.runtime.openvino.runner")
        model = runner.CompiledIR(lambda: (ir.xml, ir.weights), request.precision, RunnerOptions())
        job.certifier.require(f"OpenVINO {request.precision}", model.run_all, request.precision)
    made.add_file("model.bin", ir.weights)
    about = {**ir.details, "products": model.products(), "companions": (made.files["model.bin"],)}
    made.add("openvino", "model.xml", ir.xml, about)
    if request.precision == "fp16":
        made.notes.append("openvino stores fp16 and computes in float32, which is what CPUs have")


def _openvino() -> Any:
    """The step that needs OpenVINO, which only its format asks for."""
    return import_module("repmlp_deploy.convert.formats.openvino")


def _lowered(job: _Job, data: bytes, find: Find) -> tuple[bytes, dict[str, Any]]:
    """The graph in the precision that was asked for, verified and serialized; and what stays in float32."""
    request, precision = job.request, job.request.precision
    model = onnx.load_from_string(data)
    ranges = None
    about: dict[str, Any] = {}
    if job.samples is not None:
        with job.clock.step("calibrate"):
            ranges = measure_ranges(data, job.samples, product_tensors(model), request.calibration_method)
        about = {"calibration": {"method": request.calibration_method, "samples": len(job.samples)}}
    with job.clock.step(precision):
        lowered = set_precision(model, precision, ranges=ranges, keep_fp32=request.keep_fp32)
        data = serialize_model(lowered.model)
    with job.clock.step(f"verify {precision}"):
        for name, runnable in _ways_to_run(lowered.model, data, precision):
            with blamed(partial(find, runnable, precision=precision)):
                job.certifier.require(name, _onnx_run(runnable), precision)
    if request.sensitivity:
        with job.clock.step("sensitivity"):
            about["sensitivity"] = _sensitivity(job, model, ranges)
    return data, about | {"opset": lowered.model.opset_import[0].version} | lowered.describe()


def _ways_to_run(model: onnx.ModelProto, data: bytes, precision: str) -> Iterator[tuple[str, bytes]]:
    """Step and graph of every way to run a precision on a CPU, see `emulating`: as it is, and as a GPU would round."""
    for name, runnable in runnable_graphs(model, precision):
        yield name, data if runnable is model else serialize_model(runnable)


def _sensitivity(job: _Job, model: onnx.ModelProto, ranges: Mapping[str, float] | None) -> list[dict[str, Any]]:
    """The error if only one block is in the precision, for every block, the worst first."""
    precision = job.request.precision
    blocks = blocks_of(model)
    found = []
    for block in blocks:
        others = [name for other, names in blocks.items() if other != block for name in names]
        alone = set_precision(model, precision, ranges=ranges, keep_fp32=others).model
        *_, (_, runnable) = _ways_to_run(alone, serialize_model(alone), precision)
        hops = job.certifier.measure(block, _onnx_run(runnable), precision)
        worst = max(hops, key=lambda hop: hop.max_abs)
        found.append({"block": block, "max_abs": worst.max_abs, "between": worst.between})
    return sorted(found, key=lambda line: -line["max_abs"])


def _calibration(given: str | Path | Mapping[str, NDArray[Any]], card: ModelCard, interface: Interface) -> Calibration:
    """The samples that were given for calibration."""
    shapes = interface.shapes()
    if isinstance(given, Mapping):
        return take_calibration(given, shapes)
    refusal = find_task(card.task).refusal
    return read_calibration(given, shapes, None if refusal else card.preprocessing)


def _manifest(job: _Job, probe: Probe) -> Manifest:
    trained, request, interface, made = job.trained, job.request, job.interface, job.made
    n = request.batch.min if request.batch.min == request.batch.max else None
    inputs = tuple(
        TensorSpec(name=name, dtype=str(x.dtype).removeprefix("torch."), shape=(n, *x.shape[1:]))
        for name, x in zip(interface.inputs, interface.examples, strict=True)
    )
    outputs = tuple(
        TensorSpec(name=name, dtype="float32", shape=(n, *reference.shape[1:]))
        for name, (reference, _) in zip(interface.outputs, probe.answers(), strict=True)
    )
    provenance = describe_provenance(trained, job.clock.seconds) | {"graphs": made.graphs}
    if request.calibration is not None:
        provenance["probe"]["samples"] = ["calibration"] * len(probe.inputs)
    return Manifest(
        name=trained.card.name,
        family=trained.card.family,
        task=trained.card.task,
        graph=request.graph,
        input=inputs[0],
        output=outputs[0],
        inputs=inputs if len(inputs) > 1 else (),
        outputs=outputs if len(outputs) > 1 else (),
        preprocessing=trained.card.preprocessing,
        labels=load_labels(trained.card),
        batch=request.batch,
        artifacts=made.entries,
        probe=made.files[PROBE],
        certificate=tuple(job.certifier.hops),
        verdict=Verdict.of(job.certifier.hops),
        provenance=provenance,
        notes=tuple(made.notes),
    )


def _merged(trained: Trained) -> nn.Module:
    try:
        return merge_branches(trained.network)
    except ValueError as error:  # of a network of the user's own: ours always merge
        raise InputError(str(error)) from None


class _Clock:
    """Seconds of every step, told to a progress display as it begins."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        if self._progress is not None:
            self._progress(name)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - started, 3)


@dataclass
class _Artifacts:
    """Files for the bundle, collected in memory."""

    precision: str
    notes: list[str] = field(default_factory=list)
    entries: dict[str, ArtifactEntry] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    graphs: dict[str, str] = field(default_factory=dict)

    def add_file(self, name: str, data: bytes, sha256: str | None = None) -> None:
        """Keep a file; its digest where it is known, which spares computing it again."""
        self.contents[name] = data
        self.files[name] = FileEntry(path=name, sha256=sha256 or hashlib.sha256(data).hexdigest(), bytes=len(data))

    def add(
        self,
        artifact_format: str,
        name: str,
        data: bytes,
        details: Mapping[str, Any] | None = None,
        *,
        sha256: str | None = None,
    ) -> None:
        self.add_file(name, data, sha256)
        described = {**self.files[name].model_dump(), "precision": self.precision, **(details or {})}
        self.entries[artifact_format] = ArtifactEntry.model_validate(described)


def _onnx_run(data: bytes) -> Run:
    try:
        session, _ = open_session(data, RunnerOptions(device="cpu"))
    except BundleError as error:
        raise VerificationError(str(error)) from None
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: NDArray[Any]) -> list[NDArray[Any]]:
        try:
            outputs: list[NDArray[Any]] = session.run(None, dict(zip(names, inputs, strict=True)))
        except Exception as error:  # onnxruntime's exceptions share no public base
            said = said_by_runtime(error)
            raise VerificationError(f"ONNX Runtime cannot run the graph at batch {len(inputs[0])}: {said}") from error
        return outputs

    return run


def _checkpoint_file(trained: Trained, merged: nn.Module) -> tuple[str, bytes]:
    """The merged state dict in the layout it came in."""
    network = merged.module if isinstance(merged, Flat) else merged
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    suffix = ".pth" if trained.checkpoint is None else trained.checkpoint.path.suffix
    named = state if trained.state is None else to_layout(state, trained.state)
    if suffix == ".safetensors":
        return "model.safetensors", safetensors.torch.save(named)
    buffer = io.BytesIO()
    torch.save(named, buffer)
    return "model.pth", buffer.getvalue()


def _program_file(traced: Traced) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(traced.program, buffer)
    return buffer.getvalue()


def _metadata(trained: Trained, batch: BatchRange) -> dict[str, object]:
    """What the graph says of itself, for tools that see it alone."""
    labels = load_labels(trained.card)
    return {
        "name": trained.card.name,
        "family": trained.card.family,
        "task": trained.card.task,
        "preprocessing": trained.card.preprocessing.model_dump(mode="json"),
        "labels": list(labels) if labels is not None else [],
        "batch": batch.model_dump(),
        "checkpoint_sha256": trained.checkpoint.sha256 if trained.checkpoint is not None else "",
        "repmlp_deploy": repmlp_deploy.__version__,
    }
