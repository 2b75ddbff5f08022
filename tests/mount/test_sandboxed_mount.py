"""Workers of a mount are locked down, with and without privileges, and go on serving."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.appliance_process import import_tree
from tests.fakes.mounted import Mounted
from tests.fakes.probed import PROBE, Probes

pytestmark = pytest.mark.slow

LARGE = os.urandom(1 << 20)
PROBED = (sys.executable, "-m", "tests.fakes.probed")
# A mount needs root, or a program of libfuse with set-user-ID.
WITHOUT_RIGHTS = ("setpriv", "--bounding-set=-kill,-setuid", "--inh-caps=-kill,-setuid")


@pytest.fixture(scope="module")
def name(store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    tree = tmp_path_factory.mktemp("tree") / "tree"
    tree.mkdir()
    (tree / "large").write_bytes(LARGE)
    (tree / "small").write_bytes(b"small")
    (base_name,) = import_tree(store, tree)
    return base_name


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that workers of another user can search."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def successor_of(mounted: Mounted, probes: Probes, code: str) -> dict[str, str]:
    """Kill the only worker; return what came of `code` in the next one."""
    probes.put(code)
    (pid,) = mounted.worker_pids()
    os.kill(pid, signal.SIGKILL)
    return probes.outcomes()


def check_files(mounted: Mounted, name: str) -> None:
    assert (mounted.path / name / "large").read_bytes() == LARGE
    assert (mounted.path / name / "small").read_bytes() == b"small"


@pytest.mark.parametrize("prefix", [(), WITHOUT_RIGHTS], ids=["root", "few capabilities"])
def test_a_worker_of_a_mount_opens_only_blobs(
    store: Path, name: str, mountpoint: Path, directory: Path, prefix: tuple[str, ...]
) -> None:
    options = ("--threads=1", "--log-level=debug")
    prefix = ("env", f"{PROBE}={directory / 'probe'}", *prefix)
    with Mounted(store, mountpoint, *options, prefix=prefix, program=PROBED) as mounted:
        probes = Probes(directory, mounted.log)
        check_files(mounted, name)
        places = ("/etc/passwd", store / "data.mdb", store / "lock.mdb", f"/proc/{os.getpid()}/mem")
        found = successor_of(
            mounted,
            probes,
            "\n".join(
                f"attempt({str(place)!r}, lambda: os.open({str(place)!r}, os.O_RDONLY))"
                for place in places
            ),
        )
        assert found == {str(place): "EACCES" for place in places}
        check_files(mounted, name)
        (line,) = (line for line in mounted.log().splitlines() if "locked down" in line)
        assert ("not possible here" in line) == (len(prefix) > 2)


@pytest.mark.parametrize(
    ("act", "code"),
    [
        ("unmount", "call('umount2', b'/', 2)"),
        ("register a file", "fcntl.ioctl(open_files['/dev/fuse'], 0x4010E501, bytes(16))"),
        ("execute", "os.execv('/bin/true', ['true'])"),
    ],
)
def test_what_a_worker_of_a_mount_need_not_do_is_deadly_to_itself_alone(
    store: Path, name: str, mountpoint: Path, directory: Path, act: str, code: str
) -> None:
    options = ("--threads=1", "--log-level=debug", "--passthrough")
    prefix = ("env", f"{PROBE}={directory / 'probe'}")
    with Mounted(store, mountpoint, *options, prefix=prefix, program=PROBED) as mounted:
        probes = Probes(directory, mounted.log)
        check_files(mounted, name)
        found = successor_of(mounted, probes, f"attempt({act!r}, lambda: {code})")
        assert found == {act: "deadly"}
        check_files(mounted, name)


def test_without_a_sandbox_workers_stay_as_they_are(
    store: Path, name: str, mountpoint: Path
) -> None:
    with Mounted(store, mountpoint, "--threads=1", "--sandbox=none") as mounted:
        check_files(mounted, name)
        (pid,) = mounted.worker_pids()
        status = Path(f"/proc/{pid}/status").read_text()
        assert "Seccomp:\t0" in status
        assert "locked down" not in mounted.log()
