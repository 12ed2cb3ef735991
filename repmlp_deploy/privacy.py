"""Report nothing to anybody.

Some libraries report their use, and leave identifiers and unsent events in the user's home:

- ONNX Runtime, from 1.30 on, does so unless `ORT_DISABLE_TELEMETRY` is set when it is loaded.
- OpenVINO and NNCF do so through the package openvino-telemetry. Where that cannot be imported, they take a stand-in of
  their own that does nothing.

A tool that runs on other people's servers has no business in reporting what they deploy.
"""

from __future__ import annotations

import os
import sys

__all__ = ["report_nothing"]


def report_nothing() -> None:
    """Switch these reports off in this process and its children; what is loaded already stays as it is."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None makes its import fail
