"""The completions, in the three shells: a word is typed, then Tab."""

import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tools.completions import PLACES

pytestmark = pytest.mark.slow

DEADLINE_S: Final = 60
DISCARD_LINE: Final = "\x15"  # Ctrl-U
# What is typed, and what it becomes.
COMPLETED: Final = {
    "appliance doct": "doctor",
    "appliance doctor mou": "mount",
    "appliance view crea": "create",
    "appliance status --js": "--json",
    "appliance import --directory-sizes docu": "documented",
    "appliance mount /proc/sys/ker": "/proc/sys/kernel",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("completions")
    command = [sys.executable, "-m", "tools.completions", str(made)]
    subprocess.run(command, check=True, timeout=DEADLINE_S)
    return made


class Terminal:
    """A shell on a terminal of its own."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.shown = ""

    def type(self, text: str) -> None:
        self.shown = ""
        os.write(self._fd, text.encode())

    def wait_for(self, pattern: str) -> None:
        """Read what the shell shows until it matches `pattern`."""
        while not re.search(pattern, self.shown):
            ready, _, _ = select.select([self._fd], [], [], DEADLINE_S)
            assert ready, self.shown
            self.shown += os.read(self._fd, 4096).decode(errors="replace")


@contextmanager
def terminal(*command: str) -> Iterator[Terminal]:
    pid, fd = pty.fork()
    if pid == 0:
        os.environ.update(TERM="dumb", HOME="/nonexistent")
        os.execvp(command[0], command)
    try:
        yield Terminal(fd)
    finally:
        os.close(fd)  # the shell gets SIGHUP
        os.waitpid(pid, 0)


def started(shell: Terminal, *lines: str) -> None:
    for number, line in enumerate(lines):
        shell.type(f"{line}; echo did-$(({number} + 100))\n")
        shell.wait_for(f"did-{number + 100}")


def test_bash_completes(directory: Path) -> None:
    with terminal("bash", "--norc", "--noprofile", "-i") as shell:
        started(shell, "bind 'set enable-bracketed-paste off'", f". {directory / PLACES['bash']}")
        for typed, word in COMPLETED.items():
            shell.type(f"{typed}\t")
            shell.wait_for(re.escape(f"{typed.rpartition(' ')[0]} {word}"))
            shell.type(DISCARD_LINE)


def test_zsh_completes(directory: Path) -> None:
    with terminal("zsh", "-f", "-i") as shell:
        place = (directory / PLACES["zsh"]).parent
        started(
            shell,
            "unsetopt zle_bracketed_paste prompt_cr prompt_sp",
            f"fpath=({place} $fpath); autoload -Uz compinit; compinit -u -D",
        )
        for typed, word in COMPLETED.items():
            shell.type(f"{typed}\t")
            shell.wait_for(re.escape(f"{typed.rpartition(' ')[0]} {word}"))
            shell.type(DISCARD_LINE)


def test_fish_completes(directory: Path) -> None:
    for typed, word in COMPLETED.items():
        script = f"source {directory / PLACES['fish']}; complete -C '{typed}'"
        done = subprocess.run(
            ["fish", "--no-config", "-c", script],
            capture_output=True,
            text=True,
            check=True,
            timeout=DEADLINE_S,
        )
        offered = [line.partition("\t")[0].rstrip("/") for line in done.stdout.splitlines()]
        assert word in offered, done.stdout


def test_shells_read_them_without_a_word(directory: Path) -> None:
    for shell, place in PLACES.items():
        done = subprocess.run(
            [shell, "-n", str(directory / place)],
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
