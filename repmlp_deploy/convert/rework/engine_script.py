"""Compare every layer of a TensorRT engine with ONNX Runtime, on a machine with a GPU.

`repmlp-verify BUNDLE --engine-report FILE` wrote this script and filled in `ABOUT`. It needs neither torch nor the
package that wrote it. Polygraphy opens CUDA's runtime library, which must be installed:

    pip install polygraphy onnx onnxruntime numpy tensorrt    # or tensorrt-rtx-cu12 for a trt-rtx engine
    python FILE BUNDLE

1. The bundle's engine, if it has one, runs on the probe; its outputs are compared with ONNX Runtime's.
2. The engine is built again from the bundle's graph with the values of `ABOUT` as further outputs, in float32. They are
   compared one by one, in the order of the graph. An output ends a fusion, so kernels differ from the served engine's.

The first value that differs is named with its module's block and part. Exit codes: 0 every value is within the
tolerance; 2 unusable arguments or files; 3 a value differs; 4 a package or a GPU is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ABOUT: dict[str, Any] = {}  # filled in where this script is written


class Unusable(Exception):  # noqa: N818 - reads as what it says
    """Ends the script with a message and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def load(module: str, package: str) -> Any:
    """Import a module; say what to install where it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise Unusable(f"{module} cannot be imported ({error}): pip install {package}", 4) from None


def read(folder: Path, file: Mapping[str, str]) -> bytes:
    """Read a file of the bundle and check its SHA-256: deserialising an engine runs native code."""
    try:
        data = (folder / file["path"]).read_bytes()
    except OSError as error:
        raise Unusable(f"{folder / file['path']}: {error.strerror}", 2) from None
    if hashlib.sha256(data).hexdigest() != file["sha256"]:
        raise Unusable(f"{folder / file['path']} is not the file that this script was written for", 2)
    return data


def read_inputs(folder: Path) -> dict[str, Any]:
    """Return a batch of the probe: name of every input to its array."""
    import io  # noqa: PLC0415 - one function needs it

    np = load("numpy", "numpy")
    with np.load(io.BytesIO(read(folder, ABOUT["probe"])), allow_pickle=False) as arrays:
        keys = ["inputs", *(f"inputs.{i}" for i in range(1, len(ABOUT["inputs"])))]
        order = np.arange(ABOUT["batch"]) % len(arrays["inputs"])
        return {name: arrays[key][order] for name, key in zip(ABOUT["inputs"], keys, strict=True)}


def marked_graph(graph: bytes) -> bytes:
    """Return the graph with the values of `ABOUT` as outputs too, each cast to float32."""
    onnx = load("onnx", "onnx")
    model = onnx.load_model_from_string(graph)
    for value in ABOUT["values"]:
        name = value["value"]
        model.graph.node.append(onnx.helper.make_node("Cast", [name], [marked(name)], name=marked(name), to=1))
        model.graph.output.append(onnx.helper.make_tensor_value_info(marked(name), 1, None))
    data: bytes = model.SerializeToString()
    return data


def marked(name: str) -> str:
    """Return the name of the output that holds a value."""
    return f"{name}_marked"


def run_reference(graph: bytes, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Run a graph in ONNX Runtime on the CPU."""
    backend = load("polygraphy.backend.onnxrt", "polygraphy")
    load("onnxruntime", "onnxruntime")
    with backend.OnnxrtRunner(backend.SessionFromOnnx(graph, providers=["cpu"])) as runner:
        return {name: value.copy() for name, value in runner.infer(dict(inputs)).items()}


def network_and_config(graph: bytes, capability: str | None) -> tuple[Any, Any]:
    """Return Polygraphy's loaders of the network and of the builder's configuration.

    Args:
        graph: serialized.
        capability: `8.9` to build a TensorRT-RTX engine for another GPU; None for the one at hand.
    """
    backend = load("polygraphy.backend.trt", "polygraphy")
    profile = backend.Profile()
    for name, shape in ABOUT["inputs"].items():
        profile.add(name, *[(ABOUT["batch"], *shape)] * 3)
    network = backend.NetworkFromOnnxBytes(graph, strongly_typed=True)
    if ABOUT["format"] != "trt-rtx":
        return network, backend.CreateConfig(tf32=False, profiles=[profile])
    rtx = load("polygraphy.backend.tensorrt_rtx", "polygraphy")
    targets = None if capability is None else [tuple(int(part) for part in capability.split("."))]
    config = rtx.CreateConfigRTX(profiles=[profile], use_gpu=capability is None, compute_capabilities=targets)
    return network, backend.PostprocessConfig(config, without_tf32)


def without_tf32(builder: Any, network: Any, config: Any) -> None:
    """Switch TF32 off, which TensorRT-RTX has on by default; Polygraphy calls this with all three."""
    del builder, network
    config.clear_flag(load("tensorrt_rtx", ABOUT["package"]).BuilderFlag.TF32)


