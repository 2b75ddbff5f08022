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
