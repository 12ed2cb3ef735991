import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from repmlp_deploy import Bundle, Predictor, export
from repmlp_deploy.bundle import hash_file
from repmlp_deploy.card import data_root
from repmlp_deploy.cli import eval as eval_cli
from repmlp_deploy.cli.eval import eval_command
from repmlp_deploy.cli.shared.console import _run, typer
from repmlp_deploy.convert.source.description import Description
from repmlp_deploy.errors import ImageError, InputError, OutputError
from repmlp_deploy.evaluation import loop
from repmlp_deploy.evaluation.datasets import Dataset, Sample, read_dataset
from repmlp_deploy.evaluation.judging import Judged
from repmlp_deploy.evaluation.loop import evaluate, state_key
from repmlp_deploy.evaluation.metrics import TALLIES, ClassTally, MaskTally, PairTally, best_threshold, verification
from repmlp_deploy.reading import DiskError
from repmlp_deploy.runtime import images as image_files
from support.networks import randomize
from support.own_networks import Scorer
from support.task_cases import save_network, small_network
from train_digits import digit_images, split_indices

DIGITS = data_root() / "weights" / "repmlp-digits.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPMLP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return export(DIGITS, formats="onnx", batch="1:16:64", out=tmp_path_factory.mktemp("eval") / "digits")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """The held-out quarter as an ImageNet-style folder."""
    root = tmp_path_factory.mktemp("held-out")
    images, labels = digit_images()
    for index in split_indices(labels)[1]:
        (root / str(labels[index])).mkdir(exist_ok=True)
        images[index].save(root / str(labels[index]) / f"{index:04d}.png")
    return root


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmenter")
    checkpoint = save_network(small_network("pspnet"), folder / "net.pth")
    return checkpoint, export(checkpoint, batch="1:2:4", out=folder / "bundle")


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder")
    checkpoint = save_network(small_network("mobilefacenet"), folder / "net.pth")
    return checkpoint, export(checkpoint, batch="1:2:4", out=folder / "bundle")


def run(capsys, *arguments):
    app = typer.Typer()
    app.command()(eval_command)
    code = _run(typer.main.get_command(app), [str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def small_folder(root, per_class=2):
    for digit in range(10):
        (root / str(digit)).mkdir(parents=True)
        for i in range(per_class):
            Image.new("L", (8, 8), 20 * digit + i).save(root / str(digit) / f"{i}.png")
    return root


def scene(root, size=(60, 80), masks=None):
    """Crops of the two sample photographs, with masks of two halves unless others are given."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    halves = np.zeros(size, np.uint8)
    halves[:, size[1] // 2 :] = 3
    halves[:3] = 255
    for i, photograph in enumerate(load_sample_images().images):
        Image.fromarray(photograph[: size[0], : size[1]]).save(root / "images" / f"{i}.png")
        Image.fromarray(halves if masks is None else masks[i]).save(root / "masks" / f"{i}.png")
    return root


def test_the_held_out_digits_score_what_training_measured(digits, held_out, capsys):
    code, out, err = run(capsys, digits.folder, "--data", held_out, "--ckpt", DIGITS, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["count"] == 450
    assert report["scores"]["onnx"]["right"] == 449
    assert report["scores"]["onnx"]["top1"] == 449 / 450
    assert report["scores"]["onnx"]["agreement"] == 1
    assert report["scores"]["trained"]["right"] == 449
    assert report["read"] == "folders matched by name"
    code, out, _ = run(capsys, digits.folder, "--data", held_out)
    assert code == 0
    assert "99.78 %" in out


def test_a_network_of_ones_own_is_scored_beside_its_bundle(tmp_path, capsys):
    network = randomize(Scorer())
    torch.save(network.state_dict(), tmp_path / "own.pth")
    factory = "support.own_networks:Scorer"
    described = Description(mean=(128.0,) * 3, std=(64.0,) * 3)
    bundle = export(tmp_path / "own.pth", module=factory, description=described, batch="1:2:4", out=tmp_path / "bundle")
    listed = tmp_path / "list.txt"
    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    listed.write_text("".join(f"{i}.png {i % 2}\n" for i in range(3)))
    told = (bundle.folder, "--data", listed, "--json")
    code, out, err = run(capsys, *told, "--ckpt", tmp_path / "own.pth", "--module", factory)
    assert code == 0, err
    assert json.loads(out)["scores"]["onnx"]["agreement"] == 1
    origins = [eval_cli._Origin(tmp_path / "own.pth", None, module) for module in (factory, None)]
    same, other = origins[0].run(bundle), lambda batch: 2 * origins[0].run(bundle)(batch)
    known = origins[0].identity(bundle, same)
    assert known == origins[0].identity(bundle, same)
    assert known != origins[0].identity(bundle, other), "what the factory makes may have been edited"
    assert origins[1].identity(bundle, same) == hash_file(tmp_path / "own.pth"), "as in states of earlier versions"
    for options, message in (
        (("--ckpt", tmp_path / "own.pth"), "pass --module PACKAGE.MODULE:FACTORY"),
        (("--module", factory), "pass --ckpt FILE"),
        (("--card", "x"), "pass --ckpt FILE"),
        (("--ckpt", tmp_path / "gone.pth"), "no such file"),
        (("--ckpt", tmp_path), "is not a regular file"),
    ):
        code, _, err = run(capsys, *told, *options)
        assert code == 2
        assert message in err


def test_wrong_labels_are_counted_wrong(digits, held_out, tmp_path, capsys):
    images = sorted(held_out.glob("3/*.png"))[:10]
    lines = [f"{path} {3 if i < 4 else 5}" for i, path in enumerate(images)]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(lines))
    code, out, _ = run(capsys, digits.folder, "--data", listed, "--json")
    assert code == 0
    assert json.loads(out)["scores"]["onnx"]["top1"] == 0.4


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(digits, held_out, tmp_path):
    state = tmp_path / "state.json"
    dataset = read_dataset(held_out, digits.manifest)
    key = state_key(digits.manifest, ["onnx"], dataset)
    with Predictor(digits) as predictor:
        runs = {"onnx": predictor.logits}
        whole = evaluate(runs, digits.manifest, dataset)
        seen = []

        def stop_half_way(batch):
            if sum(seen) >= 220:
                raise KeyboardInterrupt
            seen.append(len(batch))
            return predictor.logits(batch)

        with pytest.raises(KeyboardInterrupt):
            evaluate({"onnx": stop_half_way}, digits.manifest, dataset, state_file=state, key=key)
        assert 220 <= json.loads(state.read_text())["done"] < 450
        rest = []

        def counted(batch):
            rest.append(len(batch))
            return predictor.logits(batch)

        resumed = evaluate({"onnx": counted}, digits.manifest, dataset, state_file=state, key=key)
    assert resumed.scores == whole.scores
    assert resumed.count == whole.count == 450
    assert resumed.resumed + sum(rest) == 450
    assert resumed.resumed >= 220
    assert not state.exists()


def test_names_that_are_no_text_and_paths_that_lead_nowhere(digits, tmp_path, capsys, monkeypatch):
    folder = small_folder(tmp_path / "data", per_class=1)
    (folder / "0" / "0.png").rename(folder / "0" / os.fsdecode(b"caf\xe9.png"))
    (folder / "1" / "loop.png").symlink_to("loop.png")
    code, out, err = run(capsys, digits.folder, "--data", folder, "--skip-unreadable", "--json")
    assert code == 0, err
    assert (json.loads(out)["count"], len(json.loads(out)["unreadable"])) == (10, 1)
    assert run(capsys, digits.folder, "--data", "x" * 300)[0] == 2
    assert run(capsys, digits.folder, "--data", folder, "--ckpt", "x" * 300)[0] == 2
    stat = Path.stat

    def refusing(path, **how):
        if path == folder:
            raise PermissionError(13, "Permission denied")
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", refusing)
    code, _, err = run(capsys, digits.folder, "--data", folder)
    assert code == 2
    assert f"--data {folder} cannot be read: Permission denied" in err


def test_an_interruption_is_one_error(digits, held_out, capsys, monkeypatch):
    def stop(*_said, **_how):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_cli, "evaluate", stop)
    code, _, err = run(capsys, digits.folder, "--data", held_out)
    assert code == 130
    assert err.count("error: ") == 1
    assert "note: run the same command again to go on from " in err


