"""Every number and name from a card, a manifest or an option is bounded before anything is built from it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from repmlp_deploy import Bundle, Predictor, export
from repmlp_deploy.bundle import MANIFEST
from repmlp_deploy.card import data_root, load_card
from repmlp_deploy.convert.engine_options import EngineOptions
from repmlp_deploy.convert.options import LARGEST_BATCH, parse_batch, parse_profiles, parse_size
from repmlp_deploy.convert.source.own_network import make_own_network
from repmlp_deploy.errors import BundleError, CardError, InputError
from repmlp_deploy.nets.families import card_spec
from repmlp_deploy.nets.networks.bounds import Count, Depth

GOOD = (data_root() / "repmlp-digits.toml").read_text(encoding="utf-8")


def changed(start: str, line: str) -> str:
    lines = GOOD.splitlines()
    index = next(i for i, text in enumerate(lines) if text.startswith(start))
    lines[index] = line
    return "\n".join(lines)


NETWORKS = {
    "depths of a thousand millions": ("depths", "depths = [1000000000, 2]"),
    "a thousand depths": ("depths", f"depths = {[1] * 1_000}"),
    "channels of a thousand millions": ("channels", "channels = [1000000000, 1000000000]"),
    "a thousand kernels": ("kernels", f"kernels = {[1] * 1_000}"),
}
PARTS = {
    "mean that is no number": ("mean", "mean = [nan, 0.0, 0.0]"),
    "infinite std": ("std", "std = [inf, 1.0, 1.0]"),
    "labels above": ("labels", 'labels = "../../../../etc/passwd"'),
    "an absolute list of labels": ("labels", 'labels = "/etc/passwd"'),
    "a number of 5,000 digits": ("input_size", "input_size = [" + "9" * 5_000 + ", 32]"),
}
WEIGHTS = {
    "a file above": 'file = "../../x"',
    "an absolute file": 'file = "/etc/passwd"',
    "a file URL": 'url = "file:///etc/passwd"\nsha256_prefix = "00000000"',
    "plain HTTP": 'url = "http://host/x.pth"\nsha256_prefix = "00000000"',
    "no host": 'url = "https:///x.pth"\nsha256_prefix = "00000000"',
    "a password": 'url = "https://user:word@host/x.pth"\nsha256_prefix = "00000000"',
    "an escape": 'url = "https://host/\\u001b[2J"\nsha256_prefix = "00000000"',
    "a long URL": f'url = "https://host/{"x" * 5_000}"\nsha256_prefix = "00000000"',
}


@pytest.mark.parametrize("name", NETWORKS)
def test_hyper_parameters_beyond_any_network(name: str, tmp_path: Path) -> None:
    (tmp_path / "card.toml").write_text(changed(*NETWORKS[name]))
    with pytest.raises(CardError, match=r"network\."):
        card_spec(load_card(tmp_path / "card.toml"))


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_card(name: str, tmp_path: Path) -> None:
    (tmp_path / "card.toml").write_text(changed(*PARTS[name]))
    with pytest.raises(CardError) as caught:
        load_card(tmp_path / "card.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_inside_or_behind_https(name: str, tmp_path: Path) -> None:
    before, _, after = GOOD.partition("[weights]")
    rest = after.partition("\n[")[2]
    (tmp_path / "card.toml").write_text(f"{before}[weights]\n{WEIGHTS[name]}\n" + (f"\n[{rest}" if rest else ""))
    with pytest.raises(CardError, match=r"weights"):
        load_card(tmp_path / "card.toml")


@pytest.mark.parametrize("text", ["x = " + "[" * 100_000, "x = " + "{a = " * 5_000, "#" * (2 << 20), "\0"])
def test_texts_that_are_no_card(text: str, tmp_path: Path) -> None:
    (tmp_path / "card.toml").write_text(text)
    with pytest.raises(CardError):
        load_card(tmp_path / "card.toml")


def test_files_that_are_no_card(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "loop.toml").symlink_to(tmp_path / "loop.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    for name in ("pipe", "loop", "bytes", "n" * 300):
        with pytest.raises(CardError):
            load_card(tmp_path / f"{name}.toml")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"schema": ' + "9" * 5_000 + "}", "", "[]"])
def test_texts_that_are_no_manifest(text: str, bundle_folder: Path) -> None:
    (bundle_folder / MANIFEST).write_text(text)
    with pytest.raises(BundleError) as caught:
        Bundle.load(bundle_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mean", [float("nan"), float("inf")])
def test_a_manifest_with_a_mean_that_is_no_number(mean: float, bundle_folder: Path) -> None:
    data = json.loads((bundle_folder / MANIFEST).read_text())
    data["preprocessing"]["mean"][0] = mean
    (bundle_folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="preprocessing"):
        Bundle.load(bundle_folder)


@pytest.mark.parametrize("text", ["1000000000", "9" * 5_000, str(LARGEST_BATCH + 1), "1:8:99999999", "٣", ""])
def test_batches(text: str) -> None:
    with pytest.raises(InputError, match="--batch is"):
        parse_batch(text)


def test_ranges_and_sizes() -> None:
    assert parse_batch(LARGEST_BATCH).max == LARGEST_BATCH
    with pytest.raises(InputError, match="1000 ranges; at most 16"):
        parse_profiles(",".join(["1:2:4"] * 1000))
    for text in ("1000000000x1", "9" * 5_000 + "x1", "0x0"):
        with pytest.raises(InputError, match="--input-size is"):
            parse_size(text)


@pytest.mark.parametrize("size", [1e300, float("inf"), float("nan"), 0.0, -1.0])
def test_workspaces(size: float) -> None:
    with pytest.raises(InputError, match="--workspace-gb is"):
        EngineOptions(workspace_gb=size)


@pytest.mark.parametrize("factory", ["os:system", "sys:exit", "builtins:exit", "os:_exit", "json:loads"])
def test_a_module_of_the_standard_library_holds_no_network(factory: str) -> None:
    with pytest.raises(InputError, match="holds no network"):
        make_own_network(factory)


@pytest.mark.parametrize(
    ("code", "said"),
    [("raise SystemExit(0)", "ends the process"), ("raise TypeError('needs an argument')", "needs an argument")],
)
def test_a_factory_that_ends_the_process(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits_checkpoint: Path
) -> None:
    name = f"factory_{len(code)}"
    (tmp_path / f"{name}.py").write_text(f"def make():\n    {code}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        export(digits_checkpoint, module=f"{name}:make", input_size=(32, 32), out=tmp_path / "out")


@pytest.mark.parametrize("threads", [0, -1, 1_000_000])
def test_threads(threads: int, bundle: Bundle) -> None:
    with pytest.raises(InputError, match="expected 1 to 1024"):
        Predictor(bundle, threads=threads)


def test_the_bounds_have_room_for_real_networks() -> None:
    assert Count
    assert Depth
    for path in sorted(data_root().glob("*.toml")):
        card_spec(load_card(path.stem))


@pytest.mark.parametrize(
    "name", ["repmlpnet-t224", "repmlp-mobilefacenet", "pure-mlp-digits", "repmlpnet-b224-backbone"]
)
def test_lists_of_different_lengths_are_told_by_name(name: str) -> None:
    card = load_card(name)
    shorter = {**card.network, "depths": card.network["depths"][:-1]}
    with pytest.raises(CardError, match=r"one entry per stage: .*depths has \d"):
        card_spec(card.model_copy(update={"network": shorter}))
