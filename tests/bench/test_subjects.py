"""What is compared: every format has a row, and one that cannot run says why."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from repmlp_deploy.bench import worker
from repmlp_deploy.bench.crew import Child, ChildFailed
from repmlp_deploy.bench.load.pictures import image_like, synthetic_jpeg
from repmlp_deploy.bench.session import run_benchmark
from repmlp_deploy.bench.settings import Settings, read_settings
from repmlp_deploy.bench.subjects import table as subjects
from repmlp_deploy.bench.subjects.seeding import seeded_samples
from repmlp_deploy.bench.subjects.table import SUBJECTS, chosen_rows, why_not
from repmlp_deploy.bench.worker import Worker
from repmlp_deploy.card import list_cards, load_card
from repmlp_deploy.convert.graph.sample_checks import check_samples
from repmlp_deploy.errors import InputError
from repmlp_deploy.nets.families import card_spec
from repmlp_deploy.runtime.images import open_image


@pytest.mark.parametrize("name", list_cards())
def test_seeded_samples_are_what_a_cards_preprocessing_can_make(name):
    card = load_card(name)
    samples = seeded_samples((card_spec(card).in_channels, *card.input_size), 8, card.preprocessing)
    assert check_samples({"input": samples}, "seeded", card.preprocessing) == []


def test_by_default_every_format_but_the_opt_in_one_has_a_row():
    rows = chosen_rows(None, ("fp32", "bf16"))
    assert {name for name, _ in rows} == {name for name, subject in SUBJECTS.items() if not subject.opt_in}
    assert ("openvino", "bf16") in rows
    assert ("onnx", "bf16") not in rows


def test_a_format_without_the_precision_has_a_row_that_says_so():
    assert chosen_rows(("torch-merged",), ("bf16",)) == [("torch-merged", "bf16")]
    assert why_not("torch-merged", "bf16") == "torch-merged computes in fp32 only"


def test_engines_without_a_gpu_are_rows_with_their_reason(monkeypatch):
    monkeypatch.setattr(subjects, "has_nvidia_gpu", lambda: False)
    assert [row for row in chosen_rows(None, ("fp32", "fp16")) if row[0] == "trt"] == [("trt", "fp32")]
    assert why_not("trt", "fp32") == "no NVIDIA GPU"
    monkeypatch.setattr(subjects, "has_nvidia_gpu", lambda: True)
    assert why_not("trt", "fp32") != "no NVIDIA GPU"


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert why_not("openvino", "fp32") == 'openvino is not installed: pip install "repmlp-deploy[openvino]"'


@pytest.mark.parametrize(("formats", "precisions"), [(("onxn",), ("fp32",)), (None, ("fp31",)), (None, ())])
def test_unknown_words_are_refused(formats, precisions):
    with pytest.raises(InputError):
        chosen_rows(formats, precisions)


def test_a_precision_of_another_device_is_no_unknown_word():
    with pytest.raises(InputError, match="--precision: tf32 does not run on cpu; these do: fp32, "):
        chosen_rows(None, ("tf32",))
    assert ("torch-trained", "tf32") in chosen_rows(None, ("tf32",), "cuda")


def test_an_unknown_baseline_is_named_by_its_option():
    with pytest.raises(InputError, match=r"--baseline onx: unknown; did you mean onnx\?"):
        run_benchmark(Settings(baseline="onx"), print)


@pytest.mark.parametrize("name", sorted({subject.opener for subject in SUBJECTS.values()}))
def test_every_opener_exists(name):
    module, function = name.split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_command_line_wins_over_the_suite(tmp_path):
    suite = tmp_path / "s.toml"
    suite.write_text('models = ["repmlp-digits"]\nbatch = [1, 8]\nseconds = 3\n')
    settings = read_settings(suite, {"batch": "2", "seconds": None})
    assert (settings.models, settings.batch, settings.seconds) == (("repmlp-digits",), (2,), 3)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"ckpt": Path("x.pth")}, {"ckpt": Path("x.pth"), "bundle": None, "calibration": Path("/")}),
        ({"bundle": Path("x")}, {"ckpt": None, "card": None, "bundle": Path("x"), "calibration": None}),
        ({"models": "repmlp-digits"}, {"ckpt": None, "bundle": None, "models": ("repmlp-digits",)}),
        ({}, {"calibration": Path("/")}),
    ],
)
@pytest.mark.parametrize(
    "source", ['bundle = "b"', 'ckpt = "c.pth"\ncard = "repmlp-digits"', 'models = ["repmlp-digits"]']
)
def test_a_network_of_the_command_line_takes_the_place_of_the_suites(tmp_path, source, given, kept):
    suite = tmp_path / "s.toml"
    calibration = "" if "bundle" in source else 'calibration = "/"\n'
    suite.write_text(f'{source}\nbatch = [4]\nprecision = ["int8"]\n{calibration}')
    settings = read_settings(suite, given)
    expected = kept | ({} if calibration else {"calibration": None})
    assert settings.batch == (4,)
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(
    "text", ["batches = [1]", "batch = []", "formats = []", "batch = [0]", "seconds = -1", "not toml"]
)
def test_a_wrong_suite_is_refused(tmp_path, text):
    suite = tmp_path / "s.toml"
    suite.write_text(text)
    with pytest.raises(InputError, match=r"s\.toml"):
        read_settings(suite, {})


def test_a_suite_takes_the_names_and_the_lists_of_the_command_line(tmp_path):
    suite = tmp_path / "s.toml"
    suite.write_text('models = "a, b"\nbatch = 4\nlimit = 60\nend-to-end = true\nidle_ms = 5\np99 = 20\n')
    settings = read_settings(suite, {})
    assert (settings.models, settings.batch) == (("a", "b"), (4,))
    assert (settings.limit_seconds, settings.end_to_end, settings.idle_ms, settings.p99_ms) == (60, True, 5, 20)
    suite.write_text('batch = "8,1"\n')
    assert read_settings(suite, {}).batch == (1, 8)
    suite.write_text("batches = 4\n")
    with pytest.raises(InputError, match=r"no setting 'batches'; known: .*, end-to-end, .*, limit, .*, p99, "):
        read_settings(suite, {})


def test_contradictory_settings_are_refused():
    with pytest.raises(InputError, match="both given"):
        read_settings(None, {"ckpt": "a.pth", "bundle": "b"})
    with pytest.raises(InputError, match="--bundle names a finished bundle: leave one of them out"):
        read_settings(None, {"bundle": Path("b"), "calibration": Path("/"), "precision": "int8"})
    with pytest.raises(InputError, match="--models"):
        read_settings(None, {"ckpt": "a.pth", "models": "repmlp-digits"})
    with pytest.raises(InputError, match="--p99 is the limit of the server scenario"):
        read_settings(None, {"p99_ms": 10.0, "scenario": "offline"})
    with pytest.raises(InputError, match="--calibration is for int8"):
        read_settings(None, {"calibration": Path("/"), "precision": "fp32"})
    with pytest.raises(InputError, match="--calibration absent: no such folder or file"):
        read_settings(None, {"calibration": Path("absent"), "precision": "int8"})


def test_the_suites_that_ship_are_valid(pytestconfig):
    suites = sorted((pytestconfig.rootpath / "benchmarks").glob("*.toml"))
    assert suites
    for suite in suites:
        settings = read_settings(suite, {})
        chosen_rows(settings.formats, settings.precision)
    default = read_settings(pytestconfig.rootpath / "benchmarks" / "default.toml", {})
    assert default == Settings(batch=(64,))


def test_scenarios_are_words_of_the_command_line():
    settings = read_settings(None, {"scenario": "server, offline", "p99_ms": 25.0})
    assert (settings.scenario, settings.p99_ms) == (("server", "offline"), 25.0)
    with pytest.raises(InputError, match=r"--scenario: .*'single-stream', 'offline' or 'server'; got 'multi'"):
        read_settings(None, {"scenario": "multi"})


def test_a_wrong_setting_is_named_as_its_option():
    for name, option in (("idle_ms", "--idle"), ("limit_seconds", "--limit"), ("p99_ms", "--p99")):
        with pytest.raises(InputError, match=f"^{option}: "):
            read_settings(None, {name: -1.0, "scenario": "server"})


def test_numbers_are_sorted_and_unique():
    assert read_settings(None, {"batch": "64,1, 8,1"}).batch == (1, 8, 64)
    for text in ("", "0", "1,a", "-1", "1.5"):
        with pytest.raises(InputError, match="--batch"):
            read_settings(None, {"batch": text})


def test_the_picture_of_end_to_end_rows_is_a_photograph_sized_jpeg():
    data = synthetic_jpeg(1)
    assert open_image(data).size == (500, 375)
    assert data == synthetic_jpeg(1) != synthetic_jpeg(2)
    assert len(data) > 30_000


def test_inputs_differ_between_samples_and_repeat():
    first, again = image_like((3, 20, 33), 2), image_like((3, 20, 33), 2)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first[0] - first[1]).max() > 1


def test_a_child_that_fails_or_dies_says_why():
    with Child(1) as child:
        with pytest.raises(ChildFailed, match="no subject is loaded"):
            child.ask("profile", batch=1)
        with pytest.raises(ChildFailed, match="no command 'close'"):
            child.ask("close")
        child._process.kill()
        with pytest.raises(ChildFailed, match="signal 9"):
            child.ask("memory")


def test_a_worker_needs_no_framework_that_its_subject_does_not_use():
    """Its memory and cold start are the subject's, so the child imports neither torch nor onnx of its own."""
    code = "import sys, repmlp_deploy.bench.worker; print({'torch', 'onnx', 'openvino'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