def test_a_state_of_other_data_is_not_used(digits, held_out, tmp_path):
    state = tmp_path / "state.json"
    dataset = read_dataset(held_out, digits.manifest)
    tally = {"count": 100, "top1": 0, "top5": 0, "agreed": 0, "compared": 0}
    state.write_text(json.dumps({"key": "other", "done": 100, "unreadable": [], "tallies": {"onnx": tally}}))
    with Predictor(digits) as predictor:
        found = evaluate({"onnx": predictor.logits}, digits.manifest, dataset, state_file=state, key="mine")
        assert found.resumed == 0
        assert found.scores["onnx"]["right"] == 449
        state.write_text("{")
        with pytest.raises(InputError, match="remove it"):
            evaluate({"onnx": predictor.logits}, digits.manifest, dataset, state_file=state, key="mine")


def test_the_key_follows_data_and_checkpoint(digits, tmp_path):
    folder = small_folder(tmp_path / "data")
    keys = [state_key(digits.manifest, ["onnx"], read_dataset(folder, digits.manifest))]
    keys.append(state_key(digits.manifest, ["onnx"], read_dataset(folder, digits.manifest), trained="a"))
    Image.new("L", (9, 9)).save(folder / "0" / "0.png")
    keys.append(state_key(digits.manifest, ["onnx"], read_dataset(folder, digits.manifest)))
    assert len(set(keys)) == 3


