"""The installed command, run where modules of other programs have the names of its own."""

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

import appliance
from appliance.__main__ import _put_foreign_directories_last
from tests.fakes.appliance_process import import_tree
from tests.fakes.mounted import Mounted
from tests.fakes.running_command import DEADLINE_S

# Two modules that commands and workers import, and two of the standard library.
IN_THE_WAY: Final = ("lmdb", "blake3", "argparse", "logging")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Return a directory of modules that fail when they are imported."""
    directory = tmp_path / "foreign"
    directory.mkdir()
    for name in IN_THE_WAY:
        (directory / f"{name}.py").write_text(f"raise SystemExit('a foreign {name} was loaded')")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [("appliance",), ("python", "-m", "appliance")], ids=["installed", "module"]
)
@pytest.mark.parametrize("pythonpath", [None, "{foreign}", "{foreign}:", ":/nowhere"])
def test_modules_of_others_are_not_loaded(
    command: tuple[str, ...], pythonpath: str | None, foreign: Path, tmp_path: Path
) -> None:
    (tmp_path / "tree").write_text("content")
    program, *words = command
    environment = [] if pythonpath is None else [f"PYTHONPATH={pythonpath.format(foreign=foreign)}"]
    done = subprocess.run(
        [
            *("env", *environment, str(Path(sys.executable).with_name(program)), *words),
            *("import", "--store", f"lmdb://{tmp_path}/store", str(tmp_path / "tree")),
        ],
        cwd=foreign,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("-tree\n")


@pytest.mark.slow
def test_neither_do_workers_load_them(foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").write_text("content")
    (name,) = import_tree(tmp_path / "store", tmp_path / "tree")
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    prefix = ("env", "-C", str(foreign), f"PYTHONPATH={foreign}")
    with Mounted(tmp_path / "store", mountpoint, prefix=prefix):
        assert (mountpoint / name).read_text() == "content"


def search_path(monkeypatch: pytest.MonkeyPatch, path: list[str], pythonpath: str) -> list[str]:
    monkeypatch.setattr(sys, "path", path)
    monkeypatch.setenv("PYTHONPATH", pythonpath)
    _put_foreign_directories_last()
    return sys.path


def test_what_is_only_in_a_foreign_directory_is_still_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = ["/script", "/b", "/a", "/lib/python", "/lib/site-packages"]
    assert search_path(monkeypatch, path, "/b:/a") == [
        *("/lib/python", "/lib/site-packages"),
        *("/script", "/b", "/a"),
    ]


def test_the_directory_that_the_program_was_started_from_stays_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = str(Path(appliance.__file__).parents[1])
    path = [ours, "/a", "/lib/python"]
    assert search_path(monkeypatch, path, f"/a:{ours}") == [ours, "/lib/python", "/a"]


@pytest.mark.parametrize("module", ["appliance.rpc.daemon", "appliance.supervisor.virtiofs"])
def test_what_serves_no_metrics_loads_no_http_server(module: str) -> None:
    code = f"import sys, {module}; print('aiohttp' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=DEADLINE_S
    )
    assert done.stdout == "False\n"
