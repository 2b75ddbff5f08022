"""What code that has taken over a worker or a session process can do; others are served on."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree, uri_of
from tests.fakes.forbidden_acts import DEADLY, acting, check_call, opening, reading
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

    def reading(self) -> dict[str, str]:
        """Attempts to read; see `forbidden_acts.reading`."""
        return reading(self.store, self.sibling, self._leases)

    def acting(self) -> dict[str, str]:
        """Attempts at what no worker has to do; see `forbidden_acts.acting`."""
        supervisor, sock = self.appliance.process.pid, self.appliance.sockets[0]
        return acting(self.store, self.sibling, supervisor, sock)


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


def test_what_a_worker_that_was_taken_over_can_still_do(
    store: tuple[Path, bytes], tmp_path: Path
) -> None:
    (tmp_path / "other").write_bytes(os.urandom(1 << 20))
    import_tree(store[0], tmp_path / "other")  # which no session was granted
    data, lock = (str(store[0] / name) for name in ("data.mdb", "lock.mdb"))
    victim = Victim(store, tmp_path)
    try:
        blobs = [path for path in (store[0] / "blobs").rglob("*") if path.is_file()]
        attempts = {
            f"blob {number}": f"os.open({str(blob.relative_to(store[0] / 'blobs'))!r}, "
            "os.O_RDONLY, dir_fd=open_files['blobs'])"
            for number, blob in enumerate(blobs)
        }
        attempts |= {
            "map the database": f"mmap.mmap(open_files[{data!r}], 4096, prot=mmap.PROT_READ)",
            "map the lock file": f"mmap.mmap(open_files[{lock!r}], 4096)",
            "stat a file": "os.stat('/etc/passwd')",
            "write to the log": "os.write(2, b'whatever it likes\\n')",
        }
        assert len(blobs) > 1
        assert victim.outcomes(attempts) == dict.fromkeys(attempts, "done")
        assert "whatever it likes" in victim.appliance.log()
    finally:
        victim.close()


def test_what_a_worker_need_not_do_is_deadly_to_itself_alone(victim: Victim) -> None:
    for name, action in (victim.acting() | DEADLY).items():
        start = len(victim.appliance.log())
        assert victim.outcomes({name: action}) == {name: "deadly"}
        check_call(victim.appliance.log()[start:], "worker", name)
    assert "Traceback" not in victim.appliance.log()


def test_a_session_process_opens_nothing(victim: Victim, store: tuple[Path, bytes]) -> None:
    blob = next(path for path in (store[0] / "blobs").rglob("*") if path.is_file())
    attempts = victim.reading() | {"a blob": opening(blob)}
    del attempts["the database by its descriptor"]  # it has none
    assert victim.session_outcomes(attempts) == dict.fromkeys(attempts, "EACCES")
    code = "[name for name in open_files if 'data.mdb' in name] and 1 / 0"
    assert victim.session_outcomes({"the database is not open": code}) == {
        "the database is not open": "done"
    }


def test_what_a_session_process_need_not_do_is_deadly_to_itself_alone(victim: Victim) -> None:
    for name, action in (victim.acting() | DEADLY).items():
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
        attempts = {"a secret of the host": opening("/etc/shadow")}
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
