"""What a user, a card and a file say of images and classes; and what is assumed is said to be assumed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from repmlp_deploy import Bundle, Predictor, export
from repmlp_deploy.card import ModelCard, Resize, data_root, load_card, read_labels
from repmlp_deploy.cli.build import build_command
from repmlp_deploy.cli.export import export_command
from repmlp_deploy.cli.inspect import inspect_command
from repmlp_deploy.cli.predict import predict_command
from repmlp_deploy.cli.shared.console import run_command
from repmlp_deploy.convert.source.description import Description, complete_card
from repmlp_deploy.convert.source.trained import load_trained
from repmlp_deploy.errors import CardError, InputError
from repmlp_deploy.nets.families import card_spec
from repmlp_deploy.nets.networks.repmlpnet import RepMLPNet, RepMLPNetSpec

DIGIT = data_root() / "samples" / "digits" / "3-0045.png"
TEN = tuple(f"digit {i}" for i in range(10))


def run(command: object, *arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run_command(command, [str(argument) for argument in arguments])
    return int(ended.value.code)


@pytest.fixture(scope="module")
def tuned(digits_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped network after some further training: its file is no card's."""
    state = load_file(digits_checkpoint)
    state["head.bias"] = state["head.bias"] + 1e-3
    path = tmp_path_factory.mktemp("tuned") / "tuned.pth"
    torch.save({"state_dict": state, "meta": {"dataset_meta": {"classes": TEN}}}, path)
    return path


def test_the_file_names_its_classes_and_what_is_assumed_is_a_warning(tuned: Path) -> None:
    trained = load_trained(tuned)
    assert trained.card.labels == TEN
    assert "class names: those in the file" in trained.notes
    (warning,) = trained.warnings
    assert warning.startswith("mean, std, resize of the images: assumed to be those of repmlp-digits")


def test_without_names_there_are_none(digits_checkpoint: Path, tmp_path: Path) -> None:
    torch.save({**load_file(digits_checkpoint), "head.bias": torch.zeros(10)}, tmp_path / "bare.pth")
    trained = load_trained(tmp_path / "bare.pth")
    assert trained.card.labels is None
    assert "class names unknown: --labels FILE gives them" in trained.notes


def test_the_weights_of_a_card_need_no_warning(digits_checkpoint: Path) -> None:
    trained = load_trained(digits_checkpoint)
    assert trained.warnings == ()
    assert trained.card.labels == load_card("repmlp-digits").labels


