"""The page that a person reads: the models, their state and latency, and a form to try an image."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from string import Template

from repmlp_deploy import __version__
from repmlp_deploy.serving.images import IMAGE_OUTPUTS
from repmlp_deploy.serving.models import IMAGE_SUFFIX, Models
from repmlp_deploy.serving.served_model import ServedModel
from repmlp_deploy.text import printable

__all__ = ["page_file", "render_page"]

_KINDS = {"page.js": "text/javascript", "page.css": "text/css"}
_MILLISECONDS = 1e3


def page_file(name: str) -> tuple[bytes, str]:
    """Return the script or the style, and its media type."""
    return files(__name__).joinpath(name).read_bytes(), _KINDS[name]


def render_page(models: Models) -> str:
    """Return the page as it is now."""
    template = Template(files(__name__).joinpath("page.html").read_text(encoding="utf-8"))
    served = models.all()
    takers = [m.name for m in served if m.ready and m.version().manifest.task in IMAGE_OUTPUTS]
    return template.substitute(
        version=__version__,
        state="ready" if models.ready else "stopping" if models.stopping else "not ready",
        state_class="good" if models.ready else "bad",
        models="\n".join(map(_card, served)),
        choices="".join(f'<option value="{_safe(name + IMAGE_SUFFIX)}">{_safe(name)}</option>' for name in takers),
        form_class="" if takers else "hidden",
    )


def _safe(text: object) -> str:
    return escape(printable(text))


def _card(model: ServedModel) -> str:
    """Return what the page says of one model."""
    said = [
        f'<h2>{_safe(model.name)} <span class="{"good" if model.ready else "bad"}">{_safe(_state(model))}</span></h2>'
    ]
    if model.reason:
        said.append(f'<p class="reason">{_safe(model.reason)}</p>')
    if model.refused and model.ready:
        said.append(f'<p class="reason">A new bundle was refused: {_safe(model.refused)}</p>')
    if model.ready:
        said.append("<dl>" + "".join(f"<dt>{_safe(k)}</dt><dd>{_safe(v)}</dd>" for k, v in _facts(model)) + "</dl>")
        said += [f'<p class="warning">{_safe(warning)}</p>' for warning in model.version().manifest.warnings]
    return f'<section class="model">{"".join(said)}</section>'


def _state(model: ServedModel) -> str:
    return {"ready": "ready", "loading": "loading", "unavailable": "not ready", "unloaded": "unloaded"}[model.state]


def _facts(model: ServedModel) -> list[tuple[str, str]]:
    version, latency = model.version(), model.metrics.quantiles()
    runner, manifest = version.served.runner, version.manifest
    margin = "no error at all" if version.margin in (None, float("inf")) else f"{version.margin:.3g} × below its limit"
    facts = [
        ("task", manifest.task),
        ("version", version.name),
        ("runs", f"{runner.format} on {runner.device}"),
        ("self-check", f"passed, {margin}"),
        ("batch", f"{manifest.batch.min} to {manifest.batch.max}"),
        ("answered", str(latency.requests)),
    ]
    if latency.requests:
        quantiles = ((name, value) for name, value in (("half", latency.median), ("99 %", latency.p99)))
        facts.append(("latency", ", ".join(f"{name} {_at_most(value)}" for name, value in quantiles)))
    return facts


def _at_most(seconds: float | None) -> str:
    return "above 10 s" if seconds is None else f"within {seconds * _MILLISECONDS:g} ms"