def test_a_state_that_cannot_be_kept_is_said(digits, tmp_path):
    dataset = read_dataset(small_folder(tmp_path / "data"), digits.manifest)
    (tmp_path / "file").write_text("")

    def stop(batch):
        if stop.calls:
            raise KeyboardInterrupt
        stop.calls += 1
        return np.zeros((len(batch), 10), np.float32)

    stop.calls = 0
    with pytest.raises(OutputError, match="--state"):
        evaluate(
            {"onnx": stop}, digits.manifest, dataset, state_file=tmp_path / "file" / "state.json", key="k", batch=4
        )


def test_unreadable_images_stop_or_are_counted(digits, tmp_path, capsys):
    folder = small_folder(tmp_path / "data")
    (folder / "4" / "1.png").write_bytes(b"no image")
    code, _, said = run(capsys, digits.folder, "--data", folder)
    assert code == 2
    assert said.count("\n") == 1
    assert "1.png" in said
    assert "--skip-unreadable" in said
    code, out, _ = run(capsys, digits.folder, "--data", folder, "--skip-unreadable", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["count"] == 19
    assert len(report["unreadable"]) == 1
    for image in folder.rglob("*.png"):
        image.write_bytes(b"")
    code, _, said = run(capsys, digits.folder, "--data", folder, "--skip-unreadable")
    assert code == 2
    assert "none of 20" in said


def test_a_state_with_unreadable_images_needs_the_option_again(digits, tmp_path):
    folder = small_folder(tmp_path / "data")
    (folder / "0" / "0.png").write_bytes(b"no image")
    dataset, state = read_dataset(folder, digits.manifest), tmp_path / "state.json"
    how = {"state_file": state, "key": "k", "batch": 4}

    def stop(done, _total, _scores):
        if done == 8:
            raise KeyboardInterrupt

    with Predictor(digits) as predictor:
        runs = {"onnx": predictor.logits}
        with pytest.raises(KeyboardInterrupt):
            evaluate(runs, digits.manifest, dataset, skip_unreadable=True, progress=stop, **how)
        with pytest.raises(ImageError, match=r"0\.png.*pass --skip-unreadable"):
            evaluate(runs, digits.manifest, dataset, **how)
        found = evaluate(runs, digits.manifest, dataset, skip_unreadable=True, **how)
    assert (found.resumed, found.count, len(found.unreadable)) == (8, 19, 1)


def test_a_file_that_this_user_may_not_read_is_left_out_on_request(digits, tmp_path, monkeypatch):
    folder, opened = small_folder(tmp_path / "data"), image_files.opened
    dataset, how = read_dataset(folder, digits.manifest), {"state_file": tmp_path / "state.json", "key": "k"}

    def refused(path, most_bytes):
        if path == folder / "0" / "0.png":
            raise InputError(f"{path} cannot be read: Permission denied")
        return opened(path, most_bytes)

    monkeypatch.setattr(image_files, "opened", refused)
    with Predictor(digits) as predictor:
        runs = {"onnx": predictor.logits}
        with pytest.raises(ImageError, match="Permission denied; pass --skip-unreadable"):
            evaluate(runs, digits.manifest, dataset, **how)
        found = evaluate(runs, digits.manifest, dataset, skip_unreadable=True, **how)
    assert (found.count, len(found.unreadable)) == (19, 1)


def test_a_disk_that_fails_ends_a_run_that_can_go_on(digits, tmp_path, monkeypatch):
    """Left out, the images would be missing in the score, and in that of every later run."""
    folder, opened = small_folder(tmp_path / "data"), image_files.opened
    dataset = read_dataset(folder, digits.manifest)
    how = {"state_file": tmp_path / "state.json", "key": "k", "batch": 4, "skip_unreadable": True}

    def failing(path, most_bytes):
        if path == dataset.samples[10].images[0]:
            raise DiskError(f"{path} could not be read 4 times: Input/output error; run again to go on")
        return opened(path, most_bytes)

    monkeypatch.setattr(image_files, "opened", failing)
    with Predictor(digits) as predictor:
        runs = {"onnx": predictor.logits}
        with pytest.raises(InputError, match=r"run again to go on$"):
            evaluate(runs, digits.manifest, dataset, **how)
        monkeypatch.undo()
        found = evaluate(runs, digits.manifest, dataset, **how)
    assert (found.count, found.unreadable) == (20, ())
    assert found.resumed in (4, 8), "what came before the fault is kept"


@pytest.mark.parametrize("task", TALLIES)
def test_what_was_counted_since_a_mark_is_undone(task):
    count = {
        "classify": {"count": 3, "top1": 2, "top5": 3, "agreed": 1, "compared": 1},
        "segment": {"pixels": [[1, 2], [3, 4]], "count": 1, "agreed": 2, "compared": 3},
        "embed": {"cosines": [0.5, 0.1], "same": [1, 0], "trained": [0.9, 0.8, 0.7, 0.6]},
    }[task]
    tally = TALLIES[task](2)
    tally.merge(count)
    mark = tally.mark()
    tally.merge(count)
    assert tally.state() != count
    tally.undo(mark)
    assert tally.state() == count
    tally.merge(count)
    assert tally.state() != count


def test_scores_that_are_shown_are_not_computed_for_every_batch(monkeypatch, tmp_path):
    """The score of pairs is of all of them, so one per batch takes time that grows with the square of their number."""
    calls, states = [], []
    samples = tuple(Sample((tmp_path, tmp_path), i % 2) for i in range(400))
    scores, state = PairTally.scores, PairTally.state
    monkeypatch.setattr(PairTally, "scores", lambda self: calls.append(1) or scores(self))
    monkeypatch.setattr(PairTally, "state", lambda self: states.append(1) or state(self))
    monkeypatch.setattr(loop, "_SCORE_SECONDS", 1000)

    def engine(_how, _runs, rest):
        for sample in rest:
            yield Judged(1, (), {"x": {"cosines": [0.5], "same": [sample.target], "trained": []}})

    manifest, told = SimpleNamespace(task="embed", classes=0, batch=SimpleNamespace(opt=2)), []
    found = evaluate(
        {"x": None}, manifest, Dataset(samples, ""), engine=engine, progress=lambda *said: told.append(said)
    )
    assert (len(told), found.count) == (400, 400)
    assert "accuracy" in told[-1][2]
    assert len(calls) == 2, "the first, and the result"
    assert not states, "what was counted is copied for no batch"


def test_an_image_error_names_the_file(digits, tmp_path):
    folder = small_folder(tmp_path / "data")
    (folder / "0" / "0.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"0\.png"):
        evaluate({"onnx": lambda x: x}, digits.manifest, read_dataset(folder, digits.manifest))


def with_labels(bundle, labels):
    return Bundle(bundle.manifest.model_copy(update={"labels": labels}), bundle.folder).manifest


def test_links_to_folders_are_followed(digits, tmp_path):
    plain = small_folder(tmp_path / "plain")
    (tmp_path / "linked").mkdir()
    for folder in plain.iterdir():
        (tmp_path / "linked" / folder.name).symlink_to(folder)
    (plain / "7" / "more").symlink_to(plain / "8")
    counts = [len(read_dataset(tmp_path / name, digits.manifest).samples) for name in ("plain", "linked")]
    assert counts == [22, 22]


def test_folders_are_matched_by_name_number_or_order(digits, tmp_path):
    folder = small_folder(tmp_path / "data", per_class=1)
    names = tuple("abcdefghij")
    by_number = read_dataset(folder, with_labels(digits, names))
    assert by_number.remark == "folders matched by number"
    reversed_labels = with_labels(digits, tuple("9876543210"))
    by_name = read_dataset(folder, reversed_labels)
    assert [sample.target for sample in by_name.samples] == list(range(9, -1, -1))
    for digit in range(10):
        (folder / str(digit)).rename(folder / f"n{digit}")
    by_order = read_dataset(folder, with_labels(digits, names))
    assert by_order.remark == "folders matched by sorted order"
    assert [sample.target for sample in by_order.samples] == list(range(10))
    assert by_name.warnings == by_number.warnings == ()
    assert "in sorted order, beginning with n0 for class 0, a: rename them" in by_order.warnings[0]


def test_names_of_classes_may_differ_in_case_and_underscores(digits, tmp_path):
    folder = small_folder(tmp_path / "data", per_class=1)
    names = ("tabby cat", "Dog", "cat", "Cat", *"efghij")
    for digit, name in enumerate(("Tabby_Cat", "dog", "cat", "Cat", *"EFGHIJ")):
        (folder / str(digit)).rename(folder / name)
    found = read_dataset(folder, with_labels(digits, names))
    assert found.remark == "folders matched by name"
    named = {sample.images[0].parent.name: sample.target for sample in found.samples}
    assert [named[name] for name in ("Tabby_Cat", "dog", "cat", "Cat", "E")] == [0, 1, 2, 3, 4]
    (tmp_path / "list.txt").write_text(f"{next(folder.rglob('*.png'))}\tTABBY CAT\n")
    assert read_dataset(tmp_path / "list.txt", with_labels(digits, names)).samples[0].target == 0
    (folder / "cat").rename(folder / "CAT")
    with pytest.raises(InputError, match="'CAT' names 2 classes: use class numbers"):
        read_dataset(folder, with_labels(digits, names))


def test_an_order_that_is_taken_for_the_classes_is_a_warning(digits, tmp_path, capsys):
    folder = small_folder(tmp_path / "data", per_class=1)
    for digit in range(10):
        (folder / str(digit)).rename(folder / f"n{digit}")
    code, _, err = run(capsys, digits.folder, "--data", folder)
    assert code == 0
    assert err.startswith(f"warning: --data {folder}: no folder has the name of a class")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda _: None, "no such file"),
        (lambda f: f.mkdir(), "no folders"),
        (lambda f: (f / "cat").mkdir(parents=True), "1 class folders"),
        (lambda f: [(f / name).mkdir(parents=True) for name in ("3", "cat")], "'cat' is no label"),
        (lambda f: (f / "3").mkdir(parents=True), "holds no images"),
        (lambda f: f.write_text("a.png 12\n"), "classes 0 to 9"),
        (lambda f: f.write_text("a.png\n"), "no line of 2 fields"),
        (lambda f: f.write_text("a.png cat\n"), "'cat' is no label"),
        (lambda f: f.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    ],
)
def test_bad_class_data_is_refused_in_one_line(digits, tmp_path, prepare, message, capsys):
    prepare(tmp_path / "data")
    code, _, said = run(capsys, digits.folder, "--data", tmp_path / "data")
    assert code == 2
    assert message in said
    assert said.count("\n") == 1


