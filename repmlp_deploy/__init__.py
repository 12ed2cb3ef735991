"""From a trained RepMLP checkpoint to a deployable artifact, proved equal to the trained network.

Public names are loaded on first use, so that importing the package loads no framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from repmlp_deploy.privacy import report_nothing

__version__ = "0.1.0"

report_nothing()  # before a library is loaded that would report

_HOMES = {
    "Bundle": "repmlp_deploy.bundle",
    "Description": "repmlp_deploy.convert.source.description",
    "Embedding": "repmlp_deploy.runtime.tasks",
    "EngineOptions": "repmlp_deploy.convert.engine_options",
    "EngineSettings": "repmlp_deploy.runtime.runner",
    "LabelledFolder": "repmlp_deploy.evaluation.loop",
    "ModelCard": "repmlp_deploy.card",
    "Prediction": "repmlp_deploy.runtime.tasks",
    "Predictor": "repmlp_deploy.runtime.predictor",
    "RepMLPError": "repmlp_deploy.errors",
    "Segmentation": "repmlp_deploy.runtime.tasks",
    "VerificationError": "repmlp_deploy.errors",
    "export": "repmlp_deploy.convert.pipeline",
    "get_model": "repmlp_deploy.zoo",
    "inference_model": "repmlp_deploy.zoo",
    "list_cards": "repmlp_deploy.card",
    "load_card": "repmlp_deploy.card",
    "merge_branches": "repmlp_deploy.convert.reparam.merge",
}

__all__ = [
    "Bundle",
    "Description",
    "Embedding",
    "EngineOptions",
    "EngineSettings",
    "LabelledFolder",
    "ModelCard",
    "Prediction",
    "Predictor",
    "RepMLPError",
    "Segmentation",
    "VerificationError",
    "__version__",
    "export",
    "get_model",
    "inference_model",
    "list_cards",
    "load_card",
    "merge_branches",
]

if TYPE_CHECKING:
    from repmlp_deploy.bundle import Bundle
    from repmlp_deploy.card import ModelCard, list_cards, load_card
    from repmlp_deploy.convert.engine_options import EngineOptions
    from repmlp_deploy.convert.pipeline import export
    from repmlp_deploy.convert.reparam.merge import merge_branches
    from repmlp_deploy.convert.source.description import Description
    from repmlp_deploy.errors import RepMLPError, VerificationError
    from repmlp_deploy.evaluation.loop import LabelledFolder
    from repmlp_deploy.runtime.predictor import Predictor
    from repmlp_deploy.runtime.runner import EngineSettings
    from repmlp_deploy.runtime.tasks import Embedding, Prediction, Segmentation
    from repmlp_deploy.zoo import get_model, inference_model


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from repmlp_deploy.errors import optional_imports  # noqa: PLC0415 - importing the package loads nothing

    with optional_imports():
        value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
