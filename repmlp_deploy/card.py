"""Model cards: what `models/*.toml` say of a network, parsed strictly.

A card names a family of `nets`, its hyper-parameters, the preprocessing its weights were trained with, the labels of
its classes, where its weights are, and what was published about it.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from repmlp_deploy.errors import CardError
from repmlp_deploy.files import read_text, read_toml
from repmlp_deploy.text import first_fault

__all__ = [
    "Label",
    "ModelCard",
    "Preprocessing",
    "Published",
    "Resize",
    "Scores",
    "TaskName",
    "Weights",
    "count_classes",
    "data_root",
    "list_cards",
    "load_card",
    "load_labels",
    "read_labels",
]

_LARGEST_CARD_BYTES = 1 << 20
_LARGEST_LABELS_BYTES = 1 << 24
_LONGEST_URL = 2048
_LONGEST_LABEL = 512

Label = Annotated[str, Field(max_length=_LONGEST_LABEL)]
ListName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]

Size = tuple[Annotated[int, Field(gt=0, le=16384)], Annotated[int, Field(gt=0, le=16384)]]
Levels = Annotated[tuple[float, ...], Field(min_length=1, max_length=64)]
"""One number per channel of the network's input, in levels 0 to 255."""

Scores = Literal["softmax", "sigmoid", "multi-label"]
"""How logits become probabilities: of one class among several, of one yes-or-no question, of several such questions."""

TaskName = Literal["classify", "segment", "embed", "features", "custom"]
"""The tasks that a card may have; `runtime.tasks.TASKS` has an entry for each."""

_COLOURS = 3


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Resize(_Strict):
    """How an image is resized.

    Attributes:
        mode: `exact` to `size`, ignoring the aspect ratio; `short-edge` until the shorter edge has `size[0]` pixels,
            the longer one truncated to a whole number.
        size: (height, width) in pixels.
    """

    mode: Literal["exact", "short-edge"]
    size: Size

    @model_validator(mode="after")
    def _square_for_short_edge(self) -> Resize:
        if self.mode == "short-edge" and self.size[0] != self.size[1]:
            raise ValueError(f"a short edge is one length; got {self.size[0]}x{self.size[1]}")
        return self


class Preprocessing(_Strict):
    """From a decoded image to the network's input.

    Attributes:
        resize: None leaves the size alone.
        crop: (height, width) of the centre crop; None for none.
        mean: per channel, in levels 0 to 255. Their count is the number of channels: one for gray images, three for
            colours; any other number is for arrays with as many bands.
        std: per channel, in levels 0 to 255.
        colour_order: order of the network's input channels, if there are three.
        interpolation: Pillow's filter, on 8-bit levels.
        input: `float32` for (C, H, W), normalised; `uint8` where the graph normalises: (H, W, C) levels, in RGB order.
            Networks take float32, so no card says `uint8`; a bundle does.
    """

    resize: Resize | None = None
    crop: Size | None = None
    mean: Levels
    std: Levels
    colour_order: Literal["RGB", "BGR"] = "RGB"
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    input: Literal["float32", "uint8"] = "float32"

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `input` out where it says nothing, so that earlier versions read what they know."""
        data: dict[str, Any] = handler(self)
        return {key: value for key, value in data.items() if key != "input" or value != "float32"}

    @property
    def channels(self) -> int:
        """Channels of the network's input."""
        return len(self.mean)

    @model_validator(mode="after")
    def _one_std_per_mean(self) -> Preprocessing:
        if len(self.std) != len(self.mean):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}; give one per channel")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive; got {self.std}")
        if self.colour_order == "BGR" and self.channels != _COLOURS:
            raise ValueError(f"BGR is an order of three channels; mean has {self.channels}")
        return self


class Published(_Strict):
    """What was published about a model.

    Attributes:
        parameters: of the training-time network.
        macs: multiply-adds an image; papers call them FLOPs.
        top1: ImageNet-1k, percent.
        top5: ImageNet-1k, percent.
        source: where this is said.
    """

    parameters: float | None = None
    macs: float | None = None
    top1: float | None = None
    top5: float | None = None
    source: str


class Weights(_Strict):
    """Where trained weights are: a file beside the cards, or a download with the first hex digits of its SHA-256."""

    file: str | None = None
    url: str | None = None
    sha256_prefix: Annotated[str, Field(pattern="^[0-9a-f]{8,64}$")] | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Weights:
        if (self.file is None) == (self.url is None):
            raise ValueError("weights need exactly one of file and url")
        if self.file is not None and (Path(self.file).is_absolute() or ".." in Path(self.file).parts):
            raise ValueError("weights.file must lie inside the folder of the cards")
        if self.url is not None and not _is_plain_https(self.url):
            raise ValueError("weights.url must be https://HOST/FILE, without a user, in printable ASCII")
        if self.url is not None and self.sha256_prefix is None:
            raise ValueError("a url needs sha256_prefix")
        return self


