"""The table of formats: adding one costs a module and an entry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from repmlp_deploy import Bundle, export
from repmlp_deploy.bundle import Hop
from repmlp_deploy.cli import export as export_cli
from repmlp_deploy.cli.shared.engine_options import Reach, Tuning, read_engine_options
from repmlp_deploy.convert.engine_options import EngineOptions
from repmlp_deploy.convert.formats import FORMATS, Format, formats_that_need, parse_formats, require_engine
from repmlp_deploy.convert.job import Graphs, Job
from repmlp_deploy.errors import InputError, VerificationError
from support.commands import ends_with


@pytest.fixture
def toy() -> Iterator[None]:
    FORMATS["constants"] = Format("support.toy_format", "fp32", "NumPy archive", aliases=("npz",))
    yield
    del FORMATS["constants"]


@pytest.mark.usefixtures("toy")
def test_a_listed_format_is_exported_verified_and_saved(digits_checkpoint: Path, tmp_path: Path) -> None:
    code = ends_with(
        export_cli.export_command, "--ckpt", digits_checkpoint, "--format", "npz,onnx", "--out", tmp_path / "out"
    )
    assert code == 0
    bundle = Bundle.load(tmp_path / "out")
    entry = bundle.artifact("constants")
    assert (entry.path, entry.precision) == ("model.constants.npz", "fp32")
    assert list(bundle.manifest.artifacts) == ["constants", "onnx"]
    rows = [hop for hop in bundle.manifest.certificate if hop.name == "constants"]
    assert rows
    assert all(hop.passed for hop in rows)
    with np.load(tmp_path / "out" / entry.path) as arrays:
        assert len(arrays.files) > 10


@pytest.mark.usefixtures("toy")
def test_a_listed_format_is_named_and_can_refuse(digits_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean constants"):
        parse_formats("constant")
    with pytest.raises(InputError, match="constants holds folded constants"):
        export(digits_checkpoint, formats="constants", graph="merged", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_entry_the_format_is_unknown() -> None:
    with pytest.raises(InputError, match="--format npz: unknown"):
        parse_formats("npz")


def test_options_of_engines_need_one_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python and the command line take the engines from the same place."""
    asked, reach = EngineOptions(tf32=True), Reach(False, False, None, False, False)
    require_engine(EngineOptions(), ("onnx",))
    require_engine(asked, ("onnx", "trt-rtx"))
    monkeypatch.setitem(FORMATS, "constants", Format("support.toy_format", "fp32", "NumPy archive", engine=True))
    require_engine(asked, ("constants",))
    assert read_engine_options(("constants",), (), Tuning(None, True, None, "auto", "error"), reach) == asked
    with pytest.raises(InputError, match="--tf32 is about engines; add --format trt or trt-rtx or constants"):
        require_engine(asked, ("onnx",))


def test_a_format_gets_what_it_needs(digits_checkpoint: Path, tmp_path: Path) -> None:
    request = SimpleNamespace(formats=("onnx", "openvino", "trt", "trt-rtx", "torch", "checkpoint"))
    asked = [formats_that_need(request, need) for need in ("form", "trace", "fp32", "lowered")]
    assert asked == [("checkpoint",), ("torch",), ("openvino",), ("onnx", "trt", "trt-rtx")]
    bundle = export(digits_checkpoint, formats="checkpoint", out=tmp_path / "out")
    assert not bundle.manifest.provenance["graphs"], "a format that needs no graph makes none"


def test_a_graph_that_no_entry_asks_for_is_a_mistake_in_the_table() -> None:
    graphs = Graphs(b"float32", b"lowered")
    assert (graphs.need_fp32(), graphs.need_lowered()) == (b"float32", b"lowered")
    with pytest.raises(AssertionError, match='no format has needs="fp32" in FORMATS'):
        Graphs(None, b"lowered").need_fp32()
    with pytest.raises(AssertionError, match='no format has needs="lowered" in FORMATS'):
        Graphs(b"float32", None).need_lowered()


def test_a_second_trace_records_no_row_twice(
    digits_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export with a fixed batch fails after its outputs were compared: only the second one's rows are kept."""
    right, calls = Job.match_weights, []

    def failing(job: Job, name: str, *arguments: object) -> Hop:
        calls.append(name)
        if len(calls) == 1:
            raise VerificationError("the batch is in the graph")
        return right(job, name, *arguments)

    monkeypatch.setattr(Job, "match_weights", failing)
    bundle = export(digits_checkpoint, out=tmp_path / "out")
    rows = [(hop.name, hop.batch) for hop in bundle.manifest.certificate]
    assert calls.count("exported ONNX weights") == 2
    assert len(rows) == len(set(rows))
