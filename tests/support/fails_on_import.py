"""A user's module that cannot be imported, for a reason of its own."""

from __future__ import annotations

raise RuntimeError("no GPU here")