def _is_plain_https(url: str) -> bool:
    """Return whether a URL can be downloaded and shown; a mirror on this machine may do without TLS."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return False
    plain = (
        url.isascii() and url.isprintable() and " " not in url and len(url) <= _LONGEST_URL and "@" not in parts.netloc
    )
    secure = parts.scheme == "https" or (parts.scheme == "http" and host in ("127.0.0.1", "::1", "localhost"))
    return plain and secure and bool(host) and len(parts.path) > 1


class ModelCard(_Strict):
    """Everything about a model that its weights do not say.

    Attributes:
        name: unique; the bundle's default name.
        family: an entry of `nets.families.FAMILIES`.
        task: what the outputs mean, an entry of `runtime.tasks.TASKS`; `custom` where only the network's owner knows.
        input_size: (H, W) of the network's input.
        network: hyper-parameters, checked by the family.
        layout: the checkpoint layout these weights are published in, where several cards share an architecture.
        labels: name of a list in `models/labels`, or the names themselves; None when unknown.
        scores: how logits become probabilities; by default softmax, or sigmoid for a single logit.
        preprocessing: how the weights expect their images.
        published: figures with their source.
        weights: where trained weights are.
        description: one line for people.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
    family: str
    task: TaskName = "classify"
    input_size: Size
    network: dict[str, Any]
    layout: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)] | None = None
    labels: ListName | Annotated[tuple[Label, ...], Field(max_length=100_000)] | None = None
    scores: Scores | None = None
    preprocessing: Preprocessing
    published: Published | None = None
    weights: Weights | None = None
    description: str = ""

    @model_validator(mode="after")
    def _preprocessing_gives_the_input(self) -> ModelCard:
        resize, crop = self.preprocessing.resize, self.preprocessing.crop
        result = crop if crop is not None else resize.size if resize is not None and resize.mode == "exact" else None
        if result is not None and result != self.input_size:
            raise ValueError(f"preprocessing gives {result[0]}x{result[1]}; input_size is {self.input_size}")
        if resize is not None and crop is not None and (crop[0] > resize.size[0] or crop[1] > resize.size[1]):
            raise ValueError(f"cannot crop {crop[0]}x{crop[1]} from {resize.size[0]}x{resize.size[1]}")
        if self.task == "segment" and (crop is not None or (resize is not None and resize.mode != "exact")):
            raise ValueError("segment answers every pixel: preprocessing must resize to the exact size, without a crop")
        return self


def count_classes(logits: int, scores: Scores | None) -> int:
    """Return how many classes so many logits tell apart: a single one tells no from yes.

    Raises:
        ValueError: such scores cannot be made of so many logits.
    """
    if logits == 1 and scores == "softmax":
        raise ValueError("the softmax of one logit is always 1; scores must be sigmoid or multi-label")
    if logits > 1 and scores == "sigmoid":
        raise ValueError(f"sigmoid is for one logit, and there are {logits}; scores must be softmax or multi-label")
    return 2 if logits == 1 and scores != "multi-label" else logits


def data_root() -> Path:
    """Return the folder of cards, labels and small weights: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for root in (package / "models", package.parent / "models"):
        if (root / "labels").is_dir():
            return root
    raise CardError(f"no models folder in {package} or beside it; reinstall repmlp-deploy")


def list_cards() -> list[str]:
    """Return the names of the cards that ship with the package, sorted."""
    return sorted(path.stem for path in data_root().glob("*.toml"))


def load_card(name_or_path: str | Path) -> ModelCard:
    """Read the card called `name_or_path` in `models/`, or the TOML file of that path.

    Raises:
        CardError: there is none, or it says something wrong.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml" or not _exists(path):
        shipped = data_root() / f"{name_or_path}.toml"
        if path.suffix == ".toml" or path.name != str(name_or_path) or not _exists(shipped):
            near = difflib.get_close_matches(str(name_or_path), list_cards(), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(list_cards())}"
            if path.suffix == ".toml" and not near:
                hint = "there is no such file"
            raise CardError(f"no card {str(name_or_path)!r}; {hint}")
        path = shipped
    return _read_card(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, or a loop of links
        return False


def _read_card(path: Path) -> ModelCard:
    try:
        return ModelCard.model_validate(read_toml(path, _LARGEST_CARD_BYTES))
    except OSError as error:
        raise CardError(f"{path}: {error.strerror or error}") from None
    except ValidationError as error:
        where, said = first_fault(error)
        raise CardError(f"{path}: {where or 'card'}: {said}") from None
    except ValueError as error:  # not TOML, too large, or a number that no card has
        raise CardError(f"{path}: {error}") from None


def read_labels(path: Path) -> tuple[str, ...]:
    """Return the class names in a text file, one per line.

    Raises:
        CardError: it cannot be read, names nothing, or is too large for names.
    """
    try:
        names = tuple(line.strip() for line in read_text(path, _LARGEST_LABELS_BYTES).splitlines())
    except OSError as error:
        raise CardError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise CardError(f"{path}: {error}") from None
    empty = next((i for i, name in enumerate(names, 1) if not name), None)
    if not names or empty is not None:
        raise CardError(f"{path}: {'no names' if not names else f'line {empty} is empty'}; expected one class per line")
    longest = max(map(len, names))
    if longest > _LONGEST_LABEL:
        raise CardError(f"{path}: a name has {longest} characters; at most {_LONGEST_LABEL}")
    return names


def load_labels(card: ModelCard) -> tuple[str, ...] | None:
    """Return the class names of a card, in the order of the logits, or None.

    Raises:
        CardError: the list that the card names is not there.
    """
    if not isinstance(card.labels, str):
        return card.labels
    path = data_root() / "labels" / f"{card.labels}.txt"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt")))
        raise CardError(f"{card.name}: no label list {card.labels!r}; known: {known}")
    return tuple(path.read_text(encoding="utf-8-sig").splitlines())
