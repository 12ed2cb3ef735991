import hashlib
from pathlib import Path

import numpy as np
import pytest

from repmlp_deploy import Bundle, Predictor
from repmlp_deploy.convert.proof.probe import probe_inputs
from repmlp_deploy.errors import OutputError
from repmlp_deploy.runtime.cache import Cache, cache_key, describe_processor
from repmlp_deploy.runtime.onnx.runner import OnnxRunner
from repmlp_deploy.runtime.runner import RunnerOptions
from support.bundles import as_int8

INPUTS = probe_inputs((3, 32, 32), 4, seed=5)


def test_what_is_stored_comes_back_and_nothing_else(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "made" / "here")
    assert cache.load("key") is None
    for content in (b"first", b"second, longer", b""):
        cache.store("key", content)
        assert cache.load("key") == content
    assert [path.name for path in (tmp_path / "made" / "here").iterdir()] == ["key.bin"]


@pytest.mark.parametrize("cut", [0, 1, 31, 32, 40])
def test_what_is_not_whole_is_nothing(tmp_path: Path, cut: int) -> None:
    cache = Cache(tmp_path)
    cache.store("key", b"content of sixteen")
    path = tmp_path / "key.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    assert cache.load("key") is None
    path.write_bytes(whole[:cut] + bytes([whole[cut] ^ 1]) + whole[cut + 1 :])
    assert cache.load("key") is None
    path.write_bytes(whole)
    assert cache.load("key") == b"content of sixteen"


def test_a_key_depends_on_every_part_and_on_where_it_ends() -> None:
    keys = [cache_key("a", "b"), cache_key("a", "c"), cache_key("ab"), cache_key("a", "b", ""), cache_key("b", "a")]
    assert len(set(keys)) == len(keys)
    assert cache_key("a", 1) == cache_key("a", 1)


def test_the_processor_is_told_apart() -> None:
    assert describe_processor() == describe_processor()
    assert len(describe_processor()) > 5


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path, bundle: Bundle) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="name a folder that can be written"):
        Predictor(as_int8(bundle, "onnx"), format="onnx", cache=tmp_path / "file" / "cache")
    with pytest.raises(OutputError, match="name a folder that can be written"):
        Predictor(as_int8(bundle, "onnx"), format="onnx", cache=tmp_path / "file")


def test_the_optimised_graph_is_kept_and_changes_no_result(bundle: Bundle, tmp_path: Path) -> None:
    bundle = as_int8(bundle, "onnx")
    expected = OnnxRunner(bundle, RunnerOptions()).run(INPUTS)
    options = RunnerOptions(cache=tmp_path)
    for said in ("here, and cached", "from the cache", "from the cache"):
        runner = OnnxRunner(bundle, options)
        assert runner.details["optimised"] == said
        np.testing.assert_array_equal(runner.run(INPUTS), expected)
    assert len(list(tmp_path.iterdir())) == 1


def test_predictors_of_two_graphs_share_a_folder(bundle: Bundle, bundle_folder: Path, tmp_path: Path) -> None:
    """The key holds the artifact's digest: another model never comes out of the cache."""
    import onnx

    path = bundle_folder / "model.onnx"
    model = onnx.load(path)
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "head.bias")
    scale.raw_data = (np.frombuffer(scale.raw_data, np.float32) + 1).tobytes()
    data = model.SerializeToString()
    copy = Bundle.load(bundle_folder)
    path.write_bytes(data)
    other = as_int8(copy, "onnx", sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    cache = tmp_path / "cache"
    one = Predictor(as_int8(bundle, "onnx"), format="onnx", cache=cache).logits(INPUTS)
    two = Predictor(other, format="onnx", cache=cache).logits(INPUTS)
    np.testing.assert_allclose(two, one + 1, rtol=0, atol=1e-4)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "foreign", "ort format"])
def test_a_damaged_graph_is_made_again(bundle: Bundle, tmp_path: Path, damage: str) -> None:
    bundle, options = as_int8(bundle, "onnx"), RunnerOptions(cache=tmp_path)
    expected = OnnxRunner(bundle, options).run(INPUTS)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    foreign = b"not a model"
    ort_format = b"\x00\x00\x00\x00ORTM" + b"\x00" * 64
    path.write_bytes(
        {
            "garbage": np.random.default_rng(0).bytes(len(whole)),
            "truncated": whole[:-100],
            "empty": b"",
            "foreign": hashlib.sha256(foreign).digest() + foreign,
            "ort format": hashlib.sha256(ort_format).digest() + ort_format,
        }[damage]
    )
    runner = OnnxRunner(bundle, options)
    assert runner.details["optimised"] == "here, and cached"
    np.testing.assert_array_equal(runner.run(INPUTS), expected)
    assert OnnxRunner(bundle, options).details["optimised"] == "from the cache"


def test_a_float_graph_is_not_kept_because_it_would_start_more_slowly(bundle: Bundle, tmp_path: Path) -> None:
    assert OnnxRunner(bundle, RunnerOptions(cache=tmp_path)).details["optimised"] == "here"
    assert list(tmp_path.iterdir()) == []


def test_threads_do_not_spin_between_calls(bundle: Bundle) -> None:
    """Threads that spin cost a processor all the time between calls."""
    session = OnnxRunner(bundle, RunnerOptions(threads=2))._session
    assert session.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"
