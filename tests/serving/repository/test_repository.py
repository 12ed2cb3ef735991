"""Model repositories for other servers: read back by Triton's own classes, and never at the cost of what is there."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from repmlp_deploy import Bundle, Predictor, export
from repmlp_deploy.bundle import TensorSpec
from repmlp_deploy.cli.pack import pack_command
from repmlp_deploy.cli.shared.console import run_command
from repmlp_deploy.errors import BundleError, InputError, VerificationError
from repmlp_deploy.precision import PRECISIONS, OpenVinoNames
from repmlp_deploy.serving.repository import LAYOUTS, Choice, ImageStep, find_layout, write_packed, writing
from support.vendors.packages import unpacked

TRITON = ("tritonclient==2.73.0", "protobuf==6.33.5")

PARSE = """
import importlib.util, json, pathlib, sys
root = pathlib.Path(sys.argv[1])
file = root / "tritonclient" / "grpc" / "model_config_pb2.py"
sys.path.insert(0, str(root))
from google.protobuf import json_format, text_format
spec = importlib.util.spec_from_file_location("model_config_pb2", file)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
config = text_format.Parse(pathlib.Path(sys.argv[2]).read_text(), module.ModelConfig())
print(json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True)))
"""


def parsed(config: Path) -> dict[str, Any]:
    """What Triton's own classes read, in a process of its own: their protobuf is not ours."""
    command = [sys.executable, "-I", "-c", PARSE, str(unpacked(*TRITON)), str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run_command(pack_command, [str(argument) for argument in arguments])
    return int(ended.value.code)


@pytest.fixture(scope="module")
def both(digits_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("packed") / "bundle"
    return export(digits_checkpoint, formats="onnx,openvino,trt-rtx", batch="1:8:64", out=out)


def test_triton_reads_what_the_graph_is(both: Bundle, tmp_path: Path) -> None:
    assert run(both.folder, "--layout", "triton", "--out", tmp_path, "--max-delay-ms", 1.5) == 0
    model = tmp_path / "repmlp-digits"
    config = parsed(model / "config.pbtxt")
    graph = onnx.load(model / "1" / "model.onnx").graph
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("repmlp-digits", "onnxruntime", 64)
    for said, value in ((config["input"], graph.input), (config["output"], graph.output)):
        (tensor,) = said
        edges = [str(dim.dim_value) for dim in value[0].type.tensor_type.shape.dim[1:]]
        assert (tensor["name"], tensor["data_type"], tensor["dims"]) == (value[0].name, "TYPE_FP32", edges)
    assert config["output"][0]["label_filename"] == "labels.txt"
    assert (model / "labels.txt").read_text().splitlines() == list(both.manifest.labels or ())
    batching = config["dynamic_batching"]
    assert (batching["preferred_batch_size"], batching["max_queue_delay_microseconds"]) == ([8], "1500")


def test_the_warm_up_is_a_sample_of_the_probe(both: Bundle, tmp_path: Path) -> None:
    """A server that runs the packed graph on it gives what the bundle's own runner gives."""
    write_packed(LAYOUTS["triton"].pack(Choice(both)), tmp_path)
    (warmup,) = parsed(tmp_path / "repmlp-digits" / "config.pbtxt")["model_warmup"]
    about = warmup["inputs"]["images"]
    sample = np.frombuffer((tmp_path / "repmlp-digits" / "warmup" / about["input_data_file"]).read_bytes(), np.float32)
    sample = sample.reshape(1, *map(int, about["dims"]))
    np.testing.assert_array_equal(sample, both.probe().inputs[:1])
    with Predictor(both, format="onnx") as predictor:
        np.testing.assert_allclose(predictor.logits(sample), both.probe().reference[:1], atol=1e-4)


@pytest.mark.parametrize(("artifact", "backend", "files"), [("openvino", "openvino", ["model.bin", "model.xml"])])
def test_other_backends_of_triton(both: Bundle, tmp_path: Path, artifact: str, backend: str, files: list[str]) -> None:
    packed = LAYOUTS["triton"].pack(Choice(both, artifact, name="own.name_1", version=7))
    write_packed(packed, tmp_path)
    assert parsed(tmp_path / "own.name_1" / "config.pbtxt")["backend"] == backend
    assert sorted(path.name for path in (tmp_path / "own.name_1" / "7").iterdir()) == files


def test_a_fixed_batch_is_part_of_the_shape(digits_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(digits_checkpoint, batch=4, out=tmp_path / "bundle")
    write_packed(LAYOUTS["triton"].pack(Choice(bundle)), tmp_path / "models")
    config = parsed(tmp_path / "models" / "repmlp-digits" / "config.pbtxt")
    assert "max_batch_size" not in config
    assert config["input"][0]["dims"] == ["4", "3", "32", "32"]
    assert "dynamic_batching" not in config
    assert config["model_warmup"][0]["batch_size"] == 1, "Triton skips a warm-up of 0"
    assert len((tmp_path / "models" / "repmlp-digits" / "warmup" / "images").read_bytes()) == 4 * 3 * 32 * 32 * 4


def test_the_ensemble_takes_images_to_the_logits_of_the_predictor(
    both: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps are run here as Triton's own classes read them: each tensor goes where the maps say."""
    assert run(both.folder, "--layout", "triton", "--format", "onnx", "--preprocess", "--out", tmp_path) == 0
    assert "not checked here: that Triton runs the ensemble repmlp-digits-pixels" in capsys.readouterr().out
    ensemble = parsed(tmp_path / "repmlp-digits-pixels" / "config.pbtxt")
    assert (ensemble["platform"], ensemble["max_batch_size"]) == ("ensemble", 64)
    assert (tmp_path / "repmlp-digits-pixels" / "1").is_dir()  # Triton requires the folder of the version
    levels = np.random.default_rng(0).integers(0, 256, (2, 45, 50, 3), dtype=np.uint8)
    known = dict(zip((tensor["name"] for tensor in ensemble["input"]), [levels], strict=True))
    specs = {tensor["name"]: (tensor["data_type"], tensor["dims"]) for tensor in ensemble["input"]}
    for step in ensemble["ensemble_scheduling"]["step"]:
        config = parsed(tmp_path / step["model_name"] / "config.pbtxt")
        assert (config["max_batch_size"], step["model_version"]) == (64, "-1")
        for tensor in config["input"]:
            assert specs[step["input_map"][tensor["name"]]] == (tensor["data_type"], tensor["dims"])
        for tensor in config["output"]:
            specs[step["output_map"][tensor["name"]]] = (tensor["data_type"], tensor["dims"])
        session = onnxruntime.InferenceSession(tmp_path / step["model_name"] / "1" / "model.onnx")
        feed = {inner: known[outer] for inner, outer in step["input_map"].items()}
        for inner, outer in step["output_map"].items():
            known[outer] = session.run([inner], feed)[0]
    (output,) = ensemble["output"]
    assert specs[output["name"]] == (output["data_type"], output["dims"]) == ("TYPE_FP32", ["10"])
    with Predictor(both, format="onnx", device="cpu") as predictor:
        expected = predictor.logits(np.stack([predictor.preprocess(image) for image in levels]))
    np.testing.assert_allclose(known[output["name"]], expected, rtol=0, atol=1e-5)


def test_an_option_of_another_server_is_refused(
    both: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(both.folder, "--layout", "ovms", "--max-delay-ms", 9, "--out", tmp_path / "models") == 2
    assert "--max-delay-ms says nothing to OpenVINO Model Server: it is for --layout triton" in capsys.readouterr().err
    assert run(both.folder, "--layout", "triton", "--storage", "pvc://x", "--out", tmp_path / "models") == 2
    assert "--storage says nothing to NVIDIA Triton" in capsys.readouterr().err


def test_preprocessing_that_cannot_be_packed_is_refused(
    both: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(both.folder, "--layout", "ovms", "--preprocess", "--out", tmp_path / "models") == 2
    assert "--preprocess packs an ensemble of Triton" in capsys.readouterr().err
    image = TensorSpec(name="logits", dtype="uint8", shape=(None, None, None, 3))
    choice = Choice(
        both, images=ImageStep(b"", image, TensorSpec(name="tensor", dtype="float32", shape=(None, 3, 32, 32)))
    )
    with pytest.raises(InputError, match="names a tensor logits, and so does an output"):
        LAYOUTS["triton"].pack(choice)
    assert not (tmp_path / "models").exists()


def test_what_a_server_cannot_keep_to_is_refused(both: Bundle, tmp_path: Path) -> None:
    batch = both.manifest.batch.model_copy(update={"min": 2})
    several = Bundle(both.manifest.model_copy(update={"batch": batch}), both.folder)
    failed = tuple(hop.model_copy(update={"passed": False}) for hop in both.manifest.certificate)
    for layout, choice, error, said in [
        ("triton", Choice(several), InputError, "export it with --batch 1:8:64"),
        ("triton", Choice(both, "trt-rtx"), InputError, "trt-rtx is an engine of TensorRT-RTX: export trt"),
        ("triton", Choice(both, "trt"), BundleError, "holds onnx, openvino, trt-rtx"),
        ("ovms", Choice(both, "trt"), InputError, "runs openvino, onnx; --format is trt"),
        ("triton", Choice(both, name="../up"), InputError, "expected letters, digits"),
        ("triton", Choice(both, version=0), InputError, "--model-version is 0"),
        ("triton", Choice(both, max_delay_ms=float("nan")), InputError, "--max-delay-ms is nan"),
        ("kserve", Choice(both), InputError, "needs --storage URI"),
        ("kserve", Choice(both, storage="models"), InputError, "--storage is 'models'; expected an address"),
        ("kserve", Choice(both, storage="pvc://models", name="123"), InputError, "no letter to begin"),
        (
            "ovms",
            Choice(Bundle(both.manifest.model_copy(update={"certificate": failed}), both.folder)),
            VerificationError,
            "have failed|that failed",
        ),
    ]:
        with pytest.raises(error, match=said):
            LAYOUTS[layout].pack(choice)
    with pytest.raises(InputError, match="did you mean triton"):
        find_layout("tritn")
    assert list(tmp_path.iterdir()) == []


def test_openvinos_server_gets_the_batch_sizes_and_the_type_to_compute_in(both: Bundle, tmp_path: Path) -> None:
    assert run(both.folder, "--layout", "ovms", "--out", tmp_path, "--json") == 0
    (listed,) = json.loads((tmp_path / "config.json").read_text())["model_config_list"]
    config = listed["config"]
    assert (config["name"], config["base_path"], config["batch_size"]) == (
        "repmlp-digits",
        "/models/repmlp-digits",
        "1:64",
    )
    assert config["plugin_config"]["INFERENCE_PRECISION_HINT"] == "f32"
    assert sorted(path.name for path in (tmp_path / "repmlp-digits" / "1").iterdir()) == ["model.bin", "model.xml"]


def test_the_type_to_compute_in_is_that_of_the_table(both: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = LAYOUTS["triton"].pack(Choice(both, "openvino"))
    assert not [line for line in packed.unchecked if "computes in" in line]
    entry = replace(PRECISIONS["fp32"], openvino=OpenVinoNames(stored=None, computes="f16"))
    monkeypatch.setitem(PRECISIONS, "fp32", entry)
    packed = LAYOUTS["ovms"].pack(Choice(both, "openvino"))
    (listed,) = json.loads(packed.files["config.json"])["model_config_list"]
    assert listed["config"]["plugin_config"]["INFERENCE_PRECISION_HINT"] == "f16"
    said = "that the backend computes in f16: the file holds float32, and f16 is a hint of our runner"
    assert said in LAYOUTS["triton"].pack(Choice(both, "openvino")).unchecked


def test_kserve_gets_a_service_that_names_the_storage(both: Bundle, tmp_path: Path) -> None:
    told = ("--layout", "kserve", "--storage", "s3://models/digits", "--name", "Digits_v2")
    assert run(both.folder, *told, "--out", tmp_path) == 0
    service = json.loads((tmp_path / "inferenceservice.yaml").read_text())
    assert service["metadata"]["name"] == "digits-v2"
    model = service["spec"]["predictor"]["model"]
    assert model == {
        "modelFormat": {"name": "triton"},
        "protocolVersion": "v2",
        "storageUri": "s3://models/digits",
    }
    assert parsed(tmp_path / "Digits_v2" / "config.pbtxt")["name"] == "Digits_v2"


def test_versions_stand_side_by_side_and_nothing_is_replaced(
    both: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = (both.folder, "--layout", "triton", "--out", tmp_path)
    assert run(*told) == 0
    assert run(*told, "--model-version", 2) == 0
    assert {"1", "2"} <= {path.name for path in (tmp_path / "repmlp-digits").iterdir()}
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]
    assert run(*told) == 2
    assert "exists: give another --model-version" in capsys.readouterr().err
    (tmp_path / "repmlp-digits" / "config.pbtxt").write_text("mine")
    assert run(*told, "--model-version", 3) == 2
    assert "config.pbtxt exists and is another" in capsys.readouterr().err
    assert not (tmp_path / "repmlp-digits" / "3").exists()


def test_a_full_disk_leaves_no_part_of_a_version(
    both: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "write_new", full)
    assert run(both.folder, "--layout", "triton", "--out", tmp_path / "models") == 5
    assert "No space left on device" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "models").rglob("*") if path.is_file()]
    assert not [path for path in (tmp_path / "models").rglob("*") if "partial" in path.name]


def test_a_changed_artifact_is_not_packed(bundle_folder: Path, tmp_path: Path) -> None:
    data = bytearray((bundle_folder / "model.onnx").read_bytes())
    data[-100] ^= 1
    (bundle_folder / "model.onnx").write_bytes(data)
    assert run(bundle_folder, "--layout", "triton", "--out", tmp_path / "models") == 2
    assert not (tmp_path / "models").exists()
