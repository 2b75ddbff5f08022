"""Whoever reads a local store from a mount does not notice what happens to the state directory."""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

from appliance.store.store import Store
from tests.fakes.appliance_process import import_tree
from tests.fakes.mounted import Mounted
from tests.fakes.running_command import DEADLINE_S, every_event
from tests.fs.guest import File, Model, Tree, put

pytestmark = pytest.mark.slow

DIRECTORIES = 20
SMALL_BYTES = 2 << 20
LARGE = os.urandom(1 << 20)


def tree(title: str) -> Tree:
    made: dict[bytes, Model] = {b"large": File(LARGE)}
    for number in range(DIRECTORIES):
        made[b"d%02d" % number] = {
            b"file": File(b"%s %d" % (title.encode(), number)),
            b"sub": {b"equal": File(b"equal")},
        }
    return made


def fill(path: Path, titles: dict[str, str]) -> list[str]:
    """Put trees into a new store, by name and title; return their base names."""
    store = Store.open(path, create=True)
    names = [os.fsdecode(put(store, name, tree(title))) for name, title in titles.items()]
    store.close()
    return names


def read_all(root: Path, title: str) -> None:
    for number in range(DIRECTORIES):
        directory = root / f"d{number:02}"
        assert {path.name for path in directory.iterdir()} == {"file", "sub"}
        assert (directory / "file").read_text() == f"{title} {number}"
        assert (directory / "sub" / "equal").read_bytes() == b"equal"
    assert (root / "large").read_bytes() == LARGE


class Reader:
    """Reads a tree again and again, beside whatever else is done."""

    def __init__(self, root: Path, title: str) -> None:
        self._root = root
        self._title = title
        self._passes = 0
        self._changed = threading.Condition()
        self._is_over = threading.Event()
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_unused: object) -> None:
        self._is_over.set()
        self._thread.join(DEADLINE_S)

    def read_on(self) -> None:
        """Wait until a pass is over that began later, with nothing in memory."""
        Path("/proc/sys/vm/drop_caches").write_text("2")
        with self._changed:
            wanted = self._passes + 2
            assert self._changed.wait_for(
                lambda: self._passes >= wanted or self._problem, DEADLINE_S
            )
        if self._problem is not None:
            raise self._problem

    def _run(self) -> None:
        try:
            while not self._is_over.is_set():
                read_all(self._root, self._title)
                self._pass()
        except Exception as exc:  # noqa: BLE001 -- told to the test
            self._problem = exc
            self._pass()

    def _pass(self) -> None:
        with self._changed:
            self._passes += 1
            self._changed.notify_all()


def remove(state: Path) -> None:
    shutil.rmtree(state)


def replace(state: Path) -> None:
    state.rename(state.with_name("moved away"))
    state.mkdir()


def replace_by_a_file(state: Path) -> None:
    shutil.rmtree(state)
    state.write_text("not a directory")


@pytest.mark.parametrize("act", [remove, replace, replace_by_a_file])
def test_a_state_directory_that_goes_is_not_missed(
    tmp_path: Path, mountpoint: Path, act: Callable[[Path], None]
) -> None:
    check(tmp_path, mountpoint, tmp_path / "state", act)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with little room."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "small", path], check=True)
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fill_up(state: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (state / "filler").write_bytes(bytes(SMALL_BYTES + 1))


def make_read_only(state: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", state], check=True)


@pytest.mark.parametrize("act", [fill_up, make_read_only])
def test_a_state_directory_that_cannot_be_written_is_not_missed(
    tmp_path: Path, mountpoint: Path, small: Path, act: Callable[[Path], None]
) -> None:
    check(tmp_path, mountpoint, small, act)


def check(tmp_path: Path, mountpoint: Path, state: Path, act: Callable[[Path], None]) -> None:
    """Do `act` while somebody reads; look at what was not looked at before, and come to an end."""
    first, second = fill(tmp_path / "store", {"one": "first", "other": "second"})
    with Mounted(tmp_path / "store", mountpoint, "--threads=1", f"--state-dir={state}") as mounted:
        (worker,) = workers_of(mounted.process.pid)
        with Reader(mountpoint / first, "first") as reader:
            reader.read_on()
            act(state)
            reader.read_on()
            # What nobody has asked for yet, and what was not there.
            read_all(mountpoint / second, "second")
            (tmp_path / "later").write_text("later")
            (later,) = import_tree(tmp_path / "store", tmp_path / "later")
            assert (mountpoint / later).read_text() == "later"
            # The worker's successor begins with nothing but the session's memory.
            os.kill(worker, signal.SIGKILL)
            reader.read_on()
            assert workers_of(mounted.process.pid) != [worker]
        assert mounted.stop() == 0
    assert "Traceback" not in mounted.log()


def workers_of(supervisor: int) -> list[int]:
    """Return the processes that have no children of their own; `status` needs its socket."""
    for _ in every_event(DEADLINE_S):
        pending, leaves = [supervisor], []
        while pending:
            pid = pending.pop()
            with contextlib.suppress(FileNotFoundError):
                words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                pending += map(int, words)
                if not words:
                    leaves.append(pid)
        if leaves and leaves != [supervisor]:
            return leaves
    raise AssertionError("there is no worker")


def test_two_stores_may_share_a_state_directory(tmp_path: Path) -> None:
    # One name in both, with other contents.
    titles = ["first", "second"]
    with contextlib.ExitStack() as stack:
        readers = []
        for title in titles:
            (name,) = fill(tmp_path / title, {"same": title})
            mountpoint = tmp_path / f"{title}-mnt"
            mountpoint.mkdir()
            state = f"--state-dir={tmp_path / 'state'}"
            stack.enter_context(Mounted(tmp_path / title, mountpoint, state))
            readers.append(stack.enter_context(Reader(mountpoint / name, title)))
        for _again in range(2):
            for reader in readers:
                reader.read_on()
