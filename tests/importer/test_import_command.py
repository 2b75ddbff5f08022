"""`appliance import` as a command: for people, shells and service managers."""

import fcntl
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.castore.names import display
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import APPLIANCE, every_event
from tests.importer.trees import DEADLINE_S, import_command, make_many_files, make_sparse

NO_SPACE = "appliance: standard output: No space left on device\n"


@pytest.fixture
def command(tmp_path: Path) -> str:
    """Return a shell command that imports a small file."""
    (tmp_path / "file").write_text("content")
    return shlex.join(map(str, import_command(tmp_path / "store", tmp_path / "file")))


def in_shell(text: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-c", text], check=False, capture_output=True, text=True, timeout=DEADLINE_S
    )


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_line(command: str, unbuffered: str) -> None:
    done = in_shell(f"PYTHONUNBUFFERED={unbuffered} {command} >/dev/full")
    assert (done.returncode, done.stderr) == (1, NO_SPACE)


@pytest.mark.slow
def test_output_written_at_the_end_is_no_different(command: str) -> None:
    listing = command.replace(" import ", " path-info ", 1).rpartition(" ")[0]
    done = in_shell(f"export PYTHONUNBUFFERED=; {listing}")
    assert done.returncode == 1  # there is no store yet
    in_shell(command)
    done = in_shell(f"export PYTHONUNBUFFERED=; {listing} >/dev/full")
    assert (done.returncode, done.stderr) == (1, NO_SPACE)


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["0<&-", "2>&-", "0<&- 2>&-"])
def test_closed_standard_streams_are_no_trouble(command: str, closed: str) -> None:
    done = in_shell(f"{command} {closed}")
    assert (done.returncode, done.stdout.count("-file\n")) == (0, 1)


def test_too_few_descriptors_are_one_line(command: str) -> None:
    done = in_shell(f"ulimit -n 8; {command}")
    assert (done.returncode, done.stderr) == (1, "appliance: Too many open files\n")


@pytest.mark.parametrize("words", ["import ''", "mount ''", "import --store= x", "status --store="])
def test_an_empty_argument_is_not_taken_for_the_working_directory_or_the_default(
    command: str, words: str
) -> None:
    program = command.partition(" import ")[0]
    done = in_shell(f"{program} {words}")
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line.startswith("appliance: ")) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--name 'sp ace'", "--name 'sp ace': character ' ' at 2 is not allowed"),
        ("--name .-x", "--name '.-x': begins with a part that is . or .."),
        ("--name ''", "--name '': has 0 characters, expected 1 to 211"),
        ("/ --name x", "--name x: there are 2 PATHs, expected one"),
    ],
)
def test_a_name_that_no_store_path_has_is_bad_usage(
    command: str, tmp_path: Path, words: str, reason: str
) -> None:
    done = in_shell(f"{command} {words}")
    assert (done.returncode, done.stderr) == (2, f"appliance: {reason}\n")
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_a_name_is_that_of_the_store_path(command: str) -> None:
    done = in_shell(f"{command} --name other-1.0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("-other-1.0\n")


@pytest.mark.slow
def test_a_warning_is_one_line_and_the_import_goes_on(command: str, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    for number in range(1100):
        (tmp_path / "large" / str(number)).symlink_to("t" * 4000)
    done = in_shell(f"{command} {tmp_path}/large")
    assert (done.returncode, done.stdout.count("\n")) == (0, 2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("WARNING appliance.importer")
    assert f"{tmp_path}/large: its 1100 entries" in line


def test_a_name_for_a_message_leaves_a_terminal_alone() -> None:
    assert display("ü/ordinary name".encode()) == "ü/ordinary name"
    assert display(b"a\rb\x1b[31m\n\x85\xff") == r"a\rb\x1b[31m\n\x85\xff"
    assert display("\u2028\u009b".encode()) == r"\u2028\x9b"


# --- A terminal ---


@pytest.fixture
def large_tree(tmp_path: Path) -> Path:
    return make_many_files(tmp_path / "tree", num_small=3000, num_large=10)


class Terminal:
    """Runs an import on a terminal."""

    def __init__(self, command: "list[str | Path]", columns: int) -> None:
        self.fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=theirs, start_new_session=True
        )
        os.close(theirs)

    def read_to_end(self) -> str:
        text = b""
        try:
            while piece := os.read(self.fd, 4096):
                text += piece
        except OSError:  # all processes of the import have closed it
            os.close(self.fd)
        return text.decode()


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "width"), [(40, 40), (0, 80)])
def test_progress_is_one_line_of_the_terminal(
    tmp_path: Path, large_tree: Path, columns: int, width: int
) -> None:
    wide = large_tree / ("漢" * 60)
    large_tree.rename(tmp_path / "moved")
    wide.parent.mkdir()
    (tmp_path / "moved").rename(wide)
    terminal = Terminal(import_command(tmp_path / "store", large_tree), columns)
    text = terminal.read_to_end()
    terminal.process.communicate(timeout=DEADLINE_S)
    assert terminal.process.returncode == 0
    lines = [line for line in text.split("\r\x1b[K") if line]
    assert lines
    assert all(len(line.encode()) < width and "\n" not in line for line in lines)
    assert text.endswith("\r\x1b[K")


