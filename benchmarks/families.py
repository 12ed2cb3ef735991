"""Compare networks of other packages, and RepMLPNet in a user's own module, in the forms that can be deployed.

python benchmarks/families.py --networks repvgg_a0,fastvit_t8 --batch 1,8 --out FILE.md

The forms: as trained; as timm's own `reparameterize_model` leaves it; ours. Each is exported by the same exporter and
simplified by the same simplifier, then run by ONNX Runtime and by OpenVINO in float32. Rows of one group take turns in
every round, so that a busy machine slows all of them; ratios are medians over rounds, with the smallest and the
largest. `--own CARD` compares a RepMLPNet inside a user's own module with the same network exported as a family.

timm needs torchvision. Where that cannot be installed, tests/support/torchvision_standin on PYTHONPATH takes its place.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import torch
from torch import Tensor, nn

from repmlp_deploy import export, load_card
from repmlp_deploy.bench.measure.machine import describe_machine
from repmlp_deploy.bench.subjects.seeding import seeded_network
from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert.graph.export import export_graph, trace_network
from repmlp_deploy.convert.graph.simplify import simplify_graph
from repmlp_deploy.convert.proof.algebra import redraw_statistics
from repmlp_deploy.nets.surgery import in_double
from repmlp_deploy.runtime.cpus import usable_cpus

ROUNDS = 7
BATCHES = BatchRange(min=1, opt=8, max=64)

Call = Callable[[], object]


class Own(nn.Module):
    """A user's network: something of their own around a network of a family."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of (N, C, H, W) images."""
        logits: Tensor = self.network(images)
        return logits


def redrawn(network: nn.Module, shape: Sequence[int]) -> nn.Module:
    """Return the network with BatchNorms far from the identity: evaluation mode, float32."""
    double = in_double(network.eval())
    redraw_statistics(double, [np.random.default_rng(0).standard_normal((2, *shape))])
    return double.float().requires_grad_(requires_grad=False)


def exported(network: nn.Module, shape: Sequence[int], path: Path) -> Path:
    """Export and simplify a network as it is."""
    traced = trace_network(network, [torch.zeros(1, *shape)], BATCHES)
    graph = export_graph(traced, input_names=["images"], output_names=["output"])
    onnx.save(simplify_graph(graph), path)
    return path


def forms_of(name: str, folder: Path) -> tuple[dict[str, Path], tuple[int, ...]]:
    """Return the graphs of a network of timm, and its input's shape."""
    import timm  # noqa: PLC0415 - heavy, and only some rows need it
    from timm.utils.model import reparameterize_model  # noqa: PLC0415

    torch.manual_seed(0)
    plain = timm.create_model(name, pretrained=False)
    shape = tuple(plain.pretrained_cfg["input_size"])
    network = redrawn(plain, shape)
    ours = export(network, example_input=torch.zeros(1, *shape), allow_merged=True, out=folder / "ours")
    graphs = {
        "trained": exported(network, shape, folder / "trained.onnx"),
        "timm's merge": exported(reparameterize_model(copy.deepcopy(network)).eval(), shape, folder / "timm.onnx"),
        "ours": Path(ours.folder or folder, "model.onnx"),
    }
    return graphs, shape


def forms_of_own(card_name: str, folder: Path) -> tuple[dict[str, Path], tuple[int, ...]]:
    """Return the graphs of a card's network, exported as a family and from inside a user's own module."""
    card = load_card(card_name)
    network, shape = seeded_network(card), (3, *card.input_size)
    network.card = card  # type: ignore[assignment]
    family = export(network, out=folder / "family")
    own = export(Own(network).eval(), example_input=torch.zeros(1, *shape), out=folder / "own")
    return {
        "as a family": Path(family.folder or folder, "model.onnx"),
        "inside an own module": Path(own.folder or folder, "model.onnx"),
    }, shape


def nodes_of(path: Path) -> str:
    """Return the counts of what costs time or tells that a merge is not complete."""
    counts = Counter(node.op_type for node in onnx.load(path).graph.node)
    products = counts["Conv"] + counts["MatMul"] + counts["Gemm"]
    return f"{products} / {counts['BatchNormalization']} / {counts['Add']} / {counts.total()}"


