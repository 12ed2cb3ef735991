"""The page of all commands and options, docs/reference/commands.md, made from the commands themselves.

.venv/bin/python tools/command_reference.py           # write it
.venv/bin/python tools/command_reference.py --check   # exit 1 if it is out of date
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from repmlp_deploy.cli.shared.command import EXAMPLES
from repmlp_deploy.cli.shared.completion import command_of
from repmlp_deploy.cli.shared.entry import COMMANDS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "commands.md"

HEAD = """# Commands

<!-- made by tools/command_reference.py from the commands themselves -->

`repmlp COMMAND`, `repmlp-COMMAND` and `python -m repmlp_deploy COMMAND` are the same. `repmlp --help` is a map of all
commands, and `repmlp --version` prints the version. `python export.py` in a checkout is `repmlp-export`.

Reports go to stdout; progress, warnings and errors go to stderr. Colours are off in pipes and where `NO_COLOR` is set.
[Exit codes and errors](errors.md) are the same for all commands.

`repmlp --completion SHELL` prints a completion script for bash, zsh or fish. For bash:

```bash
mkdir -p ~/.local/share/bash-completion/completions
repmlp --completion bash > ~/.local/share/bash-completion/completions/repmlp
```
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *(line for name in COMMANDS for line in section(name))])


def section(name: str) -> Iterator[str]:
    """Yield the lines about one command."""
    command = command_of(name)
    context = command.make_context(f"repmlp-{name}", [], resilient_parsing=True)
    usage = " ".join(command.collect_usage_pieces(context))
    yield from (f"## repmlp-{name}", "", " ".join((command.help or "").split()), "")
    yield from (f"Usage: `repmlp-{name} {usage}`", "")
    arguments = [one for one in command.get_params(context) if one.param_type_name == "argument"]
    if arguments:
        yield from ("| argument | meaning |", "|---|---|")
        yield from (_row(one, context) for one in arguments)
        yield ""
    for title, options in command.grouped(context):
        yield from (f"**{title}**", "", "| option | meaning |", "|---|---|")
        yield from (_row(one, context) for one in options)
        yield ""
    if EXAMPLES[name]:
        yield from ("**Examples**", "", "<!-- not run: a test compares its options with those of the command -->")
        yield from ("```bash", *EXAMPLES[name], "```", "")


def _row(option: Any, context: Any) -> str:
    """Return the row of one parameter: its names and value, and what the help says."""
    shown, text = (" ".join(words.split()) for words in option.get_help_record(context))
    return f"| <code>{_cell(shown)}</code> | {_cell(text)} |"


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "&#124;")


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is out of date")
    check = parser.parse_args().check
    made = page()
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == made:
        return 0
    if check:
        print(f"{PAGE} is out of date: run python tools/command_reference.py")
        return 1
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