@pytest.mark.slow
def test_an_import_outlives_its_terminal(tmp_path: Path, large_tree: Path) -> None:
    terminal = Terminal(import_command(tmp_path / "store", large_tree), 80)
    os.read(terminal.fd, 1)
    os.close(terminal.fd)
    out, _ = terminal.process.communicate(timeout=DEADLINE_S)
    assert (terminal.process.returncode, out.count(b"\n")) == (0, 1)


@pytest.mark.slow
def test_progress_goes_on_within_a_large_file(tmp_path: Path) -> None:
    make_sparse(tmp_path / "large", 1 << 29)
    terminal = Terminal(import_command(tmp_path / "store", tmp_path / "large"), 80)
    text = terminal.read_to_end()
    terminal.process.communicate(timeout=DEADLINE_S)
    amounts = [float(amount) for amount in re.findall(r"0 files, ([0-9.]+) MB", text)]
    assert len(set(amounts)) > 1
    assert amounts == sorted(amounts)


# --- Ctrl-C ---


@pytest.fixture
def running(tmp_path: Path, large_tree: Path) -> Iterator["subprocess.Popen[bytes]"]:
    terminal = Terminal(import_command(tmp_path / "store", large_tree), 80)
    os.read(terminal.fd, 1)
    yield terminal.process
    os.close(terminal.fd)


@pytest.mark.slow
def test_ctrl_c_ends_an_import_by_the_signal_and_leaves_nothing(
    tmp_path: Path, running: "subprocess.Popen[bytes]"
) -> None:
    # It ends by the signal, so that a shell ends its loop, too.
    os.killpg(running.pid, signal.SIGINT)
    out, _ = running.communicate(timeout=DEADLINE_S)
    assert (running.returncode, out) == (-signal.SIGINT, b"")
    assert list((tmp_path / "store" / "tmp").iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_ends_an_import_into_a_service_that_hangs(tmp_path: Path, large_tree: Path) -> None:
    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path / "daemon") as daemon:
        command = [*APPLIANCE, "import", f"--store={daemon.unix_uri}", str(large_tree)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        for _ in every_event(DEADLINE_S):
            if list(tmp_path.glob("store/blobs/*/*")):  # the first of several
                break
        os.kill(daemon.process.pid, signal.SIGSTOP)
        try:
            os.killpg(process.pid, signal.SIGINT)
            out, _ = process.communicate(timeout=5)
        finally:
            os.kill(daemon.process.pid, signal.SIGCONT)
            process.kill()
    assert (process.returncode, out) == (-signal.SIGINT, b"")
