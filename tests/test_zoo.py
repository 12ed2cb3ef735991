import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repmlp_deploy import get_model, inference_model
from repmlp_deploy.card import Weights, data_root, load_card
from repmlp_deploy.errors import CardError, CheckpointError, InputError
from repmlp_deploy.zoo import cache_folder, download_weights

SAMPLE = data_root() / "samples" / "digits" / "3-0045.png"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder on a local web server, and its address."""
    folder = tmp_path / "www"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REPMLP_CACHE", str(tmp_path / "cache"))


def test_a_model_can_be_had_fresh_from_a_path_or_with_its_own_weights(digits_checkpoint: Path) -> None:
    own = get_model("repmlp-digits", pretrained=True)
    path = get_model("repmlp-digits", pretrained=str(digits_checkpoint))
    fresh = get_model("repmlp-digits")
    assert torch.equal(own.head.weight, path.head.weight)
    assert not torch.equal(own.head.weight, fresh.head.weight)
    assert not own.training
    assert own.card.name == "repmlp-digits"
    with pytest.raises(CardError, match=r"did you mean repmlp-digits\?"):
        get_model("repmlp-digit")
    with pytest.raises(CheckpointError, match="does not fit repmlpnet-t224"):
        get_model("repmlpnet-t224", pretrained=digits_checkpoint)
    with pytest.raises(CardError, match="names no weights to download"):
        get_model("repmlpnet-t224", pretrained=True)


def test_inference_reads_as_in_mmpretrain_before_and_after_merging() -> None:
    model = get_model("repmlp-digits", pretrained=True)
    before = inference_model(model, SAMPLE)
    model.backbone.switch_to_deploy()
    after = inference_model(model, str(SAMPLE))
    assert set(before) == {"pred_label", "pred_class", "pred_score", "pred_scores"}
    assert (before["pred_label"], before["pred_class"]) == (after["pred_label"], after["pred_class"]) == (3, "3")
    np.testing.assert_allclose(after["pred_scores"], before["pred_scores"], rtol=0, atol=1e-6)
    assert inference_model("repmlp-digits", SAMPLE)["pred_label"] == 3


def test_arrays_are_bgr_as_mmpretrain_expects() -> None:
    model = get_model("repmlp-digits", pretrained=True)
    colours = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    as_image = inference_model(model, Image.fromarray(colours))["pred_scores"]
    np.testing.assert_array_equal(inference_model(model, colours[:, :, ::-1])["pred_scores"], as_image)
    assert not np.array_equal(inference_model(model, colours)["pred_scores"], as_image)


def test_a_network_without_labels_gives_no_class_name() -> None:
    model = get_model(load_card("repmlp-digits").model_copy(update={"labels": None}))
    assert "pred_class" not in inference_model(model, SAMPLE)
    with pytest.raises(InputError, match="carries no card"):
        inference_model(torch.nn.Linear(2, 2), SAMPLE)


def card_at(url: str, digest: str) -> object:
    return load_card("repmlp-digits").model_copy(update={"weights": Weights(url=url, sha256_prefix=digest)})


def test_weights_are_downloaded_once_and_checked(served: tuple[Path, str], digits_checkpoint: Path) -> None:
    folder, address = served
    data = digits_checkpoint.read_bytes()
    (folder / "w.safetensors").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()[:8]
    card = card_at(f"{address}/w.safetensors", digest)
    model = get_model(card, pretrained=True, progress=False)
    assert inference_model(model, SAMPLE)["pred_label"] == 3
    assert [path.name for path in cache_folder().iterdir()] == [f"w-{digest}.safetensors"]
    (folder / "w.safetensors").unlink()
    get_model(card, pretrained=True, progress=False)


def test_cards_whose_weights_have_one_file_name_get_their_own(served: tuple[Path, str]) -> None:
    folder, address = served
    kept = []
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "weights.pth").write_text(name)
        card = card_at(f"{address}/{name}/weights.pth", hashlib.sha256(name.encode()).hexdigest())
        kept.append(download_weights(card, progress=False).read_text())
    assert kept == ["a", "b"]


def test_a_kept_file_with_another_content_is_downloaded_again(served: tuple[Path, str]) -> None:
    folder, address = served
    (folder / "w.pth").write_bytes(b"right")
    card = card_at(f"{address}/w.pth", hashlib.sha256(b"right").hexdigest()[:8])
    kept = download_weights(card, progress=False)
    kept.write_bytes(b"wrong")
    assert download_weights(card, progress=False).read_bytes() == b"right"
    kept.write_bytes(b"wrong")
    (folder / "w.pth").unlink()
    with pytest.raises(InputError, match="could not download"):
        download_weights(card, progress=False)


def test_a_file_name_that_no_disk_takes_is_one_clear_error(served: tuple[Path, str]) -> None:
    with pytest.raises(InputError, match="File name too long"):
        download_weights(card_at(f"{served[1]}/{'n' * 300}.pth", "0" * 8), progress=False)


def test_weights_that_are_not_what_the_card_says_are_not_kept(served: tuple[Path, str]) -> None:
    folder, address = served
    (folder / "w.pth").write_bytes(b"something else")
    with pytest.raises(InputError, match="is not what repmlp-digits names"):
        download_weights(card_at(f"{address}/w.pth", "0" * 8), progress=False)
    assert list(cache_folder().iterdir()) == []


def test_offline_says_what_to_fetch_and_where_to_put_it(served: tuple[Path, str]) -> None:
    _, address = served
    with pytest.raises(
        InputError, match=r"could not download .*/none.pth: File not found; .*pretrained='path/to/none.pth'"
    ):
        download_weights(card_at(f"{address}/none.pth", "0" * 8), progress=False)
    with pytest.raises(InputError, match=r"could not download .*refused"):
        download_weights(card_at("http://127.0.0.1:9/w.pth", "0" * 8), progress=False)


def test_mmpretrains_names_have_addresses_with_checked_digests() -> None:
    for name in ("repmlp-base_3rdparty_8xb64_in1k", "repmlp-base_3rdparty_8xb64_in1k-256px"):
        weights = load_card(name).weights
        assert weights is not None
        assert weights.url is not None
        assert weights.sha256_prefix is not None
        assert weights.url.endswith(f"-{weights.sha256_prefix}.pth")
