"""Programs of others that a tool runs."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def run(
    *command: str | Path, standard_input: str = "", environment: Mapping[str, str] | None = None
) -> str:
    """Run a command and return what it prints; end this program if it fails, with its words."""
    done = subprocess.run(
        command,
        input=standard_input,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout
