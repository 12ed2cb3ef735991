"""Small networks of the families that timm does not have, written for these tests, each with its package's own hook.

`STANDINS` names them. A network has `blocks`, the number of convolutions its re-parameterizable blocks must become, and
`example_input`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from support.standins import acnet, dbb, repconv, replknet, repvgg, unireplknet

STANDINS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "acnet": acnet.make,
        "dbb": dbb.make,
        "repconv": repconv.make,
        "replknet": replknet.make,
        "repvgg": repvgg.make,
        "unireplknet": unireplknet.make,
    }
)
"""Family to what makes a network of it, in evaluation mode, with BatchNorms far from the identity."""