def test_what_was_said_is_not_assumed(tuned: Path) -> None:
    card = load_card("repmlp-digits")
    assert load_trained(tuned, card).warnings == (
        "the file names other classes than repmlp-digits: the card's names are used",
    )
    said = Description(mean=(1, 2, 3), std=(4, 5, 6), resize=Resize(mode="short-edge", size=(40, 40)))
    trained = load_trained(tuned, described=said)
    assert trained.warnings == ()
    assert trained.card.preprocessing.mean == (1, 2, 3)
    assert trained.card.preprocessing.crop == (32, 32), "cut to the network's size"
    partly = load_trained(tuned, described=Description(mean=(1, 2, 3), std=(4, 5, 6)))
    assert partly.warnings[0].startswith("resize of the images")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (Description(std=(0.229, 0.224, 0.225)), "--std is 0.229,0.224,0.225; expected levels of 0 to 255"),
        (Description(mean=(1.0,)), "mean has 1 values and std 3; give one per channel"),
        (Description(labels=("a", "b")), "repmlp-digits has 10 classes, and 2 labels"),
        (Description(crop=(16, 16)), "preprocessing gives 16x16; input_size is"),
    ],
)
def test_contradictions_are_refused(digits_checkpoint: Path, said: Description, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_trained(digits_checkpoint, described=said)


def test_sigmoid_is_for_one_logit(digits_checkpoint: Path) -> None:
    with pytest.raises(InputError, match="sigmoid is for one logit, and there are 10"):
        load_trained(digits_checkpoint, described=Description(scores="sigmoid"))


def test_names_for_another_number_of_classes_are_not_used() -> None:
    card = load_card("repmlp-digits").model_copy(update={"labels": None})
    completed = complete_card(card, {"classes": ["a", "b"]}, Description())
    assert completed.card.labels is None
    assert completed.warnings == ("the file names 2 classes and the network has 10: the names are not used",)


@pytest.fixture(scope="module")
def assumed(tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(tuned, out=tmp_path_factory.mktemp("assumed") / "bundle")


def test_a_bundle_keeps_its_warnings_and_every_command_repeats_them(
    assumed: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Bundle.load(assumed.folder).manifest.warnings == assumed.manifest.warnings != ()
    with Predictor(assumed) as predictor:
        assert predictor.warnings == assumed.manifest.warnings
    assert run(predict_command, assumed.folder, DIGIT, "--json") == 0
    said = capsys.readouterr()
    assert said.err.startswith("warning: mean, std, resize of the images: assumed")
    assert json.loads(said.out)["predictions"][0]["top"][0]["class"] == "digit 3"


def test_a_refit_keeps_what_the_bundle_knows(
    digits_checkpoint: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundle says how images are read; that the new file does not is no news, but other classes are a fault."""
    bundle = export(digits_checkpoint, out=tmp_path / "bundle")
    assert run(build_command, bundle.folder, "--refit-from", tuned, "--out", tmp_path / "other") == 2
    assert "is for other classes than the bundle's" in capsys.readouterr().err
    plain = tmp_path / "plain.pth"
    torch.save(torch.load(tuned)["state_dict"], plain)
    assert run(build_command, bundle.folder, "--refit-from", plain, "--out", tmp_path / "again", "--json") == 0
    assert "assumed" not in "".join(capsys.readouterr())
    renewed = Bundle.load(tmp_path / "again").manifest
    assert renewed.warnings == ()
    assert renewed.labels == bundle.manifest.labels


def test_inspect_refuses_options_of_a_checkpoint_for_a_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (("--write-card", tmp_path / "c.toml"), ("--mean", "1,2,3"), ("--state-key", "x"), ("--ignore", "x"))
    for option, value in options:
        assert run(inspect_command, tmp_path, option, value) == 2
        assert f"{option} is about a checkpoint; {tmp_path} is a folder" in capsys.readouterr().err
    assert not (tmp_path / "c.toml").exists()


def test_options_and_cards_say_the_same(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join("abcdefghij"))
    said = ("--mean", "78,78,78", "--std", "96,96,96", "--resize", "32x32", "--labels", names)
    card = tmp_path / "card.toml"
    assert run(inspect_command, tuned, *said, "--write-card", card) == 0
    assert load_card(card).labels == tuple("abcdefghij")
    assert run(inspect_command, tuned, "--write-card", card) == 2
    assert "the file exists" in capsys.readouterr().err
    for i, options in enumerate([said, ("--card", card)]):
        out = tmp_path / f"bundle{i}"
        assert run(export_command, "--ckpt", tuned, "--out", out, *options, "--json") == 0
        manifest = Bundle.load(out).manifest
        assert manifest.labels == tuple("abcdefghij")
        assert manifest.preprocessing == load_card(card).preprocessing
        assert not [line for line in manifest.warnings if "assumed" in line]


def test_the_card_of_a_network_that_no_card_has_can_be_written_and_passed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What such a network leaves unsaid, as its partitions, is left out of the file: TOML has no null."""
    spec = RepMLPNetSpec(input_size=(32, 32), channels=(8, 16), depths=(1, 1), sharesets=(1, 2), classes=3)
    checkpoint, card = tmp_path / "new.pth", tmp_path / "new.toml"
    torch.save({"model": RepMLPNet(spec).state_dict()}, checkpoint)
    assert run(inspect_command, checkpoint, "--write-card", card) == 0
    out = capsys.readouterr().out
    assert "None" not in out
    assert "correct it, and pass it with --card" in out
    assert card.read_text(encoding="utf-8").startswith(
        "# Correct this card before you use it:\n# - mean, std, resize of"
    )
    assert card_spec(load_card(card)) == spec
    assert load_trained(checkpoint, card=load_card(card)).card.network == load_card(card).network


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no names"), (b"a\n\nb", "line 2 is empty"), (b"\xff", "not UTF-8"), (b"x" * 600, "600")],
)
def test_a_file_of_labels_is_read_carefully(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(CardError, match=message):
        read_labels(tmp_path / "names.txt")


class OneLogit(nn.Module):
    """A user's network that answers one question about a gray image."""

    def __init__(self, outputs: int = 1, channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 4, stride=4)
        self.head = nn.Linear(16, outputs)
        self.example_input = torch.zeros(2, channels, 32, 32)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = self.stem(images)
        logits: torch.Tensor = self.head(maps.mean((2, 3)))
        return logits


def own_card(channels: int, **changes: object) -> ModelCard:
    return ModelCard.model_validate(
        {
            "name": "own",
            "family": "custom",
            "input_size": (32, 32),
            "network": {},
            "preprocessing": {
                "resize": {"mode": "exact", "size": (32, 32)},
                "mean": (100.0,) * channels,
                "std": (50.0,) * channels,
            },
            **changes,
        }
    )


def exported(network: nn.Module, card: ModelCard, out: Path) -> Bundle:
    torch.manual_seed(0)
    return export(network.eval(), example_input=network.example_input, card=card, allow_merged=True, out=out)


def test_one_logit_is_a_question_and_never_a_softmax(tmp_path: Path) -> None:
    card = own_card(1, labels=("no", "yes"))
    bundle = exported(OneLogit(), card, tmp_path / "bundle")
    with Predictor(bundle) as predictor:
        answer = predictor(DIGIT)
        logit = float(predictor.logits(predictor.preprocess(DIGIT)[None])[0, 0])
    yes = 1 / (1 + np.exp(-logit))
    np.testing.assert_allclose(answer.pred_scores, [1 - yes, yes], rtol=1e-6)
    assert answer.pred_class == ("yes" if yes > 0.5 else "no")
    with pytest.raises(InputError, match="softmax of one logit"):
        exported(OneLogit(), own_card(1, scores="softmax"), tmp_path / "wrong")
    with pytest.raises(InputError, match="own has 2 classes, and 1 labels"):
        exported(OneLogit(), own_card(1, labels=("yes",)), tmp_path / "wrong")


def test_several_labels_have_a_score_each(tmp_path: Path) -> None:
    bundle = exported(OneLogit(outputs=3), own_card(1, scores="multi-label"), tmp_path / "bundle")
    with Predictor(bundle) as predictor:
        answer = predictor(DIGIT)
        logits = predictor.logits(predictor.preprocess(DIGIT)[None])[0]
    np.testing.assert_allclose(answer.pred_scores, 1 / (1 + np.exp(-logits.astype(np.float64))), rtol=1e-6)
    assert [i for i, _ in answer.above(0.5)] == [int(i) for i in np.argsort(-logits) if logits[i] >= 0]


def test_networks_of_other_channels_take_images(tmp_path: Path) -> None:
    """One channel: gray; five bands: arrays, each resized as Pillow resizes a gray image."""
    levels = np.random.default_rng(0).integers(0, 256, (40, 50, 5), dtype=np.uint8)
    bundle = exported(OneLogit(outputs=4, channels=5), own_card(5), tmp_path / "bands")
    with Predictor(bundle) as predictor:
        answer = predictor(levels)
        assert predictor.preprocess(levels).shape == (5, 32, 32)
        with pytest.raises(InputError, match="a network of 5 bands takes uint8"):
            predictor(DIGIT)
        with pytest.raises(InputError, match="a network of 5 bands takes uint8"):
            predictor(levels[:, :, :4])
    assert answer.pred_scores.shape == (4,)
    gray = exported(OneLogit(outputs=4), own_card(1), tmp_path / "gray")
    with Predictor(gray) as predictor:
        assert predictor.preprocess(DIGIT).shape == (1, 32, 32)
        colour = np.repeat(levels[:, :, :1], 3, axis=2)
        np.testing.assert_array_equal(predictor.preprocess(colour), predictor.preprocess(levels[:, :, 0]))


def test_a_card_for_other_channels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="own has a mean for 3 channels; the network takes 1"):
        exported(OneLogit(), own_card(3), tmp_path / "bundle")


def test_an_own_network_whose_images_are_described_classifies(tmp_path: Path) -> None:
    said = Description(mean=(100.0,), std=(50.0,), labels=("no", "yes"))
    network = OneLogit().eval()
    bundle = export(
        network, example_input=network.example_input, description=said, allow_merged=True, out=tmp_path / "bundle"
    )
    assert bundle.manifest.task == "classify"
    assert bundle.manifest.warnings[0].startswith("resize of the images")
    with Predictor(bundle) as predictor:
        assert predictor(DIGIT).pred_class in ("no", "yes")


@pytest.mark.parametrize("size", [(33, 33), (64, 32), (64, 64)])
def test_a_size_that_changes_what_the_network_computes_is_refused(
    digits_checkpoint: Path, size: tuple[int, int]
) -> None:
    """Other sizes cut the maps into other partitions, or leave a row out: the weights fit 32x32 alone."""
    with pytest.raises(InputError, match=r"fit 32x32; with .* they would compute something else|such as 32x32"):
        load_trained(digits_checkpoint, input_size=size)


def test_a_card_may_say_another_size(digits_checkpoint: Path) -> None:
    card = load_card("repmlp-digits")
    how = card.preprocessing.model_copy(update={"resize": Resize(mode="exact", size=(64, 64))})
    network = {**card.network, "partitions": [(8, 8), (4, 4), (2, 2)]}
    changes = {"input_size": (64, 64), "network": network, "preprocessing": how}
    trained = load_trained(digits_checkpoint, card.model_copy(update=changes))
    assert trained.network(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_weights_are_found_under_a_key_and_keys_are_left_out(
    digits_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(digits_checkpoint)
    content = {"student": state, "teacher": {"net": {**state, "aux.weight": torch.zeros(3)}}}
    torch.save(content, tmp_path / "both.pth")
    told = ("--state-key", "teacher.net", "--ignore", "aux.*")
    assert run(inspect_command, tmp_path / "both.pth", *told, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["container"] == "teacher.net"
    assert "the file also holds student; used: teacher.net" in report["notes"]
    assert run(export_command, "--ckpt", tmp_path / "both.pth", *told, "--out", tmp_path / "bundle") == 0
    assert run(inspect_command, tmp_path / "both.pth", "--state-key", "nothing") == 2
    assert "holds no state dict under nothing; it has: " in capsys.readouterr().err