def run_engine(engine: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Run an engine on the GPU."""
    backend = load("polygraphy.backend.trt", "polygraphy")
    with backend.TrtRunner(engine) as runner:
        return {name: value.copy() for name, value in runner.infer(dict(inputs)).items()}


def compare(got: Mapping[str, Any], expected: Mapping[str, Any], places: Sequence[Mapping[str, str]]) -> list[Any]:
    """Return one row per value: its name, place and node, the error, what is allowed, and whether it passed."""
    np = load("numpy", "numpy")
    rows = []
    for about in places:
        y, r = got[about["output"]].astype(np.float64), expected[about["output"]].astype(np.float64)
        same = y.shape == r.shape and bool(np.isfinite(y).all())
        error = float(np.abs(y - r).max(initial=0.0)) if same else float("inf")
        allowed = ABOUT["relative"] * max(float(np.abs(r).max(initial=0.0)), 1e-30)
        rows.append({**about, "error": error, "allowed": allowed, "passed": error <= allowed})
    return rows


def report(title: str, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Print every row; return the first that did not pass."""
    say(f"{title}: {len(rows)} values, {sum(row['passed'] for row in rows)} within the tolerance")
    for row in rows:
        verdict = "ok " if row["passed"] else "BAD"
        say(f"  {verdict} {row['error']:9.2e} of {row['allowed']:9.2e}  {row['place']}  ({row['node']})")
    return next((row for row in rows if not row["passed"]), None)


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")


def outputs_of(graph: bytes) -> list[dict[str, str]]:
    """Return the graph's own outputs as rows without figures."""
    onnx = load("onnx", "onnx")
    model = onnx.load_model_from_string(graph)
    return [{"output": v.name, "place": "the network", "node": f"output {v.name}"} for v in model.graph.output]


def check_layers(graph: bytes, engine: bytes | None, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Run everything on the GPU and return the rows of both comparisons."""
    backend = load("polygraphy.backend.trt", "polygraphy")
    load("tensorrt_rtx" if ABOUT["format"] == "trt-rtx" else "tensorrt", ABOUT["package"])
    wanted = marked_graph(graph)
    expected = run_reference(wanted, inputs)
    found: dict[str, Any] = {}
    try:
        if engine is not None:
            served = run_engine(backend.EngineFromBytes(engine), inputs)
            found["the bundle's engine"] = compare(served, expected, outputs_of(graph))
        got = run_engine(backend.EngineFromNetwork(*network_and_config(wanted, None)), inputs)
    except Exception as error:  # noqa: BLE001 - Polygraphy, TensorRT and CUDA raise whatever they like
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise Unusable(f"the engine does not run on this machine, which needs an NVIDIA GPU: {said}", 4) from None
    places = [{**about, "output": marked(about["value"])} for about in ABOUT["values"]]
    found["every value, in an engine that was built again"] = compare(got, expected, places)
    return found


def build(graph: bytes, capability: str) -> int:
    """Build the engine with every output, for a GPU that need not be here; return its size in bytes."""
    backend = load("polygraphy.backend.trt", "polygraphy")
    network, config = network_and_config(marked_graph(graph), capability)
    return len(memoryview(backend.EngineBytesFromNetwork(network, config=config)()))


def run(options: argparse.Namespace) -> int:
    """Do what the arguments ask for; return the exit code."""
    graph = read(options.bundle, ABOUT["graph"])
    if options.build_for is not None:
        if ABOUT["format"] != "trt-rtx":
            raise Unusable("--build-for: TensorRT builds for the GPU at hand; leave the option out", 2)
        say(f"built for {options.build_for}, {build(graph, options.build_for)} bytes; nothing was run")
        return 0
    inputs = read_inputs(options.bundle)
    if options.reference_only:
        expected = run_reference(marked_graph(graph), inputs)
        for about in ABOUT["values"]:
            value = expected[marked(about["value"])]
            say(f"  {about['place']}  ({about['node']}): {tuple(value.shape)}, largest {abs(value).max():.4g}")
        say(f"ONNX Runtime computed {len(ABOUT['values'])} values; no engine was compared")
        return 0
    engine = None if ABOUT["engine"] is None else read(options.bundle, ABOUT["engine"])
    found = check_layers(graph, engine, inputs)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    wrong = [first for first in (report(title, rows) for title, rows in found.items()) if first is not None]
    if not wrong:
        say("every value is within the tolerance")
        return 0
    first = wrong[-1]  # of the values, which say more than the outputs
    figures = f"differs by {first['error']:.2e}; {first['allowed']:.2e} is allowed"
    sys.stderr.write(f"error: first at {first['place']}: {first['node']} {figures}\n")
    return 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; return its exit code."""
    parser = argparse.ArgumentParser(description=f"Compare the layers of {ABOUT['name']} with ONNX Runtime.")
    parser.add_argument("bundle", type=Path, help="the folder that the script was written for")
    parser.add_argument("--json", type=Path, help="also write every row to this file")
    parser.add_argument("--reference-only", action="store_true", help="run ONNX Runtime alone: needs no GPU")
    parser.add_argument(
        "--build-for", metavar="8.9", help="only build, with TensorRT-RTX, for this GPU: needs none here"
    )
    if ABOUT["format"] == "trt-rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when Polygraphy is imported
    try:
        return run(parser.parse_args(arguments))
    except Unusable as error:
        sys.stderr.write(f"error: {error}\n")
        return error.code


if __name__ == "__main__":
    sys.exit(main())
