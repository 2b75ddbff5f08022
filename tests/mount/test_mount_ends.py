"""How mounts end: by signals, from outside, and one mounted over another."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.supervisor.mountpoint import FS_TYPE, mounts_on
from tests.fakes.appliance_process import import_tree
from tests.fakes.mounted import Mounted, is_mounted
from tests.fakes.running_command import DEADLINE_S, every_event

pytestmark = pytest.mark.slow

CONTENT = b"content"


@pytest.fixture(scope="module")
def name(store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("tree") / "file"
    file.write_bytes(CONTENT)
    (base_name,) = import_tree(store, file)
    return base_name


@pytest.fixture(autouse=True)
def _nothing_stays_mounted(mountpoint: Path) -> Iterator[None]:
    yield
    left = num_mounts(mountpoint)
    for _ in range(left):
        subprocess.run(["umount", "-l", mountpoint], check=True)
    assert left == 0


def num_mounts(path: Path) -> int:
    text = Path("/proc/self/mountinfo").read_text()
    return len([entry for entry in mounts_on(str(path), text) if entry.kind == FS_TYPE])


@pytest.mark.parametrize("attempt", range(3))
def test_a_start_right_after_the_server_was_killed_replaces_its_mount(
    store: Path, name: str, mountpoint: Path, attempt: int
) -> None:
    killed = Mounted(store, mountpoint)
    for _ in range(attempt):
        mountpoint.stat()  # the kernel now has attributes cached for a long time
    killed.process.kill()
    with Mounted(store, mountpoint) as mounted:
        assert "replacing a mount whose server is gone" in mounted.log()
        assert num_mounts(mountpoint) == 1
        assert (mountpoint / name).read_bytes() == CONTENT
    killed.process.wait(DEADLINE_S)
    assert num_mounts(mountpoint) == 0


def test_a_mount_over_another_is_left_alone_when_that_one_ends(
    store: Path, name: str, mountpoint: Path
) -> None:
    first = Mounted(store, mountpoint)
    with Mounted(store, mountpoint, "--threads=1") as second:
        assert first.stop_only() == 0
        assert "something else is mounted over this mount" in first.log()
        assert (mountpoint / name).read_bytes() == CONTENT
        assert second.process.poll() is None
        second.process.send_signal(signal.SIGTERM)
        assert second.process.wait(DEADLINE_S) == 0
    assert num_mounts(mountpoint) == 0


def test_the_mount_below_another_serves_on_when_that_one_ends(
    store: Path, name: str, mountpoint: Path
) -> None:
    with Mounted(store, mountpoint) as first:
        second = Mounted(store, mountpoint)
        assert second.stop_only() == 0
        assert num_mounts(mountpoint) == 1
        assert (mountpoint / name).read_bytes() == CONTENT
        assert first.stop_only() == 0


def test_the_end_of_its_terminal_unmounts(store: Path, name: str, mountpoint: Path) -> None:
    mounted = Mounted(store, mountpoint)
    assert (mountpoint / name).read_bytes() == CONTENT
    os.killpg(mounted.process.pid, signal.SIGHUP)  # to the whole group, as the kernel does
    assert mounted.process.wait(DEADLINE_S) == 0
    assert not is_mounted(mountpoint)
    assert "Traceback" not in mounted.log()
    assert "starting another" not in mounted.log()


def test_a_mount_that_ignores_sighup_survives_the_end_of_its_terminal(
    store: Path, name: str, mountpoint: Path
) -> None:
    with Mounted(store, mountpoint, prefix=("nohup",)) as mounted:
        os.killpg(mounted.process.pid, signal.SIGHUP)
        assert (mountpoint / name).read_bytes() == CONTENT
        assert mounted.process.poll() is None


def test_an_unmount_from_outside_is_logged(store: Path, mountpoint: Path) -> None:
    mounted = Mounted(store, mountpoint)
    subprocess.run(["umount", mountpoint], check=True)
    assert mounted.process.wait(DEADLINE_S) == 0
    assert f"{mountpoint}: unmounted from outside\n" in mounted.log()


@pytest.fixture
def connections() -> Iterator[Path]:
    path = Path("/sys/fs/fuse/connections")
    was_there = path.is_mount()
    if not was_there:
        subprocess.run(["mount", "-t", "fusectl", "fusectl", path], check=True)
    yield path
    if not was_there:
        subprocess.run(["umount", path], check=True)


def test_an_aborted_connection_is_a_failure_that_is_told(
    store: Path, mountpoint: Path, connections: Path
) -> None:
    mounted = Mounted(store, mountpoint)
    number = os.minor(mountpoint.stat().st_dev)
    (connections / str(number) / "abort").write_text("1")
    assert mounted.process.wait(DEADLINE_S) == 1
    last = mounted.log().splitlines()[-1]
    assert last == f"appliance: mount point {mountpoint}: the connection to the kernel was aborted"
    assert not is_mounted(mountpoint)


def test_paths_with_any_character_are_found_again(store: Path, tmp_path: Path) -> None:
    # Python splits lines at some of these characters, and the kernel escapes others.
    path = tmp_path / "a b\\c\td\x85\u2028\ne"
    path.mkdir()
    mounted = Mounted(store, path)
    assert mounted.stop_only() == 0
    for _ in every_event(DEADLINE_S):
        if not path.is_mount():
            break
    assert not path.is_mount()