LOADING_BYTES = 200_000_000


def test_the_worker_times_what_it_is_told(monkeypatch):
    class Fake:
        proof: ClassVar = {"runtime": "fake"}
        seen: ClassVar = []

        def run(self, batch):
            self.seen.append(batch.shape)
            return np.zeros((len(batch), 2), np.float32)

        def profile(self, _batch, _calls):
            return []

    def opened_with_much_memory(_job):
        np.ones(LOADING_BYTES, np.uint8)
        return Fake()

    monkeypatch.setattr(worker, "open_subject", opened_with_much_memory)
    job = {"format": "torch-folded", "precision": "fp32", "threads": 1, "card": load_card("repmlp-digits").model_dump()}
    own = Worker()
    opened = own.load(job, [3, 32, 32], 2)
    assert opened["proof"] == {"runtime": "fake"}
    assert opened["imports_bytes"] > 0
    assert len(own.time(4, "steady", 0.0, 0.0, 1)) == 1
    assert len(own.time(4, "steady", 0.0, 0.0, 3)) == 3
    assert own.warm(4, "end-to-end", 0.2, 0.0)["calls"] > 0
    if worker.machine.reset_peak():  # else loading stays in the peak
        own.warm(4, "steady", 0.0, 0.0)
        assert 0 < own.memory() < worker.machine.resident_bytes() + LOADING_BYTES / 2
    assert set(Fake.seen) == {(2, 3, 32, 32), (4, 3, 32, 32)}
