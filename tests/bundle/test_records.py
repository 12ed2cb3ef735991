"""What artifacts say of themselves is read as types, from every form that bundles have."""

from __future__ import annotations

import json

import pytest

from repmlp_deploy import Bundle
from repmlp_deploy.bundle import EngineReport, GraphRecord, Hop, Manifest
from repmlp_deploy.bundle.records import KeptNode
from repmlp_deploy.errors import BundleError


def test_an_engine_describes_itself(bundle: Bundle) -> None:
    report = bundle.artifact("trt-rtx").record(EngineReport)
    assert report.layers > 0
    assert report.profiles[0]["images"][0][0] == bundle.manifest.batch.min
    assert not report.options.refittable


def test_a_record_of_another_form_is_refused_in_one_line(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"the manifest's model\.onnx: version: Field required; export"):
        bundle.artifact("onnx").record(EngineReport)


def test_what_stays_in_float32_has_a_name() -> None:
    graph = GraphRecord.model_validate(
        {
            "lowered": {"MatMul": 3},
            "kept_fp32": [
                {"node": "node_conv", "op": "Conv", "module": "embed", "reason": "kept by pattern"},
                {"op": "ReduceMean", "count": 4, "reason": "sums"},
            ],
        }
    )
    assert [kept.name() for kept in graph.kept_fp32] == ["embed", "4 ReduceMean"]
    assert graph.kept_products() == ("node_conv",)
    assert KeptNode(op="Conv", reason="", node="node_conv").name() == "node_conv"


def test_the_file_keeps_both_forms_and_memory_has_one(bundle: Bundle) -> None:
    data = json.loads(bundle.manifest.to_json())
    assert data["inputs"] == []
    assert data["input"]["name"] == bundle.manifest.inputs[0].name
    assert Manifest.model_validate(data) == bundle.manifest
    several = data | {"inputs": [data["input"], data["input"] | {"name": "mask"}]}
    assert [spec.name for spec in Manifest.model_validate(several).inputs] == [data["input"]["name"], "mask"]


@pytest.mark.parametrize(
    ("row", "kind", "batch"),
    [
        ({"batch": 0, "passed": True}, "weights", None),
        ({"batch": 3, "passed": True}, "output", 3),
        ({"batch": 6, "passed": None}, "floor", 6),
    ],
)
def test_rows_of_older_bundles_get_their_kind(row: dict[str, object], kind: str, batch: int | None) -> None:
    numbers = {"max_abs": 0.0, "mean_abs": 0.0, "max_rel": 0.0, "between": None, "cosine": 1.0, "top1": None}
    hop = Hop.model_validate({"name": "merged", "floor": 1.0, "allowed": 8.0, **numbers, **row})
    assert (hop.kind, hop.batch) == (kind, batch)


@pytest.mark.parametrize(
    ("name", "artifact", "precision"),
    [
        ("merged", "", ""),
        ("simplified ONNX", "onnx", "fp32"),
        ("fp16 ONNX, emulated", "onnx", "fp16"),
        ("refitted ONNX", "onnx", ""),
        ("OpenVINO bf16", "openvino", "bf16"),
    ],
)
def test_rows_of_older_bundles_get_their_artifact(name: str, artifact: str, precision: str) -> None:
    numbers = {"max_abs": 0.0, "mean_abs": 0.0, "max_rel": 0.0, "between": None, "cosine": 1.0, "top1": None}
    row = {"name": name, "batch": 3, "passed": True, "floor": 1.0, "allowed": 8.0, **numbers}
    hop = Hop.model_validate(row)
    assert (hop.artifact, hop.precision) == (artifact, precision)


def test_the_origin_is_read_as_a_type(bundle: Bundle) -> None:
    origin = bundle.manifest.origin
    assert origin.checkpoint is not None
    assert origin.checkpoint.file == "repmlp-digits.safetensors"
    assert sum(origin.seconds.values()) > 0
