from pathlib import Path

import pytest

from repmlp_deploy.card import ModelCard, data_root, list_cards, load_card, load_labels
from repmlp_deploy.errors import CardError

SHIPPED = (data_root() / "repmlp-digits.toml").read_text()


def test_the_models_of_the_papers_and_of_mmpretrain_have_cards() -> None:
    names = {f"repmlpnet-{name}" for name in ("t224", "t256", "b224", "b256", "d256", "l256")}
    names |= {"repmlp-base_3rdparty_8xb64_in1k", "repmlp-base_3rdparty_8xb64_in1k-256px", "repmlp-digits"}
    assert names <= set(list_cards())


@pytest.mark.parametrize("name", list_cards())
def test_a_card_is_called_by_its_file_and_has_as_many_labels_as_classes(name: str) -> None:
    card = load_card(name)
    assert card.name == name
    labels = load_labels(card)
    assert labels is None or len(labels) == card.network["classes"]
    assert labels is None or all(labels)


def test_imagenet_names_are_in_the_order_of_the_logits() -> None:
    labels = load_labels(load_card("repmlpnet-b224"))
    assert labels is not None
    assert (labels[0], labels[524], labels[999]) == (
        "tench, Tinca tinca",
        "cuirass",
        "toilet tissue, toilet paper, bathroom tissue",
    )


def test_a_card_of_ones_own_is_read_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(SHIPPED.replace('"repmlp-digits"', '"mine"'))
    assert load_card(path).name == "mine"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("repmlpnet-b244", r"did you mean repmlpnet-b224\?"),
        ("zzz", "known: "),
        ("no/such.toml", "no card 'no/such.toml'; there is no such file"),
        ("../repmlp-digits", "no card"),
    ],
)
def test_an_unknown_card(name: str, said: str) -> None:
    with pytest.raises(CardError, match=said):
        load_card(name)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("input_size = [32, 32]", "input_size = [32]", "input_size"),
        ("input_size = [32, 32]", "input_size = [64, 64]", "preprocessing gives 32x32; input_size is"),
        ('mode = "exact"', 'mode = "exactly"', "preprocessing.resize.mode"),
        ("std = [96.0, 96.0, 96.0]", "std = [96.0, 0.0, 96.0]", "std must be positive"),
        ('task = "classify"', 'task = "guess"', "task"),
        ("[weights]", "[weights]\nsize = 3", "weights.size: Extra inputs are not permitted"),
        ("[weights]", '[weights]\nurl = "https://x.org/y"', "exactly one of file and url"),
        ('name = "repmlp-digits"', 'name = "../x"', "name"),
        ("[network]", "[network", "line"),
    ],
)
def test_a_card_with_a_mistake_is_refused_and_the_place_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "wrong.toml"
    assert old in SHIPPED
    path.write_text(SHIPPED.replace(old, new))
    with pytest.raises(CardError, match=said) as caught:
        load_card(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_list_of_labels() -> None:
    card = load_card("repmlp-digits").model_copy(update={"labels": "imagenet-2k"})
    with pytest.raises(CardError, match="no label list 'imagenet-2k'; known: imagenet-1k"):
        load_labels(card)


def test_a_card_stays_as_it_was_read() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_card("repmlp-digits").name = "other"
    assert isinstance(load_card("repmlp-digits"), ModelCard)


def test_a_card_is_what_its_file_says_now_and_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (data_root() / "repmlp-digits.toml").read_text(encoding="utf-8")
    for folder, mean in (("a", "78.0"), ("b", "11.0"), ("b", "12.0")):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        Path("card.toml").write_text(text.replace("78.0", mean), encoding="utf-8")
        assert load_card("card.toml").preprocessing.mean[0] == float(mean)
