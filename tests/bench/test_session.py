"""A whole run on the small trained network: every row has figures or a reason, and proof."""

import json
import os
import sys

import numpy as np
import pytest
import torch

from repmlp_deploy.bench import session, targets
from repmlp_deploy.bench.crew import Child
from repmlp_deploy.bench.session import run_benchmark
from repmlp_deploy.bench.settings import Settings
from repmlp_deploy.bundle import Bundle
from repmlp_deploy.card import data_root
from repmlp_deploy.cli.bench import bench_command
from repmlp_deploy.convert.pipeline import export
from repmlp_deploy.errors import InputError
from support.bench_reports import make_report
from support.commands import ends_with

pytestmark = pytest.mark.slow  # many exports, seconds each

SETTINGS = Settings(
    models=("repmlp-digits",),
    formats=("torch-merged", "onnx", "openvino", "trt"),
    batch=(2,),
    seconds=0.1,
    threads=1,
    idle_ms=1.0,
    end_to_end=True,
    profile=True,
)


@pytest.fixture(scope="module")
def steps():
    return []


@pytest.fixture(scope="module")
def report(steps):
    return run_benchmark(SETTINGS, steps.append)


@pytest.fixture
def no_peaks(monkeypatch):
    """Seconds that tests without a roofline need not spend."""
    monkeypatch.setattr(session._Session, "_measure_peaks", lambda _self: None)


def test_every_row_that_was_asked_for_is_there(report):
    names = ["torch-merged fp32", "onnx fp32", "openvino fp32", "openvino bf16", "trt fp32"]
    for mode in ("steady", "idle", "end-to-end"):
        assert [row.name for row in report.rows if row.mode == mode] == names
    for row in report.rows:
        assert (row.summary is None) == (row.status != "measured")
        assert row.summary is not None or row.reason


def test_fp32_rows_are_measured_and_proved_equal(report):
    rows = [row for row in report.rows if row.precision == "fp32" and row.format != "trt"]
    assert len(rows) == 9
    for row in rows:
        assert row.status == "measured", row.reason
        assert row.summary.calls >= 3
        assert row.error.max_abs <= row.error.allowed
        assert row.memory.peak_bytes > row.memory.imports_bytes > 0
        assert row.cold.load_s > 0
        assert row.cold.batch == 2
        assert row.proof["threads"] == 1
        assert row.proof["dtype"] in ("float32", "fp32", "f32")


def test_providers_and_devices_are_the_runtimes_own_words(report):
    proofs = {row.name: row.proof for row in report.rows}
    assert proofs["onnx fp32"]["providers"] == ["CPUExecutionProvider"]
    assert proofs["openvino fp32"]["device"] == "cpu"
    assert proofs["openvino fp32"]["inference_precision"] == "f32"
    assert set(proofs["openvino fp32"]["products"]) == {"f32"}


def test_the_lower_precision_is_measured_or_refused_but_never_replaced(report):
    row = next(row for row in report.rows if row.name == "openvino bf16")
    if row.status == "measured":
        assert row.proof["dtype"] == "bf16"
        assert row.error.max_abs > next(r for r in report.rows if r.name == "openvino fp32").error.max_abs
    else:
        assert "bf16" in row.reason


def test_ratios_are_against_the_baseline_and_shares_of_a_measured_roof(report):
    rows = {(row.name, row.mode): row for row in report.rows}
    assert rows["torch-merged fp32", "steady"].ratio is None
    assert rows["onnx fp32", "steady"].ratio.value > 0
    assert report.machine.peak_gflops["fp32"] > 0
    assert rows["onnx fp32", "steady"].roofline.share > 0
    assert rows["onnx fp32", "idle"].roofline is None


def test_counts_of_network_and_graph_are_in_the_report(report):
    counts = report.counts["repmlp-digits"]
    assert counts["folded"].macs == counts["folded ONNX"].macs
    assert counts["folded"].parameters == counts["folded ONNX"].parameters
    assert counts["trained"].macs > counts["folded"].macs


def test_profiles_name_stages(report):
    for name in ("onnx", "openvino"):
        stages = {line.stage for line in report.profile if line.format == name}
        assert {"embedding", "stage 0", "stage 1", "stage 2", "head"} <= stages


def test_steps_tell_the_time_left(steps, report):
    assert any("left" in step for step in steps)
    assert report.weights["repmlp-digits"].endswith("shipped")


@pytest.mark.usefixtures("no_peaks")
def test_int8_is_calibrated_with_what_is_given():
    """Images of its kind serve a trained network, which noise does not; and the counts are the float32 graph's."""
    settings = Settings(
        models=("repmlp-digits",),
        formats=("onnx", "openvino"),
        precision=("int8", "fp32"),
        seconds=0.05,
        threads=1,
        calibration=data_root() / "samples" / "digits",
    )
    report = run_benchmark(settings, lambda _: None)
    assert [(row.name, row.status) for row in report.rows] == [
        (name, "measured") for name in ("onnx int8", "onnx fp32", "openvino int8", "openvino fp32")
    ]
    assert not any("seeded inputs" in note for note in report.notes)
    counts = report.counts["repmlp-digits"]
    assert counts["folded ONNX"].parameters == counts["folded"].parameters


