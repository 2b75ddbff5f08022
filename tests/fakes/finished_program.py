"""Programs that a test runs to their end."""

import subprocess
from pathlib import Path
from typing import Final

# The longest of them installs a Debian.
DEADLINE_S: Final = 1800


def output_of(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command, which must end with status 0, and return all that it prints."""
    done = subprocess.run(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
