"""Completion scripts for bash, zsh and fish, made from the commands themselves.

A script is static: completing a word starts no Python. Print it again after an update.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from repmlp_deploy.cli.shared import entry
from repmlp_deploy.cli.shared.command import as_command

__all__ = ["SHELLS", "command_of", "completion_script"]


def command_of(name: str) -> Any:
    """Return the command called `repmlp NAME`."""
    return as_command(getattr(import_module(f"repmlp_deploy.cli.{name}"), f"{name}_command"))


def completion_script(shell: str) -> str:
    """Return the script that teaches a shell every command and its options."""
    return SHELLS[shell]({name: _words(name) for name in entry.COMMANDS})


def _words(name: str) -> dict[str, str]:
    """Return every option of a command with its help text; none if a package that it needs is missing."""
    try:
        command = command_of(name)
    except ImportError:
        return {}
    with command.make_context(f"repmlp-{name}", [], resilient_parsing=True) as context:
        options = [one for one in command.get_params(context) if one.param_type_name == "option"]
    return {
        word: one.help or "" for one in options for word in (*one.opts, *one.secondary_opts) if word.startswith("--")
    }


def _bash(commands: Mapping[str, Mapping[str, str]]) -> str:
    cases = "\n".join(f"    {name}) words={shlex.quote(' '.join(options))} ;;" for name, options in commands.items())
    names = " ".join(commands)
    return f"""# Completion of repmlp and repmlp-COMMAND for bash.
_repmlp() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" command="${{COMP_WORDS[0]##*/}}" words=""
  if [ "$command" = repmlp ]; then
    if [ "$COMP_CWORD" -eq 1 ]; then
      COMPREPLY=($(compgen -W "{names} --help --version --completion" -- "$current"))
      return
    fi
    command="${{COMP_WORDS[1]}}"
  fi
  case "${{command#repmlp-}}" in
{cases}
  esac
  case "$current" in -*) COMPREPLY=($(compgen -W "$words" -- "$current")) ;; esac
}}
complete -o default -F _repmlp repmlp {" ".join(f"repmlp-{name}" for name in commands)}
"""


def _zsh(commands: Mapping[str, Mapping[str, str]]) -> str:
    return "# Completion of repmlp and repmlp-COMMAND for zsh.\nautoload -U +X bashcompinit && bashcompinit\n" + _bash(
        commands
    )


def _fish(commands: Mapping[str, Mapping[str, str]]) -> str:
    lines = ["# Completion of repmlp and repmlp-COMMAND for fish."]
    for name, options in commands.items():
        about = _fish_text(entry.COMMANDS[name])
        lines.append(f"complete -c repmlp -n __fish_use_subcommand -f -a {name} -d {about}")
        for word, text in options.items():
            said = f"-l {word.removeprefix('--')} -d {_fish_text(text)}"
            lines.append(f"complete -c repmlp -n '__fish_seen_subcommand_from {name}' {said}")
            lines.append(f"complete -c repmlp-{name} {said}")
    return "\n".join([*lines, ""])


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: Mapping[str, Callable[[Mapping[str, Mapping[str, str]]], str]] = MappingProxyType(
    {"bash": _bash, "zsh": _zsh, "fish": _fish}
)
"""Shell to what writes its script."""
