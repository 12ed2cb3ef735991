"""The network of a bundle loaded again, called as it was when it was exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from repmlp_deploy import Bundle, export
from repmlp_deploy.convert.rework.locate import load_origin
from support.own_networks import ByPosition, NameOnly, PositionOnly, Scorer, WithGap


def without_record(bundle: Bundle) -> Bundle:
    """Return the bundle as an earlier release wrote it."""
    provenance = {key: value for key, value in bundle.manifest.provenance.items() if key != "by_name"}
    return Bundle(bundle.manifest.model_copy(update={"provenance": provenance}), folder=bundle.folder)


@pytest.mark.parametrize("made", [ByPosition, PositionOnly, NameOnly, WithGap, Scorer])
def test_a_network_is_called_as_it_was_exported(made: type[nn.Module], tmp_path: Path) -> None:
    torch.save(made().state_dict(), tmp_path / "x.pth")
    module = f"support.own_networks:{made.__name__}"
    bundle = export(tmp_path / "x.pth", module=module, formats="torch", out=tmp_path / "out")
    names = [spec.name for spec in bundle.manifest.inputs]
    for known in (bundle, without_record(bundle)):
        again = load_origin(known, tmp_path / "x.pth", module=module)
        assert again.interface is not None
        assert list(again.interface.inputs) == names
        assert again.interface.by_name == isinstance(made.example_input, dict)


def test_the_record_goes_before_the_networks_own_example(tmp_path: Path) -> None:
    torch.save(WithGap().state_dict(), tmp_path / "x.pth")
    module = "support.own_networks:WithGap"
    given = (torch.zeros(1, 3, 6, 6), torch.ones(1, 1, 1, 1))
    bundle = export(tmp_path / "x.pth", module=module, example_input=given, formats="torch", out=tmp_path / "out")
    again = load_origin(bundle, tmp_path / "x.pth", module=module).interface
    assert again is not None
    assert (again.inputs, again.by_name) == (("x", "scale"), False)
