"""What a user says of a network beside its weights: how it takes images, and what its classes are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from pydantic import ValidationError

from repmlp_deploy.card import ModelCard, Preprocessing, Resize, Scores, count_classes, load_labels
from repmlp_deploy.convert.source.class_names import find_class_names
from repmlp_deploy.errors import InputError
from repmlp_deploy.nets.families import FAMILIES, card_spec
from repmlp_deploy.runtime.tasks import find_task

__all__ = ["Completed", "Description", "complete_card", "usual_preprocessing"]

_IMAGENET_MEAN = (123.675, 116.28, 103.53)
_IMAGENET_STD = (58.395, 57.12, 57.375)
_NAMED = ("classify", "segment")  # tasks whose classes have names


@dataclass(frozen=True)
class Description:
    """The parts of a card that were given one by one; None where nothing was said.

    Attributes:
        mean: per channel, in levels 0 to 255.
        std: per channel, in levels 0 to 255.
        resize: `none`, or as a card says it.
        crop: `none`, or (H, W).
        labels: class names in the order of the logits.
        scores: how logits become probabilities.
    """

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    resize: Resize | str | None = None
    crop: tuple[int, int] | str | None = None
    labels: Sequence[str] | None = None
    scores: Scores | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) is not None for field in fields(self))

    def left_to_assume(self) -> tuple[str, ...]:
        """Return what was not said of how the network takes images."""
        said = {"mean": self.mean, "std": self.std, "resize": self.resize}
        return tuple(name for name, value in said.items() if value is None)

    def applied(self, card: ModelCard) -> ModelCard:
        """Return the card with what was said.

        Raises:
            InputError: the parts contradict each other, or the card.
        """
        how = card.preprocessing.model_dump()
        how |= {name: tuple(value) for name, value in (("mean", self.mean), ("std", self.std)) if value is not None}
        if self.std is not None and min(self.std, default=1) < 1:
            raise InputError(f"--std is {_listed(self.std)}; expected levels of 0 to 255: multiply by 255")
        if self.resize is not None:
            how["resize"] = None if isinstance(self.resize, str) else self.resize
            how["crop"] = None
            if isinstance(self.resize, Resize) and self.resize.size != card.input_size:
                how["crop"] = card.input_size
        if self.crop is not None:
            how["crop"] = None if isinstance(self.crop, str) else self.crop
        changes: dict[str, Any] = {}
        if self.labels is not None:
            changes["labels"] = tuple(self.labels)
        if self.scores is not None:
            changes["scores"] = self.scores
        try:
            changes["preprocessing"] = Preprocessing.model_validate(how)
            fresh = {name: getattr(card, name) for name in type(card).model_fields}
            return ModelCard.model_validate(fresh | changes)
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise InputError(f"what was said of the images contradicts {card.name}: {said}") from None


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


@dataclass(frozen=True)
class Completed:
    """A card with everything that is known of its weights.

    Attributes:
        card: complete.
        notes: where its parts are from.
        warnings: what is assumed, or contradicts.
    """

    card: ModelCard
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def complete_card(  # noqa: PLR0913 - what each source says
    card: ModelCard,
    content: Any,
    described: Description,
    assumed: str = "",
    *,
    classes: int | None = None,
    channels: int | None = None,
) -> Completed:
    """Return the card with what the user said, and with the class names that the weights came with.

    Labels are those that the user gives, else those of the card, else those in the file.

    Args:
        card: of the network.
        content: of the checkpoint; None for a network in memory.
        described: what the user said.
        assumed: whose preprocessing the card has, if nobody confirmed it.
        classes: outputs of a user's own network; by default those of the card's family.
        channels: of its images; likewise.

    Raises:
        InputError: there are labels for another number of classes, or what was said contradicts the network.
    """
    changed = described.applied(card) if described else card
    spec = card_spec(card) if card.family in FAMILIES else None
    outputs = getattr(spec, "classes", None) if classes is None else classes
    wanted = _checked(changed, outputs, getattr(spec, "in_channels", None) if channels is None else channels)
    notes, warnings = [], []
    names = find_class_names(content) if card.task in _NAMED else None
    if names is not None and described.labels is None:
        if len(names) != wanted:
            warnings.append(f"the file names {len(names)} classes and the network has {wanted}: the names are not used")
        elif changed.labels is None:
            changed = changed.model_copy(update={"labels": names})
            notes.append("class names: those in the file")
        elif load_labels(changed) != names:
            warnings.append(f"the file names other classes than {card.name}: the card's names are used")
    if changed.labels is None and card.task in _NAMED:
        notes.append("class names unknown: --labels FILE gives them")
    left = described.left_to_assume()
    if assumed and left and not find_task(card.task).refusal:
        options = ", ".join(f"--{name}" for name in left)
        warnings.append(
            f"{', '.join(left)} of the images: assumed to be those of {assumed}; answers are wrong if they are not. "
            f"Say them with --card or {options}"
        )
    return Completed(changed, tuple(notes), tuple(warnings))


def _checked(card: ModelCard, outputs: int | None, channels: int | None) -> int | None:
    """Return the number of classes; raise InputError where the card is of another network."""
    how = card.preprocessing
    if channels is not None and how.channels != channels and not find_task(card.task).refusal:
        raise InputError(f"{card.name} has a mean for {how.channels} channels; the network takes {channels}")
    if outputs is None or card.task not in _NAMED:
        return None
    try:
        classes = count_classes(outputs, card.scores) if card.task == "classify" else outputs
    except ValueError as error:
        raise InputError(f"{card.name}: {error}") from None
    labels = load_labels(card)
    if labels is not None and len(labels) != classes:
        raise InputError(f"{card.name} has {classes} classes, and {len(labels)} labels; give one per class")
    return classes


def usual_preprocessing(size: tuple[int, int], channels: int) -> Preprocessing:
    """Return what most networks for ImageNet take; where there are no colours, channels have the colours' average."""
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    if channels != len(mean):
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return Preprocessing(resize=Resize(mode="exact", size=size), mean=mean, std=std)
