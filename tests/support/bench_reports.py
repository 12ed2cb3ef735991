"""Reports made by hand, for tests that need no run."""

import numpy as np

from repmlp_deploy.bench.counting.counts import Counts, OpCount
from repmlp_deploy.bench.measure.peaks import roofline
from repmlp_deploy.bench.measure.results import (
    ColdStart,
    Error,
    LoadRun,
    Machine,
    Memory,
    ProfileLine,
    Report,
    Row,
    ScenarioRow,
)
from repmlp_deploy.bench.measure.timing import compare_rounds, summarize

MEDIANS = {
    "torch-merged fp32": 40.0,
    "onnx-merged fp32": 21.0,
    "onnx fp32": 8.0,
    "openvino fp32": 7.5,
    "openvino bf16": 4.0,
}
MACHINE = Machine(
    peak_gflops={"fp32": 300.0, "bf16": 900.0}, peak_source={"fp32": "torch", "bf16": "torch"}, bandwidth_gb_s=20.0
)
COUNTS = Counts.of(
    1000, 3100, [OpCount(op="Conv", stage="stage 0", macs=10**8, weight_elements=900, activation_elements=4000)]
)


def _row(  # noqa: PLR0913 - one a property of the row
    name, median, *, batch, mode, rng, spread, base
):
    form, precision = name.split()
    rounds = tuple(tuple(float(ms) for ms in median * rng.lognormal(0, spread, 12)) for _ in range(8))
    summary = summarize(rounds, batch)
    row = Row(
        model="net",
        format=form,
        precision=precision,
        batch=batch,
        mode=mode,
        title="a row",
        graph="folded",
        status="measured",
        rounds=rounds,
        summary=summary,
        ratio=None if base is None else compare_rounds(base, rounds),
        cold=ColdStart(import_s=0.5, load_s=0.1, first_ms=12.0, batch=1),
        memory=Memory(peak_bytes=10**8, imports_bytes=10**7),
        error=Error(max_abs=1e-2 if precision == "bf16" else 1e-6, max_rel=1e-6, top1=1.0, allowed=None),
        roofline=roofline(COUNTS, batch, precision, summary.p50_ms, MACHINE) if mode == "steady" else None,
        proof={"runtime": "fake 1.0", "device": "cpu", "threads": 2, "dtype": precision, "sha256": "0" * 64},
    )
    return row, rounds


def make_scenarios(*, factor=1.0, sources=("tensors",), scenarios=("single-stream", "offline", "server")):
    """Rows of one format in three ways, each faster than the one before; the last cannot run."""
    rows = []
    for source in sources:
        for scenario in scenarios:
            for i, way in enumerate(("single", "batched", "streams")):
                rate = 50.0 * factor * (1 + i)
                run = LoadRun(
                    samples_per_s=rate,
                    p50_ms=5.0,
                    p90_ms=7.5 / (1 + i),
                    p99_ms=88.0,
                    valid=True,
                    asked_per_s=rate if scenario == "server" else None,
                    samples=100,
                    compared=100,
                    max_abs_error=1e-6,
                )
                rows.append(
                    ScenarioRow(
                        model="net",
                        format="onnx",
                        precision="fp32",
                        scenario=scenario,
                        source=source,
                        way=way,
                        status="unavailable" if way == "streams" else "measured",
                        reason="one thread cannot be shared" if way == "streams" else "",
                        run=None if way == "streams" else run,
                        limit_ms=100.0 if scenario == "server" else None,
                        tried=(run,) if scenario == "server" and way != "streams" else (),
                    )
                )
    return tuple(rows)


def make_report(  # noqa: PLR0913 - one a property that tests vary
    *, slower=None, drift=1.0, seed=0, batches=(1, 8), modes=("steady",), spread=0.03, machine=MACHINE
):
    """A report of five rows a group; `slower` maps a row's name to a factor on its latency, `drift` is on all."""
    rng = np.random.default_rng(seed)
    rows = []
    for batch in batches:
        for mode in modes:
            base = None
            for name, median in MEDIANS.items():
                ms = median * batch * drift * (slower or {}).get(name, 1.0)
                row, rounds = _row(name, ms, batch=batch, mode=mode, rng=rng, spread=spread, base=base)
                base = base or rounds
                rows.append(row)
            rows.append(
                Row(
                    model="net",
                    format="trt",
                    precision="fp32",
                    batch=batch,
                    mode=mode,
                    title="an engine",
                    graph="folded ONNX",
                    status="unavailable",
                    reason="no NVIDIA GPU",
                )
            )
    profile = [
        ProfileLine(model="net", format="onnx", precision="fp32", batch=1, stage="stage 0", op="Conv", ms=3.0),
        ProfileLine(model="net", format="onnx", precision="fp32", batch=1, stage="head", op="Gemm", ms=0.001),
    ]
    return Report(
        created="2026-01-02T03:04:05+00:00",
        title="net on <a CPU> & more",
        settings={"threads": 2, "idle_ms": 20.0},
        environment={
            "cpu": "a CPU",
            "cpu_flags": ["avx2"],
            "versions": {"repmlp-deploy": "0", "torch": "2"},
            "python": "3",
        },
        machine=machine,
        weights={"net": "seeded"},
        counts={"net": {"folded": COUNTS}},
        baseline="torch-merged",
        rows=tuple(rows),
        profile=tuple(profile),
        notes=("something to know",),
    )
