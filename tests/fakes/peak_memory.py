"""The most memory that a program, or any process it started, has had."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# A program that pytest starts begins with pytest's own peak to its name; one that this small
# program starts does not.
_MEASURE = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


class Measured(NamedTuple):
    """What a program wrote, and the peak of its largest process."""

    output: str
    memory_bytes: int


def measure_memory(
    command: Sequence[str | Path], environ: Mapping[str, str] | None = None
) -> Measured:
    """Run `command` to its end; its processes have to wait for theirs."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *command],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **(environ or {})},
        timeout=900,
    )
    return Measured(done.stderr, int(done.stdout) * 1024)


def peak_bytes(pid: int) -> int:
    """Return the most memory that a running process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def with_children(pid: int) -> list[int]:
    """Return the ids of a running process and of all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in with_children(int(child)))]
