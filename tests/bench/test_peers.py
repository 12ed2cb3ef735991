"""The table of peers: ratios are to this project, round by round."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location(
    "peers_run", Path(__file__).parents[2] / "benchmarks" / "peers" / "run.py"
)
run = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(run)

MS = {"ours.py": (1.0, 2.0, 4.0), "naive_onnx.py": (10.0, 20.0, 40.0)}


def table(monkeypatch, capsys, fails):
    """What is printed when some peers fail in some rounds."""
    asked = dict.fromkeys(run.PEERS, 0)

    def ask(_python, script, _options):
        i, asked[script] = asked[script], asked[script] + 1
        if script not in MS or (script, i) in fails:
            return {"peer": script, "missing": "failed with 1"}
        return {"peer": script, "p50_ms": MS[script][i]}

    monkeypatch.setattr(run, "ask", ask)
    monkeypatch.setattr("sys.argv", ["run.py"])
    run.main()
    return capsys.readouterr().out.splitlines()


def test_a_peer_is_held_against_ours_of_the_same_round(monkeypatch, capsys):
    assert "10.00 times ours (10.00 to 10.00)" in table(monkeypatch, capsys, {})[1]
    assert "10.00 times ours (10.00 to 10.00)" in table(monkeypatch, capsys, {("ours.py", 0)})[1]


def test_without_ours_there_is_no_ratio(monkeypatch, capsys):
    (line,) = table(monkeypatch, capsys, {("ours.py", i) for i in range(3)})
    assert line.endswith("20.00 ms, no ratio: this project ran in none of its rounds")


def test_nothing_that_ran_is_no_table(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="no peer could run"):
        table(monkeypatch, capsys, {(script, i) for script in MS for i in range(3)})
