"""Two runs differ where they really differ, and nowhere else."""

import pytest

from repmlp_deploy.bench.measure.results import Report, load_report
from repmlp_deploy.bench.report.compare import compare_reports, comparison_table
from repmlp_deploy.errors import InputError
from support.bench_reports import MACHINE, make_report, make_scenarios


def test_a_planted_slowdown_of_15_percent_in_one_format_is_reported():
    found = compare_reports(make_report(seed=1), make_report(seed=2, slower={"onnx fp32": 1.15}))
    assert {(c.row.name, c.row.batch) for c in found.slower} == {("onnx fp32", 1), ("onnx fp32", 8)}
    assert all(1.1 < c.ratio < 1.2 for c in found.slower)
    assert not found.drifted


@pytest.mark.parametrize("seed", range(5))
def test_a_slowdown_of_2_percent_is_not_reported(seed):
    found = compare_reports(make_report(seed=seed), make_report(seed=seed + 100, slower={"onnx fp32": 1.02}))
    assert found.slower == []
    assert not found.drifted


def test_a_speed_up_is_told_and_is_no_failure():
    found = compare_reports(make_report(seed=1), make_report(seed=2, slower={"openvino bf16": 0.7}))
    assert [c.row.name for c in found.changes if c.verdict == "faster"] == ["openvino bf16"] * 2
    assert found.slower == []


def test_a_slower_machine_is_drift_and_not_every_row_getting_slower():
    """All rows and the machine's own products 30 % slower: nothing to report; one row beyond that still is."""
    slow = MACHINE.model_copy(update={"peak_gflops": {"fp32": 300 / 1.3}})
    found = compare_reports(
        make_report(seed=1), make_report(seed=2, drift=1.3, slower={"onnx fp32": 1.15}, machine=slow)
    )
    assert [c.drift for c in found.changes] == pytest.approx([1.3] * 10, rel=0.03)
    assert {c.row.name for c in found.slower} == {"onnx fp32"}
    assert not found.drifted


def test_every_row_slower_on_an_unchanged_machine_is_reported():
    assert compare_reports(make_report(seed=1), make_report(seed=2, drift=1.3)).drifted


def test_a_slower_memory_explains_a_drift_as_well():
    slow = MACHINE.model_copy(update={"bandwidth_gb_s": MACHINE.bandwidth_gb_s / 1.3})
    runs = [make_report(seed=1), make_report(seed=2, drift=1.3, machine=slow)]
    assert not compare_reports(*runs).drifted


def test_batch_sizes_drift_apart():
    """A neighbour in the caches costs batch 1 a quarter and batch 8 nothing: no row is to blame."""
    old, busy = make_report(seed=1), make_report(seed=2, drift=1.25)
    rows = [row for report, n in ((busy, 1), (make_report(seed=2), 8)) for row in report.rows if row.batch == n]
    found = compare_reports(old, busy.model_copy(update={"rows": tuple(rows)}))
    assert found.slower == []
    assert not found.drifted
    assert [c.drift for c in found.changes] == pytest.approx([1.25] * 5 + [1.0] * 5, rel=0.03)


def test_a_change_within_the_noise_is_not_reported():
    """15 % in the median of calls that scatter by half is no finding."""
    noisy = [make_report(seed=s, spread=0.9, slower=slower) for s, slower in ((1, None), (2, {"onnx fp32": 1.1}))]
    assert "onnx fp32" not in {c.row.name for c in compare_reports(*noisy).slower}


def test_the_threshold_is_the_users():
    runs = make_report(seed=1), make_report(seed=2, slower={"onnx fp32": 1.15})
    assert compare_reports(*runs, threshold=0.25).slower == []


def test_rows_in_one_run_only_and_other_versions_are_told():
    old, new = make_report(seed=1, batches=(1, 8)), make_report(seed=2, batches=(1,))
    new = new.model_copy(update={"environment": {**new.environment, "versions": {"repmlp-deploy": "0", "torch": "3"}}})
    found = compare_reports(old, new)
    assert "torch was 2, is 3" in found.notes
    assert sum(note.startswith("measured before, not now") for note in found.notes) == 5
    assert len(comparison_table(found).rows) == 5


def test_a_report_survives_its_file(tmp_path):
    report = make_report()
    path = tmp_path / "r.json"
    path.write_text(report.to_json())
    assert load_report(path) == report
    assert Report.from_json(report.to_json()).rows[0].rounds == report.rows[0].rounds


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema_version": 2}', "no json"])
def test_another_file_is_no_report(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(InputError, match="no report of repmlp-bench"):
        load_report(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_report(tmp_path / "absent.json")


def test_scenarios_are_notes_and_no_verdict():
    """One run has no interval: a rate that halves is told, and does not fail the comparison."""
    old = make_report(seed=1).model_copy(update={"scenarios": make_scenarios()})
    new = make_report(seed=1).model_copy(update={"scenarios": make_scenarios(factor=0.5)})
    found = compare_reports(old, new)
    assert found.slower == []
    notes = [note for note in found.notes if "not judged" in note]
    assert len(notes) == 4, "offline and server, both ways that were measured"
    assert "net onnx fp32, server from tensors, batched: was 100, is 50 samples/s" in notes[-1]
    assert not any("not judged" in note for note in compare_reports(old, old).notes)
    assert any("measured now, not before: net onnx" in note for note in compare_reports(make_report(), old).notes)
    assert any("measured before, not now: net onnx" in note for note in compare_reports(old, make_report()).notes)
