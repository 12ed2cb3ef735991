"""Threads follow what a process is allowed: quotas of control groups, affinity, OMP_NUM_THREADS."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from repmlp_deploy import Bundle, Predictor, export
from repmlp_deploy.runtime import cpus
from repmlp_deploy.runtime.cpus import thread_limit, usable_cpus


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of eight CPUs without limits; control groups lie in the folder that is returned."""
    monkeypatch.setattr(cpus, "_PROC", tmp_path / "self")
    monkeypatch.setattr(cpus, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "self").write_text("0::/\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_limits_the_runtime_chooses(machine: Path) -> None:
    write(machine / "cgroup" / "cpu.max", "max 100000\n")
    assert usable_cpus() == 8
    assert thread_limit() is None


@pytest.mark.parametrize(
    ("quota", "allowed"), [("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("x", 8), ("1 0", 8)]
)
def test_a_quota_of_version_2_counts_in_whole_cpus(machine: Path, quota: str, allowed: int) -> None:
    write(machine / "cgroup" / "cpu.max", quota)
    assert usable_cpus() == allowed


def test_the_smallest_quota_of_the_groups_around_a_process_counts(machine: Path) -> None:
    (machine / "self").write_text("12:cpuset:/\n0::/pods/../pod/box\n")
    write(machine / "cgroup" / "pods" / "pod" / "box" / "cpu.max", "600000 100000")
    write(machine / "cgroup" / "pods" / "cpu.max", "300000 100000")
    assert usable_cpus() == 3


def test_a_quota_of_version_1_is_read_from_its_controller(machine: Path) -> None:
    (machine / "self").write_text("4:cpu,cpuacct:/docker/1\n3:memory:/docker/1\n")
    group = machine / "cgroup" / "cpu,cpuacct"
    write(group / "cpu.cfs_quota_us", "400000")
    write(group / "cpu.cfs_period_us", "100000")
    assert usable_cpus() == 4
    write(group / "cpu.cfs_quota_us", "-1")
    assert usable_cpus() == 8


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(("said", "allowed"), [("3", 3), ("2,4", 2), ("0", 8), ("many", 8), ("-1", 8), ("9" * 99, 8)])
def test_the_environment_counts(monkeypatch: pytest.MonkeyPatch, said: str, allowed: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert usable_cpus() == allowed


@pytest.mark.usefixtures("machine")
def test_affinity_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert (usable_cpus(), thread_limit()) == (1, 1)


@pytest.fixture(scope="module")
def both(digits_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(digits_checkpoint, formats="onnx,openvino", out=tmp_path_factory.mktemp("cpus") / "bundle")


@pytest.mark.parametrize("artifact", ["onnx", "openvino"])
def test_both_runtimes_follow_the_limit(both: Bundle, machine: Path, artifact: str) -> None:
    write(machine / "cgroup" / "cpu.max", "100000 100000")
    with Predictor(both, format=artifact) as predictor:
        assert predictor.details["threads"] == 1
    with Predictor(both, format=artifact, threads=2) as predictor:
        assert predictor.details["threads"] == 2, "what was asked for"


@pytest.mark.parametrize(
    ("lines", "name", "instructions"),
    [
        ("model name\t: A CPU\nflags\t\t: fpu amx_int8 avx2\n\nmodel name\t: Another\n", "A CPU", ["avx2", "amx_int8"]),
        ("Features\t: fp asimd\nCPU part\t: 0xd0c\n", None, ["asimd"]),
        (None, None, []),
    ],
)
def test_the_processor_is_told_from_the_first_of_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str | None, name: str | None, instructions: list[str]
) -> None:
    if lines is not None:
        (tmp_path / "cpuinfo").write_text(lines)
    monkeypatch.setattr(cpus, "_INFO", tmp_path / "cpuinfo")
    assert cpus.cpu_name() == (name or platform.processor() or platform.machine())
    assert cpus.cpu_instructions() == instructions
