"""Workers of a mount are locked down, with and without privileges, and go on serving."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.appliance_process import import_tree, uri_of
from tests.fakes.forbidden_acts import DEADLY, acting, check_call, reading
from tests.fakes.mounted import Mounted
from tests.fakes.probed import PROBE, Probes
from tests.fakes.running_command import APPLIANCE

pytestmark = pytest.mark.slow

LARGE = os.urandom(1 << 20)
PROBED = (sys.executable, "-m", "tests.fakes.probed")
# A mount needs root, or a program of libfuse with set-user-ID.
WITHOUT_RIGHTS = ("setpriv", "--bounding-set=-kill,-setuid", "--inh-caps=-kill,-setuid")


# What only a worker of a mount could try.
OF_MOUNTS = {
    "unmount": "call('umount2', b'/', 2)",
    "register a file": "fcntl.ioctl(open_files['/dev/fuse'], 0x4010E501, bytes(16))",
}
NUM_ACTS = len(acting(Path(), 0, 0, Path()) | DEADLY | OF_MOUNTS)


@pytest.fixture(scope="module")
def name(store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    tree = tmp_path_factory.mktemp("tree") / "tree"
    tree.mkdir()
    (tree / "large").write_bytes(LARGE)
    (tree / "small").write_bytes(b"small")
    (base_name,) = import_tree(store, tree)
    kept = ["kept", f"/nix/store/{base_name}"]
    subprocess.run([*APPLIANCE, "root", "add", "--store", uri_of(store), *kept], check=True)
    return base_name


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that workers of another user can search."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def successor_of(pid: int, probes: Probes, attempts: dict[str, str]) -> dict[str, str]:
    """Kill a worker; return what came of `attempts`, expressions by name, in its successor."""
    probes.put("\n".join(f"attempt({it!r}, lambda: {code})" for it, code in attempts.items()))
    os.kill(pid, signal.SIGKILL)
    return probes.outcomes()


def leases(store: Path) -> list[str]:
    """Return the leases in the store; a mount holds one."""
    names = [path.name for path in (store / "leases").iterdir()]
    assert names
    return names


def check_files(mounted: Mounted, name: str) -> None:
    assert (mounted.path / name / "large").read_bytes() == LARGE
    assert (mounted.path / name / "small").read_bytes() == b"small"


@pytest.mark.parametrize("prefix", [(), WITHOUT_RIGHTS], ids=["root", "few capabilities"])
def test_a_worker_of_a_mount_opens_only_blobs(
    store: Path, name: str, mountpoint: Path, directory: Path, prefix: tuple[str, ...]
) -> None:
    options = ("--threads=3", "--log-level=debug")
    prefix = ("env", f"{PROBE}={directory / 'probe'}", *prefix)
    with Mounted(store, mountpoint, *options, prefix=prefix, program=PROBED) as mounted:
        probes = Probes(directory, mounted.log)
        check_files(mounted, name)
        first, second, sibling = mounted.worker_pids()
        attempts = reading(store, sibling, leases(store))
        found = successor_of(first, probes, attempts)
        assert found == dict.fromkeys(attempts, "EACCES")
        check_files(mounted, name)
        blob = next(path for path in (store / "blobs").rglob("*") if path.is_file())
        below = str(blob.relative_to(store / "blobs"))
        code = f"os.open({below!r}, os.O_RDONLY, dir_fd=open_files['blobs'])"
        assert successor_of(second, probes, {"a blob": code}) == {"a blob": "done"}
        (line,) = (line for line in mounted.log().splitlines() if "locked down" in line)
        assert ("not possible here" in line) == (len(prefix) > 2)


def test_a_worker_of_a_mount_cannot_write_to_the_database_that_it_has_open(
    store: Path, name: str, mountpoint: Path, directory: Path
) -> None:
    options = ("--threads=1", "--log-level=debug")
    prefix = ("env", f"{PROBE}={directory / 'probe'}")
    data = f"open_files[{str(store / 'data.mdb')!r}]"
    attempts = {
        "map it for writing": f"mmap.mmap({data}, 4096)",
        "write to it": f"os.write({data}, b'x')",
    }
    with Mounted(store, mountpoint, *options, prefix=prefix, program=PROBED) as mounted:
        check_files(mounted, name)
        (pid,) = mounted.worker_pids()
        found = successor_of(pid, Probes(directory, mounted.log), attempts)
        assert found == {"map it for writing": "EACCES", "write to it": "EBADF"}
        check_files(mounted, name)


def test_what_a_worker_of_a_mount_need_not_do_is_deadly_to_itself_alone(
    store: Path, name: str, mountpoint: Path, directory: Path
) -> None:
    # A worker for each attempt, because one that dies again and again at its start waits.
    options = (f"--threads={NUM_ACTS + 1}", "--log-level=debug", "--passthrough")
    prefix = ("env", f"{PROBE}={directory / 'probe'}")
    with Mounted(store, mountpoint, *options, prefix=prefix, program=PROBED) as mounted:
        probes = Probes(directory, mounted.log)
        check_files(mounted, name)
        sibling, *pids = mounted.worker_pids()
        acts = acting(store, sibling, mounted.process.pid, store / "no.sock") | DEADLY | OF_MOUNTS
        for pid, (act, code) in zip(pids, acts.items(), strict=True):
            start = len(mounted.log())
            assert successor_of(pid, probes, {act: code}) == {act: "deadly"}
            check_call(mounted.log()[start:], "worker", act)
            check_files(mounted, name)
        assert sibling in mounted.worker_pids()
        assert "Traceback" not in mounted.log()


def test_without_a_sandbox_workers_stay_as_they_are(
    store: Path, name: str, mountpoint: Path
) -> None:
    with Mounted(store, mountpoint, "--threads=1", "--sandbox=none") as mounted:
        check_files(mounted, name)
        (pid,) = mounted.worker_pids()
        status = Path(f"/proc/{pid}/status").read_text()
        assert "Seccomp:\t0" in status
        assert "locked down" not in mounted.log()
