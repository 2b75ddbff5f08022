"""What code that has taken over a worker or a session process can do; others are served on."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree, uri_of
from tests.fakes.hostile_guest import LARGE, ROOT, make_tree
from tests.fakes.probed import NO_FILTER, PROBE, Probes
from tests.fakes.running_command import APPLIANCE

pytestmark = pytest.mark.slow

NOBODY = 65534
# With a capability, because the interpreter may be in a directory that only root can search.
AS_NOBODY = (
    "setpriv",
    f"--reuid={NOBODY}",
    f"--regid={NOBODY}",
    "--clear-groups",
    "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",
)
# As systemd/appliance-virtiofs@.service starts it.
AS_POWERLESS_ROOT = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
READ_ONLY, READ_WRITE = "os.O_RDONLY", "os.O_RDWR"


class Victim:
    """A supervisor with a guest whose workers are left alone, and probes for those of another."""

    def __init__(
        self,
        store: tuple[Path, bytes],
        directory: Path,
        *options: str,
        variables: tuple[str, ...] = (),
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.store, self.name = store
        program = ("env", f"{PROBE}={directory / 'probe'}", *variables, *prefix)
        self.appliance = ApplianceProcess(
            self.store,
            directory,
            "--num-request-queues=1",
            "--log-level=debug",
            *options,
            sockets=("quiet.sock", "probed.sock"),
            prefix=program,
            program=(sys.executable, "-m", "tests.fakes.probed"),
        )
        self.probes = Probes(directory, self.appliance.log)
        self.session_probes = Probes(directory, self.appliance.log, "probe.session")
        self.quiet = FakeGuest(self.appliance.connect(0))
        self.quiet.mount()
        quiet = str(self.appliance.sockets[0])  # other supervisors may use this state directory
        (session,) = (each for each in self.appliance.status() if each["socket"] == quiet)
        self.sibling = session["workers"][0]["pid"]
        self._leases = [session["holds"]["lease"]] if session["holds"] else []

    def close(self) -> None:
        self.quiet.close()
        self.appliance.stop()

    def outcomes(self, actions: dict[str, str]) -> dict[str, str]:
        """Try `actions`, expressions by name, one after another in one worker."""
        self.probes.put(
            "\n".join(f"attempt({name!r}, lambda: {each})" for name, each in actions.items())
        )
        with FakeGuest(self.appliance.connect(1)) as guest:
            found = self.probes.outcomes()
            guest.mount()
            large = guest.lookup(guest.lookup(ROOT, self.name), b"large")
            assert guest.ask(fuse_client.read(large, 0, 4000)).body == LARGE[:4000]
        assert self.quiet.lookup(ROOT, self.name)  # a sibling serves on, too
        return found

    def session_outcomes(self, actions: dict[str, str]) -> dict[str, str]:
        """Try `actions` in one session process."""
        self.session_probes.put(
            "\n".join(f"attempt({name!r}, lambda: {each})" for name, each in actions.items())
        )
        with contextlib.closing(self.appliance.connect(1)):
            found = self.session_probes.outcomes()
        assert self.quiet.lookup(ROOT, self.name)  # nobody else notices
        return found

    def opening(self, path: Path | str, flags: str = READ_ONLY) -> str:
        return f"os.open({str(path)!r}, {flags})"

    def reading(self) -> dict[str, str]:
        """Attempts to read that fail with an error even in a worker without a filter."""
        data = f"{self.store}/data.mdb"
        return {
            "a file of the host": self.opening("/etc/passwd"),
            "a secret of the host": self.opening("/etc/shadow"),
            "the database": self.opening(data),
            "the database by its descriptor": f"os.open('/proc/self/fd/%d' % open_files.get("
            f"{data!r}, 0), {READ_ONLY})",
            "the lock file": self.opening(f"{self.store}/lock.mdb"),
            "a list of roots": self.opening(f"{self.store}/roots/kept"),
            "the lock of the roots": self.opening(f"{self.store}/roots.lock"),
            **{
                f"lease {lease_id}": self.opening(f"{self.store}/leases/{lease_id}")
                for lease_id in self._leases
            },
            "a program": self.opening(sys.executable),
            "memory of a sibling": self.opening(f"/proc/{self.sibling}/mem"),
            "environment of a sibling": self.opening(f"/proc/{self.sibling}/environ"),
            **{
                f"{name} of a sibling's session": self.opening(f"/proc/{self.sibling}/fd/{fd}")
                for name, fd in memory_files(self.sibling).items()
            },
        }

    def acting(self) -> dict[str, str]:
        """Attempts at what no worker has to do."""
        data = f"{self.store}/data.mdb"
        by_descriptor = f"'/proc/self/fd/%d' % open_files.get({data!r}, 0)"
        connect = "socket.socket({}).connect({!r})"
        return {
            "write the database": self.opening(data, READ_WRITE),
            "write it by its descriptor": f"os.open({by_descriptor}, {READ_WRITE})",
            "write a file": self.opening("/tmp/written-by-a-worker", "os.O_WRONLY | os.O_CREAT"),
            "connect by TCP": connect.format("socket.AF_INET", ("127.0.0.1", 9)),
            "bind TCP": "socket.socket().bind(('127.0.0.1', 0))",
            "connect to the supervisor": connect.format(
                "socket.AF_UNIX", str(self.appliance.sockets[0])
            ),
            "inspect a sibling": f"call('ptrace', 0x4206, {self.sibling}, None, None)",
            "signal a sibling": f"os.kill({self.sibling}, 0)",
            "signal the supervisor": f"os.kill({self.appliance.process.pid}, 0)",
            "execute": "os.execv('/bin/true', ['true'])",
            "mount": "call('mount', b'none', b'/mnt', b'tmpfs', 0, None)",
            "become root": "os.setresuid(0, 0, 0)",
            "read memory of a sibling": READ_A_SIBLING.format(self.sibling),
        }


def memory_files(pid: int) -> dict[str, int]:
    """Return the descriptors of files in memory that a process has, by their names."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        target = os.fspath(entry.readlink())
        if target.startswith("/memfd:"):
            found[target.removeprefix("/memfd:").partition(" ")[0]] = int(entry.name)
    assert {"session", "grants"} <= found.keys()
    return found


