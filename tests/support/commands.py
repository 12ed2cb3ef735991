"""Run commands in this process."""

from __future__ import annotations

import pytest

from repmlp_deploy.card import data_root
from repmlp_deploy.cli.shared.console import run_command

SAMPLES = sorted((data_root() / "samples" / "digits").glob("*.png"))


def ends_with(command: object, *arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run_command(command, [str(argument) for argument in arguments])
    return int(ended.value.code)
