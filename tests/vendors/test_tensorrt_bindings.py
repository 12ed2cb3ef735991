"""Our sources ask only for what the real TensorRT bindings of the oldest and the newest supported version have.

The wheels hold NVIDIA's Python module without its libraries. Empty shared objects take their place, so that the module
can be listed: every class, enum member, method and docstring signature. No GPU is needed, and nothing of it can run.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from types import ModuleType
from typing import Any

import pytest

from repmlp_deploy.convert.formats.tensorrt import flavours, network_types, refit, versions
from repmlp_deploy.errors import BuildError
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.runtime.tensorrt import engine, log
from support.fakes.gpu import Gpu
from support.fakes.tensorrt import make_tensorrt
from support.vendors.packages import unpacked
from support.vendors.published import list_module
from support.vendors.stand_ins import library_folder
from support.vendors.uses import (
    BUILDER_CLASSES,
    BUILDER_USES,
    BUILDERS,
    CLASSES,
    PACKAGE,
    RUNTIME,
    RUNTIME_USES,
    Use,
    find,
    fits,
    signatures,
    uses,
    uses_in,
)

OLDEST, NEWEST = "10.13.3.9", "11.4.0.106"

RTX_ONLY = re.compile(r"(CudaGraphStrategy|ComputeCapability|IRuntimeCache|IRuntimeConfig)\b|.*compute_capabilit")
"""Names that our code uses only for engines of TensorRT-RTX."""

USES = [use for use in RUNTIME_USES + BUILDER_USES if not RTX_ONLY.match(".".join((use.owner, *use.names)).strip("."))]


@pytest.fixture(scope="module", params=[OLDEST, NEWEST])
def trt(request: pytest.FixtureRequest) -> ModuleType:
    return bindings(request.param)


@cache
def bindings(version: str) -> ModuleType:
    """Return the bindings of a version, listed in a child process."""
    folder = unpacked(f"tensorrt_cu12_bindings=={version}")
    return list_module("tensorrt_bindings", [folder], library_folder(int(version.partition(".")[0])))


def path_of(use: Use) -> str:
    return ".".join(filter(None, (use.owner, *use.names)))


def complaint(module: Any, use: Use) -> str | None:
    """Say what is wrong with a use in a module; None if nothing is."""
    if path_of(use) in versions.DIFFERENCES:
        return None
    try:
        value = find(module, use)
    except AttributeError:
        return f"{use}: TensorRT {module.__version__} lacks it"
    if use.call is not None and callable(value) and signatures(value) and not fits(value, use.call):
        return f"{use}: TensorRT {module.__version__} takes {signatures(value)}"
    return None


def test_the_listing_is_of_the_real_bindings(trt: ModuleType) -> None:
    assert trt.__version__ in (OLDEST, NEWEST)
    assert len(vars(trt)) > 200
    assert (["network", "config"], 2) in signatures(trt.Builder.build_serialized_network)
    assert isinstance(trt.ICudaEngine.num_io_tensors, property)


def test_all_that_our_code_uses_is_there(trt: ModuleType) -> None:
    assert len(USES) > 90
    assert [said for use in USES if (said := complaint(trt, use))] == []


@pytest.mark.parametrize(
    ("path", "table"),
    [
        (
            "DataType",
            [
                *engine._NUMPY,
                *refit._TYPES.values(),
                *(p.tensorrt_type.upper() for p in PRECISIONS.values() if p.tensorrt_type),
            ],
        ),
        ("LayerType", [*network_types._PRODUCTS, "SHUFFLE", "DEQUANTIZE"]),
        ("ILogger.Severity", list(log._LEVELS)),
        ("BuilderFlag", ["TF32", "REFIT", "STRIP_PLAN", "VERSION_COMPATIBLE"]),
        ("NetworkDefinitionCreationFlag", ["STRONGLY_TYPED"]),
    ],
)
def test_names_that_our_code_compares_as_text_are_members(trt: ModuleType, path: str, table: list[str]) -> None:
    members = versions.find_name(trt, path)
    assert [name for name in table if not hasattr(members, name)] == []


def test_the_members_that_are_compared_as_text_are_all_in_the_list_above() -> None:
    """A further `.type.name == "…"` in a source must join it."""
    source = "".join(file.read_text("utf-8") for file in BUILDERS + RUNTIME)
    assert set(re.findall(r'type\.name (?:==|in) \(?"(\w+)"', source)) <= {"SHUFFLE", "DEQUANTIZE"}


@pytest.mark.parametrize("option", sorted(set(flavours._NEEDS) - set(flavours.FLAVOURS["trt"].lacks)))
def test_what_an_option_needs_is_there(trt: ModuleType, option: str) -> None:
    assert versions.has_name(trt, flavours._NEEDS[option])


def test_creation_flags_are_those_of_the_version() -> None:
    ten, eleven = bindings(OLDEST), bindings(NEWEST)
    assert flavours.creation_flags(ten) == 1 << ten.NetworkDefinitionCreationFlag.STRONGLY_TYPED | 1
    assert flavours.creation_flags(eleven) == 1 << eleven.NetworkDefinitionCreationFlag.STRONGLY_TYPED


def test_the_table_of_differences_is_complete_and_true() -> None:
    """It has every name our sources mention that one version has and the other lacks, and says rightly which."""
    ten, eleven = names(bindings(OLDEST)), names(bindings(NEWEST))
    source = "".join(file.read_text("utf-8") for file in BUILDERS + RUNTIME)
    used = {path_of(use) for use in RUNTIME_USES + BUILDER_USES} | set(re.findall(r"[A-Z]\w+\.\w+", source))
    assert (ten ^ eleven) & used == set(versions.DIFFERENCES)
    for path, difference in versions.DIFFERENCES.items():
        assert (path in ten) == (difference.since is None), path
        assert (path in eleven) == (difference.until is None), path
        assert difference.without


def names(module: ModuleType) -> set[str]:
    """Return every public name and member of a module, dotted."""
    classes = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    inside = {f"{name}.{m}" for name, value in classes.items() if inspect.isclass(value) for m in vars(value)}
    return {path for path in {*classes, *inside} if "._" not in path}


def test_signatures_that_our_code_calls_are_the_same_in_both_versions() -> None:
    ten, eleven = bindings(OLDEST), bindings(NEWEST)
    apart = {
        path_of(use)
        for use in USES
        if use.call is not None and path_of(use) not in versions.DIFFERENCES
        for a, b in [(find(ten, use), find(eleven, use))]
        if callable(a) and signatures(a) != signatures(b) and not all(fits(value, use.call) for value in (a, b))
    }
    assert apart == set()


REMOVED = [
    "trt.BuilderFlag.FP16",
    "trt.BuilderFlag.INT8",
    "trt.NetworkDefinitionCreationFlag.IMPLICIT_BATCH",
    "config.int8_calibrator",
    "trt.IInt8EntropyCalibrator2",
    "layer.precision",
]


@pytest.mark.parametrize("misuse", REMOVED)
def test_what_11_removed_is_noticed(misuse: str) -> None:
    (use,) = uses_in(misuse, BUILDER_CLASSES)
    assert complaint(bindings(NEWEST), use)


ADDED = [
    "trt.LayerType.KV_CACHE_UPDATE",
    "trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE",
    "trt.IAttention",
    "trt.MoEActType",
]


@pytest.mark.parametrize("misuse", ADDED)
def test_what_10_lacks_is_noticed(misuse: str) -> None:
    """The newest release has it, so a test with that one alone would pass."""
    (use,) = uses_in(misuse, BUILDER_CLASSES)
    assert complaint(bindings(OLDEST), use)
    assert complaint(bindings(NEWEST), use) is None


@pytest.mark.parametrize(
    "misuse",
    [
        "builder.build_serialized_network(network)",
        "builder.build_engine(network, config)",
        "config.set_memory_pool_limit(pool=1, pool_bytes=2)",
        "config.set_timing_cache(cache)",
        "refitter.set_named_weights(key)",
        "parser.parse(graph, 'path', 3)",
    ],
)
def test_a_builder_call_with_other_arguments_is_noticed(trt: ModuleType, misuse: str) -> None:
    (use,) = uses_in(misuse, BUILDER_CLASSES)
    assert complaint(trt, use)


@pytest.mark.parametrize(
    "misuse",
    ["context.execute_async_v2(bindings, stream)", "context.set_input_shape(name)", "engine.get_binding_name(0)"],
)
def test_a_runtime_call_of_another_version_is_noticed(trt: ModuleType, misuse: str) -> None:
    (use,) = uses_in(misuse, CLASSES)
    assert complaint(trt, use)


def test_misuse_planted_in_our_own_source_is_noticed(trt: ModuleType) -> None:
    """The reader sees it in the midst of a real module too."""
    source = (PACKAGE / "convert" / "formats" / "tensorrt" / "build.py").read_text("utf-8")
    planted = source.replace("builder.create_builder_config()", "builder.create_builder_config(8)")
    assert planted != source
    found = [said for use in uses_in(planted, BUILDER_CLASSES) if (said := complaint(trt, use))]
    assert [said for said in found if "create_builder_config" in said]


def test_the_stand_in_for_tensorrt_has_nothing_that_tensorrt_lacks(trt: ModuleType) -> None:
    fake = make_tensorrt(Gpu(), "tensorrt", trt.__version__, {})
    for name, stand_in in vars(fake).items():
        if not isinstance(stand_in, type) or RTX_ONLY.match(name):
            continue
        for member in [key for key in vars(stand_in) if not key.startswith("_")]:
            if RTX_ONLY.match(f"{name}.{member}") or (name, member) in FOR_RTX:
                continue
            original = getattr(getattr(trt, name), member)
            if inspect.isfunction(vars(stand_in)[member]):
                own = list(inspect.signature(getattr(stand_in, member)).parameters)[1:]
                assert any(own == parameters for parameters, _ in signatures(original)), (name, member)


FOR_RTX: set[tuple[str, str]] = set()


def test_only_these_modules_are_read() -> None:
    assert list(uses([], CLASSES)) == []
    assert {file.stem for file in BUILDERS} >= {"build", "refit", "timing_cache", "network_types"}
    assert {file.stem for file in RUNTIME} >= {"engine", "worker", "runner", "log"}


def test_refitting_is_refused_where_the_engine_could_not_be_refitted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "find_gpus", lambda: ("a GPU",))
    monkeypatch.setattr(refit, "check_flavour", lambda _: bindings(NEWEST))
    assert refit.check_refit("trt").__version__ == NEWEST
    monkeypatch.setattr(refit, "check_flavour", lambda _: bindings(OLDEST))
    with pytest.raises(BuildError, match=r"tensorrt 10\.13\.3\.9 has no .*INCLUDE_REFIT.* tensorrt 10\.14 has it"):
        refit.check_refit("trt")
