"""One store, used from two PID namespaces whose processes have equal ids."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.db.data_file import check_pid
from appliance.errors import PidInUseError
from tests.db.test_environment import opened
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import APPLIANCE, DEADLINE_S

pytestmark = pytest.mark.slow

# Runs a program in a new PID namespace, where its id is 1 and its children follow.
NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
HOLD = """
import os, sys
from pathlib import Path
from appliance.store.store import Store
path = Path(sys.argv[1])
for _ in range(int(sys.argv[2])):
    pid = os.fork()
    if pid == 0:
        break
store = Store.open(path, is_readonly=True)
os.write(1, b"%d\\n" % os.getpid())
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("pids")
    (directory / "tree").mkdir()
    (directory / "tree/file").write_bytes(b"content")
    (name,) = import_tree(directory / "store", directory / "tree")
    return directory / "store", name


@contextlib.contextmanager
def holding(store: Path, num_children: int = 0) -> Iterator[None]:
    """Hold the store open in processes 1, 2, ... of another namespace."""
    with subprocess.Popen(
        [*NAMESPACE, sys.executable, "-c", HOLD, store, str(num_children)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        pids = {int(process.stdout.readline()) for _ in range(num_children + 1)}
        assert pids == set(range(1, num_children + 2))
        try:
            yield
        finally:
            process.kill()


def inside(*arguments: str, status: int = 0) -> "subprocess.CompletedProcess[bytes]":
    done = subprocess.run(
        [*NAMESPACE, *APPLIANCE, *arguments], capture_output=True, check=False, timeout=DEADLINE_S
    )
    assert done.returncode == status, done.stderr
    return done


def test_environment_names_what_is_in_the_way(tmp_path: Path) -> None:
    with opened(tmp_path / "env"):
        pass
    lock = tmp_path / "env/lock.mdb"
    holder = (
        "import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "fcntl.lockf(fd, fcntl.LOCK_EX, 1, int(sys.argv[2])); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, lock, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(PidInUseError, match=f"{lock}: process id {os.getpid()} is in use"):
            check_pid(tmp_path / "env")
        for is_readonly in (True, False):
            with pytest.raises(PidInUseError), opened(tmp_path / "env", is_readonly=is_readonly):
                pass
        process.kill()
    with opened(tmp_path / "env"):
        pass


@pytest.mark.parametrize("num_children", [0, 20])
def test_commands_work_beside_processes_of_the_same_ids(
    made: tuple[Path, str], num_children: int
) -> None:
    store, name = made
    options = ["--store", f"lmdb://{store}"]
    with holding(store, num_children):
        assert inside("cat", *options, f"/nix/store/{name}/file").stdout == b"content"
        assert inside("verify", *options).stdout == b"paths: 1, bytes: 7, failures: 0\n"
        tree = str(store.parent / "tree")
        assert inside("import", *options, tree).stdout.decode() == f"/nix/store/{name}\n"
        missing = f"/nix/store/{name}/nothing"
        done = inside("cat", *options, missing, status=1)
        assert done.stderr.decode() == f"appliance: path {missing} does not exist\n"


def test_daemons_serve_one_store_from_two_namespaces(
    made: tuple[Path, str], tmp_path: Path
) -> None:
    store, name = made
    with contextlib.ExitStack() as stack:
        for number in range(2):
            daemon = stack.enter_context(
                DaemonProcess(f"lmdb://{store}", tmp_path / f"{number}", prefix=NAMESPACE)
            )
            done = subprocess.run(
                [*APPLIANCE, "cat", "--store", daemon.unix_uri, f"/nix/store/{name}/file"],
                capture_output=True,
                check=True,
                timeout=DEADLINE_S,
            )
            assert done.stdout == b"content"
            stack.callback(end_first_of, daemon.process)


def test_signals_reach_the_command_and_its_status_comes_back(made: tuple[Path, str]) -> None:
    store, _name = made
    socket = store.parent / "signalled.sock"
    with holding(store):
        process = subprocess.Popen(
            [*NAMESPACE, *APPLIANCE, "daemon", "--store", f"lmdb://{store}", "-l", str(socket)],
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        assert b"READY" in process.stderr.readline()
        end_first_of(process)
        assert process.wait(DEADLINE_S) == 0
        assert not socket.exists()
        process.stderr.close()


def end_first_of(unshare: "subprocess.Popen[bytes]") -> None:
    """End the first process of a namespace, as unshare(1) itself passes no signals on."""
    (child,) = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)


def test_guests_are_served_by_workers_beside_those_of_the_same_ids(
    made: tuple[Path, str], tmp_path: Path
) -> None:
    store, name = made
    with (
        holding(store, 40),
        ApplianceProcess(
            store, tmp_path, f"--state-dir={tmp_path}/state", prefix=NAMESPACE
        ) as appliance,
    ):
        with FakeGuest(appliance.connect()) as guest:
            guest.mount()
            assert guest.lookup(1, name.encode())
        end_first_of(appliance.process)
        appliance.process.wait(DEADLINE_S)
        assert "Traceback" not in appliance.log()
        assert "ended with status" not in appliance.log()
