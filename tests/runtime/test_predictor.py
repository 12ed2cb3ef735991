import copy
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repmlp_deploy import Bundle, Prediction, Predictor, get_model
from repmlp_deploy.bundle import MANIFEST
from repmlp_deploy.card import data_root, load_card
from repmlp_deploy.errors import BundleError, ImageError, InputError, MissingDevice, VerificationError
from repmlp_deploy.runtime.images import preprocess
from repmlp_deploy.runtime.onnx import runner as onnx_runner
from support.openvino_bundle import with_openvino
from train_digits import digit_images, split_indices

SAMPLES = sorted((data_root() / "samples" / "digits").glob("*.png"))


@pytest.fixture
def predictor(bundle: Bundle) -> Predictor:
    return Predictor(bundle.folder)


def batch_of(n: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, 3, 32, 32)).astype(np.float32)


def test_the_digits_network_is_as_good_as_its_card_says_in_every_form(predictor: Predictor) -> None:
    """At least 97 % of the held-out quarter, and the same answers trained, merged and exported."""
    images, labels = digit_images()
    _, held_out = split_indices(labels)
    chosen = [images[i] for i in held_out]
    found = np.array([prediction.pred_label for prediction in predictor(chosen)])
    assert np.mean(found == labels[held_out]) >= 0.97

    model = get_model("repmlp-digits", pretrained=True)
    preprocessing = load_card("repmlp-digits").preprocessing
    inputs = torch.from_numpy(np.stack([preprocess(image.convert("RGB"), preprocessing) for image in chosen]))
    with torch.no_grad():
        trained = model(inputs).argmax(1).numpy()
        model.switch_to_deploy()
        merged = model(inputs).argmax(1).numpy()
        program = torch.export.load(predictor.bundle.folder / "model.pt2").module()
        traced = np.concatenate([program(part).argmax(1).numpy() for part in inputs.split(16)])
    assert np.array_equal(trained, found)
    assert np.array_equal(merged, found)
    assert np.array_equal(traced, found)


def test_one_image_gives_a_prediction_and_a_list_gives_a_list(predictor: Predictor) -> None:
    one = predictor(SAMPLES[3])
    assert isinstance(one, Prediction)
    assert (one.pred_label, one.pred_class) == (3, "3")
    assert one.pred_scores.shape == (10,)
    assert one.pred_scores.sum() == pytest.approx(1, abs=1e-6)
    assert one.pred_score == one["pred_score"] == pytest.approx(one.pred_scores.max())
    assert one.top(2)[0] == (3, one.pred_score)
    with pytest.raises(KeyError):
        one["top"]
    assert [p.pred_class for p in predictor([str(path) for path in SAMPLES])] == [str(i) for i in range(10)]
    assert predictor([]) == []
    array = np.asarray(Image.open(SAMPLES[3]).convert("RGB"))
    for source in (array, Image.open(SAMPLES[3]), SAMPLES[3].read_bytes(), (SAMPLES[3],)):
        result = predictor(source)
        label = result[0].pred_label if isinstance(result, list) else result.pred_label
        assert label == 3


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33, 50])
def test_any_number_of_samples_gives_the_answer_of_each(predictor: Predictor, n: int) -> None:
    """The artifact serves at most 16 at once."""
    x = batch_of(n)
    whole = predictor.logits(x)
    singly = np.concatenate([predictor.logits(x[i : i + 1]) for i in range(n)])
    assert whole.shape == (n, 10)
    np.testing.assert_allclose(whole, singly, rtol=0, atol=1e-4)


def test_a_batch_below_the_smallest_is_padded(bundle_folder: Path) -> None:
    data = json.loads((bundle_folder / MANIFEST).read_text())
    data["batch"]["min"] = 4
    (bundle_folder / MANIFEST).write_text(json.dumps(data))
    x = batch_of(18)
    expected = Predictor(bundle_folder.parent / "bundle").logits(x)
    np.testing.assert_allclose(Predictor(bundle_folder).logits(x[:2]), expected[:2], rtol=0, atol=1e-4)
    assert expected.shape == (18, 10)


def test_inputs_are_left_alone_and_outputs_are_the_callers(predictor: Predictor) -> None:
    x = batch_of(4)
    before = x.copy()
    first = predictor.logits(x)
    kept = first.copy()
    predictor.logits(batch_of(5))
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(x, before)
    first[:] = 0
    np.testing.assert_array_equal(predictor.logits(x), kept)
    np.testing.assert_array_equal(predictor.logits(x[::-1])[::-1], predictor.logits(x[::-1].copy())[::-1])


def test_numbers_may_have_their_bytes_in_the_other_order(predictor: Predictor) -> None:
    """As those of a FITS or an old `.npy` file; their bits were taken for other numbers."""
    x = batch_of(3)
    np.testing.assert_array_equal(predictor.logits(x.astype(">f4")), predictor.logits(x.astype("<f4")))


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (np.zeros((1, 3, 64, 64), np.float32), r"input is \(1, 3, 64, 64\); repmlp-digits takes \(N, 3, 32, 32\)"),
        (np.zeros((3, 32, 32), np.float32), r"input is \(3, 32, 32\)"),
        (np.zeros((1, 3, 32, 32)), "input is float64; repmlp-digits takes float32"),
        (np.zeros((0, 3, 32, 32), np.float32), "empty batch"),
        ([[1.0]], r"input is list; repmlp-digits takes a NumPy array \(N, 3, 32, 32\)"),
    ],
)
def test_a_batch_that_is_not_the_networks_is_refused(predictor: Predictor, batch: np.ndarray, said: str) -> None:
    with pytest.raises(InputError, match=said):
        predictor.logits(batch)