# As /proc/PID/mem, but by a system call.
READ_A_SIBLING: Final = (
    "call('process_vm_readv', {}, (ctypes.c_size_t * 2)(id(attempt), 8), 1, "
    "(ctypes.c_size_t * 2)(id(attempt), 8), 1, 0)"
)
# The system call that an attempt is refused for.
CALLS: Final = {
    "write a file": "openat",
    "connect by TCP": "socket",
    "inspect a sibling": "ptrace",
    "signal a sibling": "kill",
    "execute": "execve",
    "mount": "mount",
    "map memory to execute": "mmap",
    "read memory of a sibling": "process_vm_readv",
    "handle what was refused": "rt_sigaction",
}
DEADLY_ONLY: Final = {
    "take a descriptor of a sibling": "call('syscall', 438, 0, 0, 0)",
    "handle what was refused": "signal.signal(signal.SIGSYS, signal.SIG_IGN)",
    "fork": "os.fork()",
    "map memory to execute": "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
    "make memory executable": "call('mprotect', ctypes.c_void_p(0x1000), 4096, 5)",
    "set up asynchronous signals": "fcntl.fcntl(0, fcntl.F_SETOWN, 1)",
    "type into the terminal": "fcntl.ioctl(2, 0x5412, b'x')",
    "make a socket": "socket.socket(socket.AF_UNIX)",
    "make a user namespace": "call('unshare', 0x10000000)",
    "limit the supervisor": "call('prlimit', 1, 7, None, None)",
    "signal itself by number": "call('syscall', 234, 1, 1, 0)",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("store") / "store"
    (name,) = import_tree(path, make_tree(tmp_path_factory.mktemp("tree")))
    kept = ["kept", f"/nix/store/{name}"]
    subprocess.run([*APPLIANCE, "root", "add", "--store", uri_of(path), *kept], check=True)
    return path, name.encode()


@pytest.fixture(scope="module")
def victim(store: tuple[Path, bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    victim = Victim(store, tmp_path_factory.mktemp("run"))
    yield victim
    victim.close()


def test_a_worker_opens_only_blobs(victim: Victim, store: tuple[Path, bytes]) -> None:
    found = victim.outcomes(victim.reading())
    assert found == dict.fromkeys(victim.reading(), "EACCES")
    blob = next(path for path in (store[0] / "blobs").rglob("*") if path.is_file())
    below = str(blob.relative_to(store[0] / "blobs"))
    code = f"os.open({below!r}, os.O_RDONLY, dir_fd=open_files['blobs'])"
    assert victim.outcomes({"a blob": code}) == {"a blob": "done"}


def test_a_worker_cannot_write_to_the_database_that_it_has_open(
    victim: Victim, store: tuple[Path, bytes]
) -> None:
    data = f"open_files[{str(store[0] / 'data.mdb')!r}]"
    attempts = {
        "map it for writing": f"mmap.mmap({data}, 4096)",
        "write to it": f"os.write({data}, b'x')",
    }
    found = victim.outcomes(attempts)
    assert found == {"map it for writing": "EACCES", "write to it": "EBADF"}


def test_what_a_worker_need_not_do_is_deadly_to_itself_alone(victim: Victim) -> None:
    for name, action in (victim.acting() | DEADLY_ONLY).items():
        start = len(victim.appliance.log())
        assert victim.outcomes({name: action}) == {name: "deadly"}
        check_call(victim.appliance.log()[start:], "worker", name)
    assert "Traceback" not in victim.appliance.log()


def check_call(log: str, kind: str, name: str) -> None:
    """Check that the log says which system call a process was killed for."""
    (line,) = (line for line in log.splitlines() if "killed by SIGSYS" in line)
    killed = rf"{kind} \d+ was killed by SIGSYS, for a use of system call \d+ \((\w+)\)"
    found = re.search(killed, line)
    assert found, line
    assert found[1] == CALLS.get(name, found[1])


def test_a_session_process_opens_nothing(victim: Victim, store: tuple[Path, bytes]) -> None:
    blob = next(path for path in (store[0] / "blobs").rglob("*") if path.is_file())
    attempts = victim.reading() | {"a blob": victim.opening(blob)}
    del attempts["the database by its descriptor"]  # it has none
    assert victim.session_outcomes(attempts) == dict.fromkeys(attempts, "EACCES")
    code = "[name for name in open_files if 'data.mdb' in name] and 1 / 0"
    assert victim.session_outcomes({"the database is not open": code}) == {
        "the database is not open": "done"
    }


def test_what_a_session_process_need_not_do_is_deadly_to_itself_alone(victim: Victim) -> None:
    for name, action in (victim.acting() | DEADLY_ONLY).items():
        if name != "write it by its descriptor":
            start = len(victim.appliance.log())
            assert victim.session_outcomes({name: action}) == {name: "deadly"}
            check_call(victim.appliance.log()[start:], "session process", name)
    assert "Traceback" not in victim.appliance.log()


def test_a_session_process_cannot_kill_others(victim: Victim) -> None:
    sibling = victim.sibling
    for name, action in {
        "kill a sibling": f"os.kill({sibling}, 9)",
        "make a pidfd": f"os.pidfd_open({sibling})",
        "another signal by a pidfd": "signal.pidfd_send_signal(0, 15)",
    }.items():
        assert victim.session_outcomes({name: action}) == {name: "deadly"}


def test_an_assertion_in_c_code_is_still_seen_as_one(victim: Victim) -> None:
    start = len(victim.appliance.log())
    victim.probes.put("os.abort()")
    with FakeGuest(victim.appliance.connect(1)) as guest:
        guest.mount()
    log = victim.appliance.log()[start:]
    assert f"was killed by signal {int(signal.SIGABRT)}" in log
    assert "SIGSYS" not in log


def test_the_log_says_once_how_workers_are_locked_down(victim: Victim) -> None:
    for kind in ("workers", "session processes"):
        lines = [line for line in victim.appliance.log().splitlines() if f"{kind} are" in line]
        assert len(lines) == 1
        assert ("another user" in lines[0]) == (os.geteuid() == 0)


@pytest.mark.parametrize(
    ("prefix", "obstacle"),
    [
        (AS_NOBODY, "own namespaces (needs CAP_SYS_ADMIN)"),
        (AS_POWERLESS_ROOT, "another user (needs CAP_SETUID, CAP_SETGID and CAP_KILL)"),
        (("unshare", "--user", "--map-root-user"), "another user (Operation not permitted)"),
    ],
    ids=["nobody", "root without capabilities", "root of a user namespace"],
)
def test_a_supervisor_with_fewer_rights_locks_workers_down_too(
    store: tuple[Path, bytes], tmp_path: Path, prefix: tuple[str, ...], obstacle: str
) -> None:
    os.chown(tmp_path, NOBODY if prefix == AS_NOBODY else 0, -1)
    victim = Victim(store, tmp_path, f"--state-dir={tmp_path}/state", prefix=prefix)
    try:
        assert victim.outcomes(victim.reading()) == dict.fromkeys(victim.reading(), "EACCES")
        for name in ("write the database", "inspect a sibling", "connect by TCP", "execute"):
            assert victim.outcomes({name: victim.acting()[name]}) == {name: "deadly"}
        (line,) = (line for line in victim.appliance.log().splitlines() if "workers are" in line)
        assert obstacle in line.partition("not possible here: ")[2]
    finally:
        victim.close()


def test_files_that_only_their_owner_can_read_are_served_all_the_same(
    store: tuple[Path, bytes], tmp_path: Path
) -> None:
    copied = tmp_path / "store"
    shutil.copytree(store[0], copied)
    (copied / "blobs").chmod(0o700)
    victim = Victim((copied, store[1]), tmp_path)
    try:
        attempts = {"a secret of the host": victim.opening("/etc/shadow")}
        assert victim.outcomes(attempts) == dict.fromkeys(attempts, "EACCES")
        assert "workers run as their owner" in victim.appliance.log()
    finally:
        victim.close()


def test_without_the_filter_the_other_layers_refuse(
    store: tuple[Path, bytes], tmp_path: Path
) -> None:
    victim = Victim(store, tmp_path, variables=(f"{NO_FILTER}=1",))
    try:
        attempts = victim.reading() | victim.acting()
        found = victim.outcomes(attempts)
    finally:
        victim.close()
    assert found.keys() == attempts.keys()
    refused = {"EACCES", "EPERM"}
    assert {name: how for name, how in found.items() if how not in refused} == {}


def test_without_a_sandbox_nothing_is_refused(store: tuple[Path, bytes], tmp_path: Path) -> None:
    victim = Victim(store, tmp_path, "--sandbox=none")
    attempts = victim.reading() | victim.acting()
    for name in ("execute", "mount", "connect by TCP", "write it by its descriptor"):
        del attempts[name]
    del attempts["read memory of a sibling"]  # nothing needs to be at that address
    try:
        found = victim.outcomes(attempts)
        assert "locked down" not in victim.appliance.log()
    finally:
        victim.close()
        Path("/tmp/written-by-a-worker").unlink(missing_ok=True)
    assert found == dict.fromkeys(attempts, "done")