def test_bad_options_are_refused(digits, held_out, segmenter, capsys):
    assert run(capsys, digits.folder, "--data", held_out, "--batch", "0")[0] == 2
    assert run(capsys, digits.folder, "--data", held_out, "--format", "openvino")[0] == 2
    assert run(capsys, digits.folder / "none", "--data", held_out)[0] == 2
    code, _, said = run(capsys, digits.folder, "--data", held_out, "--ckpt", segmenter[0])
    assert code == 2
    assert "is a pspnet; the card repmlp-digits describes a repmlpnet" in said
    code, _, said = run(capsys, segmenter[1].folder, "--data", held_out, "--ckpt", DIGITS)
    assert code == 2


def test_masks_are_scored_by_intersection_over_union(segmenter, tmp_path, capsys):
    checkpoint, bundle = segmenter
    with Predictor(bundle) as predictor:
        own = [predictor(photograph[:60, :80]).mask for photograph in load_sample_images().images]
    perfect = scene(tmp_path / "perfect", masks=own)
    code, out, err = run(capsys, bundle.folder, "--data", perfect, "--ckpt", checkpoint, "--json")
    assert code == 0, err
    scores = json.loads(out)["scores"]
    assert scores["onnx"]["mean_iou"] == 1
    assert scores["onnx"]["pixel_accuracy"] == 1
    assert scores["onnx"]["agreement"] > 0.999
    code, out, _ = run(capsys, bundle.folder, "--data", scene(tmp_path / "halves"))
    assert code == 0
    assert "mean_iou" in out
    expected = np.zeros((57, 80), int)
    expected[:, 40:] = 3
    counts = [
        (np.sum((m[3:] == c) & (expected == c)), np.sum((m[3:] == c) | (expected == c))) for c in range(5) for m in own
    ]
    iou = [
        (sum(i for i, _ in counts[2 * c : 2 * c + 2]), sum(u for _, u in counts[2 * c : 2 * c + 2])) for c in range(5)
    ]
    mean = np.mean([i / u for i, u in iou if u])
    assert f"{100 * mean:.2f} %" in out


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full((60, 80), 9, np.uint8), "holds the id 9"),
        (np.zeros((60, 79), np.uint8), "is 60x79"),
        (np.zeros((60, 80, 3), np.uint8), "one channel"),
    ],
)
def test_masks_that_do_not_fit_are_refused(segmenter, tmp_path, mask, message, capsys):
    folder = scene(tmp_path / "scene", masks=[mask, mask])
    code, _, said = run(capsys, segmenter[1].folder, "--data", folder)
    assert code == 2
    assert message in said


