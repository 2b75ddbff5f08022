"""Files that the kernel reads without us."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.store.schema import INLINE_MAX
from tests.fakes.appliance_process import import_tree
from tests.fakes.mounted import Mounted
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event

pytestmark = pytest.mark.slow

LARGE = os.urandom(1 << 20)
SMALL = b"small"
OPENS = 2000
READER = """
import sys
for _ in range(int(sys.argv[2])):
    with open(sys.argv[1], "rb") as file:
        assert len(file.read()) == int(sys.argv[3])
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "store"


@pytest.fixture(scope="module")
def name(store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    tree = tmp_path_factory.mktemp("tree") / "tree"
    tree.mkdir()
    (tree / "large").write_bytes(LARGE)
    (tree / "run").write_bytes(LARGE)
    (tree / "run").chmod(0o755)
    (tree / "small").write_bytes(SMALL)
    (tree / "edge").write_bytes(LARGE[:INLINE_MAX])
    (base_name,) = import_tree(store, tree)
    return base_name


@pytest.fixture
def tree(store: Path, name: str, mountpoint: Path) -> Iterator[tuple[Mounted, Path]]:
    with Mounted(store, mountpoint, "--passthrough", "--threads=4") as mounted:
        yield mounted, mountpoint / name


def num_open_files() -> int:
    return int(Path("/proc/sys/fs/file-nr").read_text().split()[0])


def test_large_files_are_read_without_us_and_small_ones_by_us(
    tree: tuple[Mounted, Path],
) -> None:
    mounted, path = tree
    assert (path / "large").read_bytes() == LARGE
    assert (path / "run").read_bytes() == LARGE
    assert "READ" not in mounted.status()["requests"]
    assert (path / "small").read_bytes() == SMALL
    assert (path / "edge").read_bytes() == LARGE[:INLINE_MAX]
    assert mounted.status()["requests"]["READ"] >= 2


def test_every_open_is_released_and_its_backing_file_closed(tree: tuple[Mounted, Path]) -> None:
    mounted, path = tree
    before = num_open_files()
    for _ in range(OPENS):
        os.close(os.open(path / "large", os.O_RDONLY))
    requests = mounted.status()["requests"]
    for _ in every_event(DEADLINE_S):
        requests = mounted.status()["requests"]
        if requests["OPEN"] == requests["RELEASE"]:
            break
    assert requests["OPEN"] == requests["RELEASE"] == OPENS
    assert num_open_files() < before + OPENS // 2


def test_one_file_is_opened_through_all_workers_at_once(tree: tuple[Mounted, Path]) -> None:
    _mounted, path = tree
    held = os.open(path / "large", os.O_RDONLY)
    command = [sys.executable, "-c", READER, path / "large", "200", str(len(LARGE))]
    readers = [subprocess.Popen([*map(str, command)]) for _ in range(8)]
    assert [reader.wait(DEADLINE_S) for reader in readers] == [0] * 8
    assert os.pread(held, 100, 1000) == LARGE[1000:1100]
    os.close(held)


def test_an_open_file_outlives_the_worker_that_opened_it(tree: tuple[Mounted, Path]) -> None:
    mounted, path = tree
    fds = [os.open(path / "large", os.O_RDONLY) for _ in range(8)]
    for pid in mounted.worker_pids():
        os.kill(pid, signal.SIGKILL)
    assert all(os.pread(fd, 100, 0) == LARGE[:100] for fd in fds)
    again = os.open(path / "large", os.O_RDONLY)
    assert os.pread(again, 100, 0) == LARGE[:100]
    for fd in [*fds, again]:
        os.close(fd)
    assert (path / "large").read_bytes() == LARGE


def test_a_blob_file_of_another_size_is_not_passed_through(
    store: Path, name: str, mountpoint: Path
) -> None:
    blobs = store / "blobs"
    (blob,) = (path for path in blobs.rglob("*") if path.is_file())
    original = blob.read_bytes()
    with Mounted(store, mountpoint, "--passthrough") as mounted:
        try:
            with blob.open("ab") as file:
                file.write(b"behind the end")
            assert (mountpoint / name / "large").read_bytes() == LARGE
            assert mounted.status()["requests"]["READ"] >= 1
        finally:
            os.truncate(blob, len(original))


def test_runs_of_zeros_are_holes(mountpoint: Path, tmp_path: Path) -> None:
    content = LARGE + bytes(len(LARGE)) + b"end"
    (tmp_path / "file").write_bytes(content)
    (name,) = import_tree(tmp_path / "store", tmp_path / "file")
    with Mounted(tmp_path / "store", mountpoint, "--passthrough"):
        with (mountpoint / name).open("rb") as file:
            hole = os.lseek(file.fileno(), 0, os.SEEK_HOLE)
            end = os.lseek(file.fileno(), hole, os.SEEK_DATA)
        assert (hole, end) == (len(LARGE), 2 * len(LARGE))
        assert (mountpoint / name).read_bytes() == content


def test_only_root_may_use_it(mountpoint: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *("setpriv", "--reuid=65534", "--clear-groups"),
            *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
            *(*APPLIANCE, "mount", "--passthrough", "--store", f"lmdb://{tmp_path}/none"),
            str(mountpoint),
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "appliance: --passthrough: only root may use this option\n",
    )
