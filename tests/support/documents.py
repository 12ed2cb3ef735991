"""The code blocks of a document: which run, in what order, and what they must print.

A fenced block of `bash` or `python` runs. A block of `text` after it is what it prints, where `…` stands for anything.
A comment in front of a block says more about it:

    <!-- not run: REASON -->    it is shown only; the reason is one of `REASONS`
    <!-- ends with: CODE -->    its exit code; the text that follows is on stderr
    <!-- runs beside the rest -->    a server: the blocks after it begin when it is ready
    <!-- of another run -->    a text that the block before it does not print
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from support.warm_process import WarmProcess

REASONS = (
    "installs packages",
    "needs a GPU",
    "needs a cluster",
    "needs a network connection",
    "needs packages of a vendor",
    "needs the server",
    "needs torchvision",
    "serves until it is stopped",
    "takes minutes",
    "a test compares its options with those of the command",
)

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: where it begins.
        language: the word behind the fence.
        code: its text.
        mark: what the comment in front of it says.
        printed: the text block behind it, if there is one.
    """

    line: int
    language: str
    code: str
    mark: str
    printed: str | None = None

    @property
    def runs(self) -> bool:
        return self.language in {"bash", "python"} and not self.mark.startswith("not run: ")

    @property
    def serves(self) -> bool:
        return self.mark == "runs beside the rest"

    @property
    def code_expected(self) -> int:
        return int(self.mark.removeprefix("ends with: ")) if self.mark.startswith("ends with: ") else 0


def blocks(text: str) -> list[Block]:
    """Return the blocks of a document; one of `text` belongs to the block before it."""
    found: list[Block] = []
    for one in _BLOCK.finditer(text):
        line = text.count("\n", 0, one.start("code"))
        block = Block(line, one["language"], one["code"], one["mark"] or "")
        if block.language == "text" and not block.mark and found and found[-1].runs:
            found[-1] = replace(found[-1], printed=block.code)
        else:
            found.append(block)
    return found


def faults(text: str) -> Iterator[str]:
    """Yield what is wrong with the marks of a document, and which code would escape a test."""
    for block in blocks(text):
        if block.language not in {"bash", "python", "text", "toml", "json", "yaml", "{eval-rst}"}:
            yield f"line {block.line}: a block of {block.language or 'no language'}"
        if block.mark.startswith("not run: ") and block.mark.removeprefix("not run: ") not in REASONS:
            yield f"line {block.line}: {block.mark}; known reasons: {', '.join(REASONS)}"
    plain = _BLOCK.sub("", text)
    for number, line in enumerate(plain.splitlines(), 1):
        if re.match(r" {4}(\S*repmlp-|python |pip |make |curl )", line):
            yield f"an indented command, which nothing runs: {line.strip()} ({number})"


def matches(expected: str, printed: str) -> bool:
    """Return whether a text is what was expected; `…` stands for anything, and trailing spaces for nothing."""
    pattern = ".*?".join(re.escape(part) for part in _stripped(expected).split("…"))
    return re.fullmatch(pattern, _stripped(printed), re.DOTALL) is not None


def _stripped(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


@contextmanager
def served(block: Block, folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Run a block that serves until the end of the document."""
    log = folder / "server.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {block.code}"], cwd=folder, stdout=file, stderr=file, env=os.environ | environment
        )
    try:
        until = time.monotonic() + _READY_SECONDS
        while "model ready" not in log.read_text(encoding="utf-8"):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < until, log.read_text(encoding="utf-8")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        assert process.wait(30) == 0, log.read_text(encoding="utf-8")


_READY_SECONDS = 120


def with_free_ports(text: str) -> str:
    """Return a document with ports that nobody uses in the place of 8000 and 8001."""
    for port in ("8000", "8001"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            text = re.sub(rf"\b{port}\b", str(probe.getsockname()[1]), text)
    return text


def run_block(block: Block, folder: Path, environment: Mapping[str, str], warm: WarmProcess | None = None) -> None:
    """Run a block as a user would, and fail if it does not do what the document says.

    Args:
        block: of `bash` or `python`.
        folder: where it runs.
        environment: variables beside those of this process.
        warm: what runs Python and plain commands in a fraction of the time; by default, bash runs everything.
    """
    if warm is not None and block.language == "python":
        ended = warm.run(folder=folder, environment=environment, script=block.code)
        _check(block, ended.code, ended.out, ended.err)
        return
    code, out, err = 0, "", ""
    for step in steps(block, warm is not None):
        if isinstance(step, str):
            command = (
                ["bash", "-euo", "pipefail", "-c", step] if block.language == "bash" else [sys.executable, "-c", step]
            )
            done = subprocess.run(
                command,
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
                env=os.environ | environment,
            )
            code, out, err = done.returncode, out + done.stdout, err + done.stderr
        else:
            assert warm is not None
            program, *words = step
            script = python_script(words) if program == "python" else None
            ended = warm.run(*([] if script else step), folder=folder, environment=environment, script=script)
            code, out, err = ended.code, out + ended.out, err + ended.err
        if code:
            break
    _check(block, code, out, err)


def _check(block: Block, code: int, out: str, err: str) -> None:
    """Fail if a block did not end as the document says, or printed something else."""
    said = f"line {block.line}:\n{block.code}\nstdout:\n{out}\nstderr:\n{err}"
    assert code == block.code_expected, f"ended with {code}, {said}"
    if block.printed is not None:
        printed = out if block.code_expected == 0 else err
        assert matches(block.printed, printed), f"did not print\n{block.printed}\n{said}"


def steps(block: Block, warm: bool) -> Iterator[str | list[str]]:
    """Yield what to run: text for an interpreter, or the words of a plain command of Python or of this project."""
    lines = block.code.replace("\\\n", " ").splitlines()
    plain = [_plain_command(line) for line in lines]
    if not warm or block.language != "bash" or not any(plain) or "<<" in block.code:
        yield block.code
        return
    for line, words in zip(lines, plain, strict=True):
        yield words or line


def _plain_command(line: str) -> list[str]:
    """Return the words of a command of Python or of this project that needs no shell; none for any other line."""
    if set(line) & set("$`"):
        return []
    reader = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    reader.whitespace_split = True
    try:
        program, *words = list(reader) or [""]
    except ValueError:  # a quotation that the next line ends
        return []
    if any(set(word) <= set("|&;<>") for word in words if word):
        return []
    name = program.removeprefix("repmlp-")
    if program == "python":
        return [program, *words] if words and (words[0] == "-c" or words[0].endswith(".py")) else []
    return [name, *words] if name not in {program, *_OWN_PROCESSES} else []


def python_script(words: list[str]) -> str:
    """Return a script that does what `python WORDS` does in a process of its own."""
    if words[0] == "-c":
        return f"import sys\nsys.path.insert(0, '')\nsys.argv = {['-c', *words[2:]]!r}\n{words[1]}"
    return f"import runpy, sys\nsys.argv = {words!r}\nrunpy.run_path({words[0]!r}, run_name='__main__')"


_OWN_PROCESSES = ("bench", "serve")
"""Commands that start processes of their own, or that end by a signal."""
