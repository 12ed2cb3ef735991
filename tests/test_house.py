"""The rooms stay small, and every module has its tests: in a file of its name, by import, or in the one named here."""

from __future__ import annotations

from pathlib import Path

import pytest

import house

COVERED_BY = {
    "repmlp_deploy.bench.targets": "bench/test_session.py",
    "repmlp_deploy.__main__": "cli/test_missing_packages.py",
    "repmlp_deploy.bench.measure.machine": "bench/test_session.py",
    "repmlp_deploy.bench.measure.profiling": "bench/test_subjects.py",
    "repmlp_deploy.bench.subjects.bundle": "bench/test_subjects.py",
    "repmlp_deploy.bench.subjects.openvino": "bench/test_subjects.py",
    "repmlp_deploy.bench.subjects.pytorch": "bench/test_subjects.py",
    "repmlp_deploy.bundle.manifest": "test_bundle.py",
    "repmlp_deploy.bundle.probe": "test_bundle.py",
    "repmlp_deploy.cli.shared.description": "convert/source/test_description.py",
    "repmlp_deploy.convert.source.card_file": "convert/source/test_description.py",
    "repmlp_deploy.cli.shared.engine_options": "convert/formats/tensorrt/test_options.py",
    "repmlp_deploy.cli.shared.engine_report": "convert/formats/tensorrt/test_build.py",
    "repmlp_deploy.cli.shared.export_options": "cli/test_commands.py",
    "repmlp_deploy.cli.shared.process": "cli/test_commands.py",
    "repmlp_deploy.convert.assembly": "convert/test_pipeline.py",
    "repmlp_deploy.convert.capture": "convert/graph/test_onnx_steps.py",
    "repmlp_deploy.convert.formats.checkpoint": "convert/formats/test_checkpoint_format.py",
    "repmlp_deploy.convert.formats.onnx": "convert/formats/test_formats.py",
    "repmlp_deploy.convert.formats.openvino_artifact": "convert/formats/test_openvino_export.py",
    "repmlp_deploy.convert.formats.tensorrt.artifact": "convert/formats/tensorrt/test_build.py",
    "repmlp_deploy.convert.formats.tensorrt.versions": "vendors/test_tensorrt_bindings.py",
    "repmlp_deploy.convert.formats.torch_program": "convert/test_pipeline.py",
    "repmlp_deploy.convert.graph.lowering.cast": "convert/graph/lowering/test_lower.py",
    "repmlp_deploy.convert.graph.lowering.lowered": "convert/graph/lowering/test_lower.py",
    "repmlp_deploy.convert.graph.lowering.patterns": "convert/graph/lowering/test_lower.py",
    "repmlp_deploy.convert.graph.lowering.quantize": "convert/graph/lowering/test_lower.py",
    "repmlp_deploy.convert.memory": "convert/test_pipeline.py",
    "repmlp_deploy.convert.provenance": "convert/test_pipeline.py",
    "repmlp_deploy.convert.source.unpickle": "convert/source/test_checkpoint.py",
    "repmlp_deploy.nets.blocks.conv_bn": "nets/test_blocks.py",
    "repmlp_deploy.nets.blocks.fc3": "nets/test_blocks.py",
    "repmlp_deploy.nets.networks.bounds": "test_bounds.py",
    "repmlp_deploy.nets.networks.input_size": "nets/test_networks_of_2021.py",
    "repmlp_deploy.nets.networks.mobilefacenet": "nets/test_task_networks.py",
    "repmlp_deploy.nets.networks.shapes": "nets/test_networks_of_2021.py",
    "repmlp_deploy.cli.map": "evaluation/test_mapping.py",
    "repmlp_deploy.evaluation.filling": "evaluation/test_mapping.py",
    "repmlp_deploy.evaluation.judging": "evaluation/test_ray_engine.py",
    "repmlp_deploy.evaluation.process_worker": "evaluation/test_process_engine.py",
    "repmlp_deploy.evaluation.sources": "evaluation/test_mapping.py",
    "repmlp_deploy.evaluation.tables": "evaluation/test_mapping.py",
    "repmlp_deploy.cli.serve": "serving/test_process.py",
    "repmlp_deploy.cli.shared.serving.config": "serving/test_process.py",
    "repmlp_deploy.cli.shared.serving.on_ray": "serving/hosts/ray/test_settings.py",
    "repmlp_deploy.runtime.ray_cluster": "serving/hosts/ray/test_process.py",
    "repmlp_deploy.serving.hosts.ray.loopback": "serving/hosts/ray/test_process.py",
    "repmlp_deploy.serving.hosts.ray.replica": "serving/hosts/ray/test_process.py",
    "repmlp_deploy.serving.hosts.ray.services": "serving/hosts/ray/test_process.py",
    "repmlp_deploy.serving.logs": "serving/test_process.py",
    "repmlp_deploy.serving.hosts.bodies": "serving/hosts/test_http.py",
    "repmlp_deploy.serving.images": "serving/hosts/test_http.py",
    "repmlp_deploy.serving.repository.choice": "serving/repository/test_repository.py",
    "repmlp_deploy.serving.repository.kserve": "serving/repository/test_repository.py",
    "repmlp_deploy.serving.repository.ovms": "serving/repository/test_repository.py",
    "repmlp_deploy.serving.repository.triton": "serving/repository/test_repository.py",
    "repmlp_deploy.serving.repository.writing": "serving/repository/test_repository.py",
    "repmlp_deploy.runtime.tensorrt.flavours": "runtime/tensorrt/test_engine.py",
    "repmlp_deploy.runtime.tensorrt.device_arrays": "runtime/tensorrt/test_runner.py",
}


def test_no_room_is_too_large_and_no_module_without_a_test() -> None:
    assert list(house.faults()) == []


def test_the_table_names_modules_and_files_that_exist() -> None:
    tests = Path(__file__).parent
    for module, file in COVERED_BY.items():
        assert (house.ROOT / Path(*module.split("."))).with_suffix(".py").is_file(), module
        assert (tests / file).is_file(), file


def test_a_large_room_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "repmlp_deploy"
    package.mkdir()
    (tmp_path / "tests").mkdir()
    for i in range(house.MOST_MODULES + 1):
        (package / f"m{i}.py").write_text("")
    (package / "m0.py").write_text("def long():\n" + "    pass\n" * (house.MOST_MODULE_LINES + 1))
    monkeypatch.setattr(house, "ROOT", tmp_path)
    monkeypatch.setattr(house, "PACKAGE", package)
    found = list(house.faults())
    assert "repmlp_deploy: 13 modules; at most 12" in found
    assert any("m0.py: 402 lines" in line for line in found)
    assert any("m0.py:1 long: 401 lines" in line for line in found)
    assert any("m5.py: no test file" in line for line in found)