@pytest.mark.usefixtures("no_peaks")
def test_int8_without_images_is_calibrated_with_seeded_inputs():
    """And compared on inputs of that kind, whichever precision comes first."""
    settings = Settings(
        models=("repmlp-digits",), formats=("onnx",), precision=("fp32", "int8"), seconds=0.05, threads=1
    )
    report = run_benchmark(settings, lambda _: None)
    assert [(row.name, row.status) for row in report.rows] == [("onnx fp32", "measured"), ("onnx int8", "measured")]
    assert any("seeded inputs" in note for note in report.notes)


@pytest.mark.usefixtures("no_peaks")
def test_results_are_kept_when_interrupted():
    """Ctrl-C in the second round: the first round's figures are in the report, which says so; no child is left."""

    def interrupt(step):
        if "round 2" in step:
            raise KeyboardInterrupt

    quick = SETTINGS.model_copy(update={"formats": ("torch-merged",), "idle_ms": None, "profile": False})
    report = run_benchmark(quick, interrupt)
    assert report.interrupted
    first, second = report.rows
    assert first.status == "measured"
    assert len(first.rounds) == 1
    assert (second.status, second.reason) == ("unavailable", "not reached")


@pytest.fixture(scope="module")
def digits_bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "bundle"
    return export(data_root() / "weights" / "repmlp-digits.safetensors", batch="1:2:4", out=out)


@pytest.mark.usefixtures("no_peaks")
def test_a_bundle_can_be_measured_without_its_checkpoint(digits_bundle):
    settings = Settings(
        bundle=digits_bundle.folder, formats=("torch-merged", "onnx", "onnx-merged"), seconds=0.05, threads=1
    )
    rows = {row.format: row for row in run_benchmark(settings, lambda _: None).rows}
    assert rows["onnx"].status == "measured", rows["onnx"].reason
    assert rows["torch-merged"].reason == "a bundle holds no trained network: pass --ckpt"
    assert "not the merged one" in rows["onnx-merged"].reason


@pytest.mark.usefixtures("no_peaks")
def test_a_bundle_without_a_card_has_no_figures_from_jpeg_bytes(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5)).eval()
    out = export(network, example_input=torch.zeros(1, 3, 16, 16), formats="onnx", out=tmp_path / "dense").folder
    settings = Settings(bundle=out, formats=("onnx",), seconds=0.05, threads=1, end_to_end=True)
    steady, from_jpeg = run_benchmark(settings, lambda _: None).rows
    assert steady.status == "measured", steady.reason
    assert (from_jpeg.status, from_jpeg.reason) == ("unavailable", "no card says how images are made")


def test_a_bundle_that_takes_no_batch_of_images_is_refused(digits_bundle, tmp_path):
    spec = digits_bundle.manifest.input
    vectors = (spec.model_copy(update={"shape": (None, 7)}),)
    pairs = (spec, spec.model_copy(update={"name": "b"}))
    tokens = (spec.model_copy(update={"dtype": "int64"}),)
    settings = Settings(bundle=digits_bundle.folder)
    for inputs in (vectors, pairs, tokens):
        manifest = digits_bundle.manifest.model_copy(update={"inputs": inputs})
        with pytest.raises(InputError, match=r"only networks with one input, \(N, C, H, W\), are measured"):
            targets._target_of_bundle(Bundle(manifest, digits_bundle.folder), settings, tmp_path)


@pytest.mark.usefixtures("no_peaks")
def test_a_bundle_runs_under_load_from_tensors_and_from_jpeg_bytes(digits_bundle):
    pytest.importorskip("mlperf_loadgen", reason="mlcommons-loadgen is not installed")
    settings = Settings(
        bundle=digits_bundle.folder,
        formats=("onnx", "torch-merged"),
        seconds=0.1,
        threads=2,
        scenario=("single-stream", "offline", "server"),
        p99_ms=10_000.0,
        end_to_end=True,
    )
    rows = run_benchmark(settings, lambda _: None).scenarios
    assert len(rows) == 2 * 3 * 2 * 4, "formats, scenarios, sources, ways"
    for row in rows:
        if row.format == "onnx":
            assert row.status == "measured", row.reason
            assert row.figure > 0
            assert row.run.compared >= 32
            assert row.run.max_abs_error < 1e-4
        else:
            assert (row.figure, row.reason) == (None, "a bundle holds no trained network: pass --ckpt")


@pytest.mark.usefixtures("no_peaks")
def test_a_wrong_answer_is_not_timed(digits_bundle, tmp_path, monkeypatch):
    """A row whose output is not the trained network's has a reason and no figures."""
    probe = digits_bundle.probe()
    wrong = type(probe)(probe.inputs, probe.reference + np.float64(1e-3), probe.float32 + np.float32(1e-3))
    file = tmp_path / "probe.npz"
    file.write_bytes(wrong.to_bytes())
    monkeypatch.setattr(targets.Target, "probe", lambda _self: file)
    settings = Settings(bundle=digits_bundle.folder, formats=("onnx",), seconds=0.05, threads=1)
    (row,) = run_benchmark(settings, lambda _: None).rows
    assert row.status == "failed"
    assert "differs from the trained network" in row.reason
    assert row.summary is None


