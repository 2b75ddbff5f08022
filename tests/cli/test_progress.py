"""Progress of commands: on a terminal, in a log, for programs, and not at all."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from appliance.cli import terminal
from appliance.cli.terminal import ProgressForm, ProgressLine
from appliance.copier.ingest import CopyProgress
from appliance.services.checked_contents import VerifyProgress

APPLIANCE: Final = str(Path(sys.executable).with_name("appliance"))
DEADLINE_S: Final = 120


class Clock:
    """Stands in for the clock of the module under test."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(terminal, "time", made)
    return made


def shown(clock: Clock, form: ProgressForm) -> str:
    """Return what a command of half a minute shows where there is no terminal."""
    stream = io.StringIO()
    line = ProgressLine(stream, form)
    for second in range(30):
        clock.now_s += 1
        line.update(
            num_files=second, num_bytes=second * 10_000_000, path="file", fraction=second / 100
        )
    line.clear()
    return stream.getvalue()


def test_a_log_has_a_plain_line_every_ten_seconds(clock: Clock) -> None:
    assert shown(clock, ProgressForm.PLAIN).splitlines() == [
        "9 files, 90.0 MB, 9 MB/s, 9%, 1:41 left  file",
        "19 files, 190.0 MB, 10 MB/s, 19%, 1:25 left  file",
        "29 files, 290.0 MB, 10 MB/s, 29%, 1:13 left  file",
    ]


def test_programs_get_events(clock: Clock) -> None:
    first, *_others = map(json.loads, shown(clock, ProgressForm.JSON).splitlines())
    assert first == {
        "event": "progress",
        "files": 9,
        "bytes": 90_000_000,
        "bytesPerSecond": 9_000_000,
        "fraction": 0.09,
        "secondsLeft": 101,
        "path": "file",
    }


def test_a_quiet_command_shows_nothing(clock: Clock) -> None:
    assert shown(clock, ProgressForm.NONE) == ""


def test_no_time_is_told_where_nothing_is_known(clock: Clock) -> None:
    stream = io.StringIO()
    line = ProgressLine(stream)
    clock.now_s += 20
    line.update(num_files=1, num_bytes=0, path="file", fraction=None)
    clock.now_s += 20
    line.update(num_files=1, num_bytes=0, path="file", fraction=0.0)
    assert stream.getvalue().splitlines() == ["1 files, 0.0 MB, 0 MB/s  file"] * 2


def test_what_is_done_of_all() -> None:
    copied = CopyProgress()
    assert copied.fraction() is None
    copied.num_expected_bytes, copied.num_bytes = 200, 50
    assert copied.fraction() == 0.25
    verified = VerifyProgress()
    assert verified.fraction() is None
    verified.num_expected_paths, verified.num_paths = 4, 3
    assert verified.fraction() == 0.75


def on_terminal(*command: str) -> str:
    """Run a command on a terminal of its own, and return what it shows there."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execv(command[0], command)
    pieces = []
    while select.select([fd], [], [], DEADLINE_S)[0]:
        try:
            piece = os.read(fd, 1 << 16)
        except OSError:  # the command has ended, and its terminal with it
            break
        pieces.append(piece)
    os.close(fd)
    text = b"".join(pieces).decode()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, text
    return text


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("progress")
    for number in range(4):
        tree = directory / f"tree{number}"
        tree.mkdir()
        (tree / "file").write_bytes(os.urandom(4 << 20))
    uri = f"lmdb://{directory}/store"
    trees = [str(path) for path in sorted(directory.glob("tree*"))]
    subprocess.run([APPLIANCE, "import", "--store", uri, *trees], check=True, timeout=DEADLINE_S)
    return uri


@pytest.mark.slow
@pytest.mark.parametrize("words", [("verify",), ("copy", "-r", "--from")])
def test_a_terminal_shows_how_far_it_is(words: tuple[str, ...], store: str, tmp_path: Path) -> None:
    if words[0] == "copy":
        listed = subprocess.run(
            [APPLIANCE, "path-info", "--store", store],
            check=True,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        ).stdout.split()
        words = (*words, store, "--store", f"lmdb://{tmp_path}/other", *listed)
    else:
        words = (*words, "--store", store)
    loud, quiet = on_terminal(APPLIANCE, *words), on_terminal(APPLIANCE, *words, "-q")
    assert re.search(r"\r\x1b\[K\d+ files, \d+\.\d MB, \d+ MB/s", loud), loud
    assert "MB/s  " not in quiet
    # The program uses no colours, so there are none for NO_COLOR to switch off.
    assert re.findall(r"\x1b\[[0-9;]*m", loud) == []