def onnxruntime_call(path: Path, batch: np.ndarray, threads: int) -> Call:
    """Return a call of ONNX Runtime."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: batch})


def openvino_call(path: Path, batch: np.ndarray, threads: int) -> Call:
    """Return a call of OpenVINO in float32."""
    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = ov.Core().compile_model(path, "CPU", hints).create_infer_request()
    return lambda: request.infer([batch])


RUNTIMES = {"ONNX Runtime": onnxruntime_call, "OpenVINO": openvino_call}


def measure(calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """Return the median milliseconds of every row in every round; rows take turns in a new order each round."""
    for call in calls.values():
        for _ in range(3):
            call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(ROUNDS):
        random.shuffle(order)
        for name in order:
            latencies: list[float] = []
            ends = time.perf_counter() + seconds / ROUNDS
            while len(latencies) < 3 or time.perf_counter() < ends:  # noqa: PLR2004 - a median needs some
                started = time.perf_counter()
                calls[name]()
                latencies.append(1e3 * (time.perf_counter() - started))
            found[name].append(statistics.median(latencies))
    return found


def rows_of(title: str, graphs: dict[str, Path], shape: Sequence[int], options: argparse.Namespace) -> list[str]:
    """Return one line of a Markdown table per form, runtime and batch size; ratios are against the last form."""
    lines = []
    for runtime, opened in RUNTIMES.items():
        for size in map(int, options.batch.split(",")):
            batch = np.random.default_rng(1).standard_normal((size, *shape)).astype(np.float32)
            found = measure(
                {name: opened(path, batch, options.threads) for name, path in graphs.items()}, options.seconds
            )
            *_, reference = found
            for name, rounds in found.items():
                ratios = [a / b for a, b in zip(rounds, found[reference], strict=True)]
                spread = "" if name == reference else f" ({min(ratios):.2f} to {max(ratios):.2f})"
                lines.append(
                    f"| {title} | {runtime} | {size} | {name} | {nodes_of(graphs[name])} | "
                    f"{statistics.median(rounds):.2f} | {statistics.median(ratios):.2f}{spread} |"
                )
                print(lines[-1], flush=True)
    return lines


def report(rows: Sequence[str]) -> str:
    """Return the table with the facts it must be read with."""
    machine = describe_machine()
    amx = "AMX" if any(flag.startswith("amx") for flag in machine.get("cpu_flags", ())) else "no AMX"
    versions = {"torch": torch.__version__, "onnxruntime": ort.__version__, "openvino": ov.__version__.split("-")[0]}
    meaning = (
        "Nodes: products (Conv, MatMul, Gemm) / BatchNormalization / Add / all. Ratio: latency over that of the last "
        "form of the group, median over rounds that take turns, with the smallest and the largest."
    )
    facts = [
        f"{dt.date.today().isoformat()}, {machine.get('cpu') or platform.processor()} ({amx}), float32.",  # noqa: DTZ011 - a label
        meaning,
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"`{' '.join(['python', *sys.argv])}`",
    ]
    head = ["| network | runtime | batch | form | nodes | ms | ratio |", "|---|---|--:|---|--:|--:|--:|"]
    return "\n\n".join(["# Networks of other families", *facts, "\n".join([*head, *rows])]) + "\n"


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default="repvgg_a0,fastvit_t8", help="of timm, comma-separated; empty for none")
    parser.add_argument("--own", default="", help="a card of a RepMLPNet to compare inside an own module")
    parser.add_argument("--batch", default="1,8", help="images per call, comma-separated")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing a row")
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    rows: list[str] = []
    with tempfile.TemporaryDirectory(prefix="repmlp-families-") as made:
        for name in filter(None, options.networks.split(",")):
            folder = Path(made, name)
            folder.mkdir()
            graphs, shape = forms_of(name, folder)
            rows += rows_of(name, graphs, shape, options)
        if options.own:
            graphs, shape = forms_of_own(options.own, Path(made))
            rows += rows_of(options.own, graphs, shape, options)
    text = report(rows)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