@pytest.mark.usefixtures("no_peaks")
def test_a_child_that_dies_is_a_row_and_not_the_end(digits_bundle, monkeypatch):
    def dying(self, command, **arguments):
        if command == "time":
            os.kill(self._process.pid, 9)
        return ask(self, command, **arguments)

    ask = Child.ask
    monkeypatch.setattr(session.Child, "ask", dying)
    settings = Settings(bundle=digits_bundle.folder, formats=("onnx",), seconds=0.05, threads=1)
    (row,) = run_benchmark(settings, lambda _: None).rows
    assert row.status == "failed"
    assert "signal 9" in row.reason


def _bench(*arguments):
    return ends_with(bench_command, *arguments)


def test_the_command_writes_every_report_and_compares(tmp_path, monkeypatch, capsys):
    """Exit 0 and four files; against a faster earlier run exit 3, naming the row; 2 for an unusable one."""
    monkeypatch.setattr("repmlp_deploy.bench.session.run_benchmark", lambda *_: make_report(seed=1))
    files = {name: tmp_path / f"r.{name}" for name in ("json", "csv", "markdown", "html")}
    options = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    assert _bench(*options) == 0
    assert all(path.stat().st_size for path in files.values())
    assert json.loads(files["json"].read_text())["schema_version"] == 1
    assert _bench("--compare", str(files["json"])) == 0
    slower = make_report(seed=2, slower={"onnx fp32": 1.15})
    monkeypatch.setattr("repmlp_deploy.bench.session.run_benchmark", lambda *_: slower)
    assert _bench("--compare", str(files["json"])) == 3
    assert "onnx fp32 at batch 1" in capsys.readouterr().err
    assert _bench("--compare", str(files["csv"])) == 2
    assert _bench("--json", str(tmp_path / "absent" / "r.json")) == 5
    assert _bench("--batch", "0") == 2
    assert _bench("--threshold", "0", "--compare", str(files["json"])) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--csv", "-"), "--csv -: only --json goes to stdout"),
        (("--markdown", "-"), "--markdown -: only --json goes to stdout"),
        (("--json", "x", "--csv", "./x"), "--json and --csv are both x; name two files"),
        (("--threshold", "5"), "--threshold is about the earlier report of --compare"),
        (("--formats", ","), "--formats is ',', which has an empty word"),
    ],
)
def test_an_option_that_would_be_lost_is_refused(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "run_benchmark", lambda *_: pytest.fail("measured for nothing"))
    assert _bench(*arguments) == 2
    assert said in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(session, "run_benchmark", lambda *_: pytest.fail("measured for nothing"))
    monkeypatch.setattr(os, "access", lambda path, _mode: path != tmp_path)  # root may write everywhere
    assert _bench("--json", str(tmp_path / "r.json")) == 5
    assert f"{tmp_path} cannot be written to" in capsys.readouterr().err


def test_json_on_stdout_stays_json_beside_a_comparison(tmp_path, monkeypatch, capsys):
    (tmp_path / "old.json").write_text(make_report(seed=1).to_json())
    monkeypatch.setattr(session, "run_benchmark", lambda *_: make_report(seed=2))
    assert _bench("--json", "-", "--compare", str(tmp_path / "old.json")) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["schema_version"] == 1
    assert "against the earlier run" in err


def test_a_package_that_only_the_page_needs_is_missed_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "repmlp_deploy.bench.report.page", raising=False)
    monkeypatch.setattr(session, "run_benchmark", lambda *_: pytest.fail("measured for a report that cannot be made"))
    assert _bench("--models", "repmlp-digits", "--html", str(tmp_path / "r.html")) == 4
    assert 'pip install "repmlp-deploy[bench]"' in capsys.readouterr().err


def test_an_interrupted_command_reports_and_ends_with_130(monkeypatch, capsys):
    interrupted = make_report().model_copy(update={"interrupted": True})
    monkeypatch.setattr("repmlp_deploy.bench.session.run_benchmark", lambda *_: interrupted)
    assert _bench() == 130
    assert "onnx" in capsys.readouterr().out


def test_a_saved_bundle_is_left_alone(digits_bundle):
    assert Bundle.load(digits_bundle.folder).manifest == digits_bundle.manifest


def test_no_step_begins_after_the_limit(monkeypatch):
    """Making bundles takes longest: it counts too, and rows that were not made say why."""
    monkeypatch.setattr(session._Session, "_measure_peaks", lambda _self: None)
    found = run_benchmark(SETTINGS.model_copy(update={"limit_seconds": 0.001}), lambda _: None)
    assert {row.status for row in found.rows} == {"unavailable"}
    reasons = {row.reason for row in found.rows if row.format != "trt"}
    assert reasons == {"the limit of 0.001 s was reached before it was made: raise --limit"}
