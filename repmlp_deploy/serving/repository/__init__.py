"""Model repositories of other servers: what `repmlp-pack` writes.

Adding a server is adding a module here and its entry to `LAYOUTS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from repmlp_deploy.errors import InputError
from repmlp_deploy.serving.repository import kserve, ovms, triton
from repmlp_deploy.serving.repository.choice import Choice, ImageStep, Layout, Packed
from repmlp_deploy.serving.repository.writing import write_packed

__all__ = ["LAYOUTS", "Choice", "ImageStep", "Layout", "Packed", "find_layout", "write_packed"]

LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "triton": Layout("NVIDIA Triton Inference Server", triton.pack),
        "ovms": Layout("OpenVINO Model Server", ovms.pack),
        "kserve": Layout("KServe, with Triton as its runtime", kserve.pack),
    }
)
"""Name of a server to what packs a bundle for it."""


def find_layout(name: str) -> Layout:
    """Return the layout called `name`.

    Raises:
        InputError: there is none.
    """
    if name not in LAYOUTS:
        near = difflib.get_close_matches(name, LAYOUTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(LAYOUTS)}"
        raise InputError(f"--layout {name}: unknown; {hint}")
    return LAYOUTS[name]
