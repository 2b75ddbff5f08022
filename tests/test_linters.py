import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

COMMANDS = {
    "ruff-format": ["ruff", "format", "--check", "--diff"],
    "ruff-check": ["ruff", "check"],
    "import-linter": ["lint-imports", "--no-cache"],
    "mypy": ["mypy"],
    "mypy-vm-tests": ["mypy", *map(str, sorted(PROJECT.glob("vm-tests/*.py")))],
}


@pytest.mark.lint
@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_has_nothing_to_say(command: list[str]) -> None:
    program, *options = command
    done = subprocess.run(
        [BIN / program, *options],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )

    assert done.returncode == 0, done.stdout