def test_an_image_that_is_none_is_refused(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        predictor([SAMPLES[0], tmp_path / "none.png"])


def test_threads_share_a_predictor(predictor: Predictor) -> None:
    x = batch_of(64)
    expected = predictor.logits(x)
    wrong = []

    def work(i: int) -> None:
        answers = [predictor.logits(x[i : i + 1]) for _ in range(20)]
        wrong.extend(i for answer in answers if not np.allclose(answer, expected[i : i + 1], atol=1e-4))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_self_check_passes_and_can_fail(bundle_folder: Path) -> None:
    with Predictor(bundle_folder) as predictor:
        sizes = [size for size, _ in predictor.self_check()]
    assert sizes == [1, 4]

    class Drifting:
        format, device, details = "onnx", "cpu", {}

        def run_all(self, batch: np.ndarray) -> list[np.ndarray]:
            return [predictor_runner.run_all(batch)[0] * np.float32(1.001)]

    predictor = Predictor(bundle_folder)
    predictor_runner = predictor._served.runner
    predictor._served.runner = Drifting()
    with pytest.raises(VerificationError, match="onnx on cpu at batch 1 differs from the trained network"):
        predictor.self_check()


def test_a_changed_artifact_is_not_run(bundle_folder: Path) -> None:
    path = bundle_folder / "model.onnx"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="was changed"):
        Predictor(bundle_folder)


def test_formats_and_devices_are_had_or_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleError, match="has no openvino artifact; it has"):
        Predictor(bundle, format="openvino")
    with pytest.raises(InputError, match="cannot run torch; it runs openvino, onnx"):
        Predictor(bundle, format="torch")
    with pytest.raises(InputError, match="device is 'tpu'; expected one of cpu, cuda"):
        Predictor(bundle, device="tpu")
    with pytest.raises(InputError, match="threads is 0"):
        Predictor(bundle, threads=0)
    with pytest.raises(InputError, match="array_order is 'GBR'"):
        Predictor(bundle, array_order="GBR")
    assert Predictor(bundle, device="cpu", threads=1).details["threads"] == 1
    with pytest.raises(MissingDevice, match=r"has no CUDAExecutionProvider.*repmlp-deploy\[gpu\]"):
        Predictor(bundle, device="cuda")
    # ONNX Runtime lists CUDA where it is compiled in, and falls back to the CPU where there is no GPU.
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnx_runner.ort, "get_available_providers", lambda: listed)
    real = onnx_runner.ort.InferenceSession
    monkeypatch.setattr(
        onnx_runner.ort, "InferenceSession", lambda *args, **_: real(*args, providers=["CPUExecutionProvider"])
    )
    with pytest.raises(MissingDevice, match="could not start CUDAExecutionProvider"):
        Predictor(bundle, device="cuda")
    assert Predictor(bundle).device == "cpu"


def test_a_bundle_that_nothing_can_run_says_what_to_export(bundle_folder: Path) -> None:
    data = json.loads((bundle_folder / MANIFEST).read_text())
    data["artifacts"] = {"torch": data["artifacts"]["torch"]}
    (bundle_folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"holds torch; Predictor runs .*onnx"):
        Predictor(bundle_folder)


@pytest.mark.parametrize("artifact", ["onnx", "openvino"])
@pytest.mark.timeout(120)
def test_closing_under_load_loses_no_call_under_way(bundle: Bundle, tmp_path: Path, artifact: str) -> None:
    served = with_openvino(bundle, tmp_path / "bundle") if artifact == "openvino" else bundle
    predictor = Predictor(served.folder, format=artifact)
    x = batch_of(3)
    expected = predictor.logits(x)
    started = threading.Barrier(9)

    def work() -> tuple[int, str]:
        done = 0
        started.wait()
        while True:
            try:
                got = predictor.logits(x)
            except InputError as error:
                return done, str(error)
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
            done += 1

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(work) for _ in range(8)]
        started.wait()
        predictor.close()
        results = [future.result() for future in futures]
    assert all("is closed; open another" in said for _, said in results)


def test_closing_waits_for_the_call_under_way(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave, order = threading.Event(), threading.Event(), []
    runner = predictor._served.runner
    run, close = runner.run_all, runner.close

    def slow(batch: np.ndarray) -> list[np.ndarray]:
        entered.set()
        leave.wait(20)
        order.append("answered")
        return run(batch)

    monkeypatch.setattr(runner, "run_all", slow)
    monkeypatch.setattr(runner, "close", lambda: (order.append("closed"), close()))
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(predictor.logits, batch_of(1))
        assert entered.wait(20)
        closing = pool.submit(predictor.close)
        with pytest.raises(TimeoutError):  # it must wait: the call is still under way
            closing.result(timeout=0.3)
        leave.set()
        assert answer.result().shape == (1, 10)
        closing.result()
    assert order == ["answered", "closed"]


def test_a_closed_predictor_says_so_and_closes_again(predictor: Predictor) -> None:
    predictor.close()
    predictor.close()
    for call in (lambda: predictor.logits(batch_of(1)), lambda: predictor(SAMPLES[3]), predictor.self_check):
        with pytest.raises(InputError, match="is closed; open another"):
            call()


def test_pickling_and_copying_say_what_to_do(predictor: Predictor) -> None:
    for act in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(InputError, match="open Predictor"):
            act(predictor)


@pytest.mark.parametrize(
    "wrong", [{"threads": "2"}, {"threads": 1.5}, {"threads": True}, {"cache": 3}, {"cache": b"x"}]
)
def test_options_of_the_wrong_type_are_one_clear_error(bundle: Bundle, wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match="expected"):
        Predictor(bundle.folder, **wrong)
