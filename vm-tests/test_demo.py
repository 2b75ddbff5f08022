"""`make demo` where it does not come to its end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

DEADLINE_S = 120
PROJECT = Path(__file__).resolve().parents[1]


def start_demo(tree: Path, scratch: Path) -> "subprocess.Popen[str]":
    """Start it with `scratch` for its temporary files."""
    scratch.mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "vmharness.demo", tree],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": "vm-tests", "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_tree_that_cannot_be_imported_is_told_of_in_two_lines(tmp_path: Path) -> None:
    tree = tmp_path / "no name for a store path"
    tree.mkdir()
    process = start_demo(tree, tmp_path / "scratch")
    _out, errors = process.communicate(timeout=DEADLINE_S)
    reason, command = errors.splitlines()
    assert process.returncode == 1
    assert reason.startswith(f"appliance: {tree}: no name for a path in /nix/store: ")
    assert command.startswith("demo: ")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_ctrl_c_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    process = start_demo(tree, tmp_path / "scratch")
    assert process.stdout is not None
    while "Imported" not in process.stdout.readline():
        pass
    os.killpg(process.pid, signal.SIGINT)
    _out, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (130, "demo: interrupted\n")
    assert list((tmp_path / "scratch").iterdir()) == []