def test_missing_masks_are_refused(segmenter, tmp_path, capsys):
    folder = scene(tmp_path / "scene")
    (folder / "masks" / "1.png").unlink()
    code, _, said = run(capsys, segmenter[1].folder, "--data", folder)
    assert code == 2
    assert "such as 1.png" in said
    assert run(capsys, segmenter[1].folder, "--data", tmp_path)[0] == 2


def test_a_pipe_for_a_mask_is_refused_without_a_wait(segmenter, tmp_path, capsys):
    folder = scene(tmp_path / "scene")
    (folder / "masks" / "1.png").unlink()
    os.mkfifo(folder / "masks" / "1.png")
    code, _, said = run(capsys, segmenter[1].folder, "--data", folder)
    assert code == 2
    assert "1.png" in said


def test_pairs_are_scored_by_verification(embedder, tmp_path, capsys):
    checkpoint, bundle = embedder
    first, second = load_sample_images().images
    for i in range(6):
        Image.fromarray(first[10 * i : 10 * i + 100, :100]).save(tmp_path / f"a{i}.png")
        Image.fromarray(second[10 * i : 10 * i + 100, :100]).save(tmp_path / f"b{i}.png")
    lines = [f"a{i}.png a{i}.png 1" for i in range(6)] + [f"a{i}.png b{i}.png 0" for i in range(6)]
    lines = [line for pair in zip(lines[:6], lines[6:], strict=True) for line in pair]
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("\n".join(lines))
    code, out, err = run(capsys, bundle.folder, "--data", pairs, "--ckpt", checkpoint, "--json")
    assert code == 0, err
    scores = json.loads(out)["scores"]["onnx"]
    assert scores["count"] == 12
    assert scores["accuracy"] == 1
    assert scores["agreement"] == pytest.approx(1, abs=1e-6)
    pairs.write_text("\n".join(line[:-1] + str(i // 2 % 2) for i, line in enumerate(lines)))
    code, out, _ = run(capsys, bundle.folder, "--data", pairs, "--json")
    assert json.loads(out)["scores"]["onnx"]["accuracy"] < 0.8
    for text, message in (
        ("a0.png a1.png 1", "both 1 and 0"),
        ("a0.png a1.png x", "expected 1"),
        ("a0.png", "3 fields"),
    ):
        pairs.write_text(text)
        code, _, said = run(capsys, bundle.folder, "--data", pairs)
        assert code == 2
        assert message in said
    assert run(capsys, bundle.folder, "--data", tmp_path)[0] == 2


def test_top5_and_ties():
    tally = ClassTally(10)
    logits = np.tile(np.arange(10, 0, -1, dtype=np.float32), (3, 1))
    samples = [type("S", (), {"target": t})() for t in (0, 4, 5)]
    tally.add(logits, samples, [], None)
    assert tally.scores()["top1"] == pytest.approx(1 / 3)
    assert tally.scores()["top5"] == pytest.approx(2 / 3)


def test_ignored_pixels_do_not_count(tmp_path):
    Image.fromarray(np.array([[0, 255], [1, 1]], np.uint8)).save(tmp_path / "m.png")
    sample = type("S", (), {"mask": tmp_path / "m.png", "images": ()})()
    logits = np.zeros((1, 3, 2, 2), np.float32)
    logits[0, 1, :, 1] = 1  # called [[0, 1], [0, 1]]
    tally = MaskTally(3)
    tally.add(logits, [sample], [(2, 2)], None)
    scores = tally.scores()
    assert scores["iou"] == [0.5, 0.5, None]
    assert scores["mean_iou"] == 0.5
    assert scores["pixel_accuracy"] == pytest.approx(2 / 3)


def test_the_best_threshold_separates_what_can_be_separated():
    cosines, same = np.array([0.9, 0.8, 0.2, 0.1]), np.array([True, True, False, False])
    assert 0.2 < best_threshold(cosines, same) < 0.8
    assert best_threshold(cosines, ~same) != pytest.approx(0.5)
    rng = np.random.default_rng(0)
    same = rng.random(400) < 0.5
    cosines = np.where(same, 0.6, 0.2) + 0.1 * rng.standard_normal(400)
    found = verification(cosines, same)
    assert found["accuracy"] > 0.95
    assert 0.3 < found["threshold"] < 0.5
    assert verification(rng.standard_normal(400), same)["accuracy"] < 0.6
