"""Manifests, cards, checkpoints, layouts and pictures changed at random: one of our errors, or a result."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hostile.case import Kit
from hostile.images import FORMATS
from repmlp_deploy import Bundle, load_card
from repmlp_deploy.bundle import MANIFEST, Probe
from repmlp_deploy.card import data_root
from repmlp_deploy.convert.source.checkpoint import read_checkpoint
from repmlp_deploy.convert.source.loading import infer_card
from repmlp_deploy.convert.source.state_dict import find_state_dict
from repmlp_deploy.errors import RepMLPError
from repmlp_deploy.runtime.images import open_image

bounded = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
few = settings(bounded, max_examples=25)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
changes = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8), st.integers(0, 8)), min_size=1, max_size=6)


@contextlib.contextmanager
def our_errors() -> Iterator[None]:
    """Let a refusal pass if it is one of ours."""
    with contextlib.suppress(RepMLPError):
        yield


def changed(data: bytes, edits: list[tuple[float, bytes, int]]) -> bytes:
    """Replace, insert or remove bytes at places given as shares of the length."""
    for share, new, removed in edits:
        at = int(share * len(data))
        data = data[:at] + new + data[at + removed :]
    return data


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in nested dictionaries and lists."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


@pytest.fixture(scope="module")
def fuzzed(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kit.copy_bundle(tmp_path_factory.mktemp("fuzz"))


@bounded
@given(data=st.data())
def test_manifests_with_other_values(data: st.DataObject, kit: Kit, fuzzed: Path) -> None:
    content = json.loads((kit.bundle / MANIFEST).read_text(encoding="utf-8"))
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(list(places(content))))
        inner = content
        for key in way:
            inner = inner[key]
        inner[last] = data.draw(values)
    (fuzzed / MANIFEST).write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
    with our_errors():
        bundle = Bundle.load(fuzzed)
        assert bundle.manifest.verdict is not None
        bundle.probe()


@bounded
@given(edits=changes)
def test_manifests_with_other_bytes(edits: Any, kit: Kit, fuzzed: Path) -> None:
    (fuzzed / MANIFEST).write_bytes(changed((kit.bundle / MANIFEST).read_bytes(), edits))
    with our_errors():
        Bundle.load(fuzzed)


@bounded
@given(edits=changes)
def test_probes_with_other_bytes(edits: Any, kit: Kit) -> None:
    with our_errors():
        Probe.from_bytes(changed((kit.bundle / "probe.npz").read_bytes(), edits))


@bounded
@given(edits=changes, number=st.integers(0, 1 << 30))
def test_cards_with_other_bytes(edits: Any, number: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / f"card-{number}.toml"
    path.write_bytes(changed((data_root() / "repmlp-digits.toml").read_bytes(), edits))
    with our_errors():
        load_card(path)


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(27 * 19 * 3, dtype=np.uint8).reshape(27, 19, 3)).save(buffer, kind)
    return buffer.getvalue()


PICTURES = {kind: picture(kind) for kind in FORMATS.values()}


@bounded
@given(edits=changes, kind=st.sampled_from(sorted(PICTURES)))
def test_pictures_with_other_bytes(edits: Any, kind: str) -> None:
    with our_errors():
        assert open_image(changed(PICTURES[kind], edits)).mode == "RGB"


@few
@given(edits=changes, zipped=st.booleans())
def test_checkpoints_with_other_bytes(edits: Any, tmp_path_factory: pytest.TempPathFactory, *, zipped: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.pth"
    buffer = io.BytesIO()
    torch.save({"a.fc3.weight": torch.ones(3), "n": 1}, buffer, _use_new_zipfile_serialization=zipped)
    path.write_bytes(changed(buffer.getvalue(), edits))
    with our_errors():
        read_checkpoint(path)


@few
@given(content=values)
def test_checkpoints_of_other_content(content: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.pt"
    path.write_bytes(pickle.dumps(content))
    with our_errors():
        read_checkpoint(path)


parts = st.sampled_from(
    ["stages", "0", "1", "99", "x", "", "module", "fc3", "weight", "repmlp_block", "repconv", "units", "conv", "bn"]
)


names = st.lists(parts, min_size=1, max_size=5).map(".".join)


@few
@given(
    added=st.dictionaries(names, st.lists(st.integers(0, 4), max_size=4), max_size=4),
    renamed=st.lists(st.tuples(st.floats(0, 0.999), names), max_size=3),
)
def test_layouts_with_other_keys(
    added: dict[str, list[int]], renamed: list[tuple[float, str]], digits_state: dict[str, torch.Tensor]
) -> None:
    state = dict(digits_state)
    for share, name in renamed:
        state[name] = state.pop(list(state)[int(share * len(state))])
    state |= {key: torch.zeros(shape) for key, shape in added.items()}
    with our_errors():
        found = find_state_dict(state)
        infer_card(found.shapes(), family=found.layout.family, layout=found.layout.name, merged=found.merged)
