"""`appliance mount` as a program: how it starts, how it ends, and what it survives."""

import errno
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import appliance
from tests.fakes.appliance_process import import_tree
from tests.fakes.http_process import get_over_unix
from tests.fakes.mounted import Mounted, is_mounted
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event

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
LARGE = os.urandom(1 << 20)


@pytest.fixture(scope="module")
def name(store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    tree = tmp_path_factory.mktemp("tree") / "tree"
    tree.mkdir()
    for number in range(64):
        (tree / f"dir{number}").mkdir()
        (tree / f"dir{number}" / "file").write_text(str(number))
    (tree / "large").write_bytes(LARGE)
    (base_name,) = import_tree(store, tree)
    return base_name


def run_to_its_end(
    store: Path, *options: str | Path, prefix: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, *APPLIANCE, "mount", "--store", f"lmdb://{store}", *map(str, options)],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_unmounts_and_ends_with_status_0(
    store: Path, name: str, mountpoint: Path, signum: signal.Signals
) -> None:
    mounted = Mounted(store, mountpoint)
    assert (mountpoint / name / "large").read_bytes() == LARGE
    assert f"READY: mounted on {mountpoint}\n" in mounted.log()
    mounted.process.send_signal(signum)
    assert mounted.process.wait(DEADLINE_S) == 0
    assert not is_mounted(mountpoint)


def test_umount_from_outside_ends_it_with_status_0(
    store: Path, name: str, mountpoint: Path
) -> None:
    mounted = Mounted(store, mountpoint)
    assert (mountpoint / name).is_dir()
    subprocess.run(["umount", mountpoint], check=True)
    assert mounted.process.wait(DEADLINE_S) == 0
    assert "Traceback" not in mounted.log()


def test_a_signal_ends_a_mount_that_is_in_use(store: Path, name: str, mountpoint: Path) -> None:
    with Mounted(store, mountpoint) as mounted:
        fd = os.open(mountpoint / name / "large", os.O_RDONLY)
        mounted.process.send_signal(signal.SIGTERM)
        assert mounted.process.wait(DEADLINE_S) == 0
        assert not is_mounted(mountpoint)
        with pytest.raises(OSError, match="not connected"):
            os.close(fd)


def test_a_missing_mount_point_is_refused_in_one_line(store: Path, tmp_path: Path) -> None:
    done = run_to_its_end(store, tmp_path / "missing")
    expected = f"appliance: mount point {tmp_path / 'missing'}: No such file or directory\n"
    assert (done.returncode, done.stderr) == (1, expected)


def test_a_file_as_mount_point_is_refused_in_one_line(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_to_its_end(store, tmp_path / "file")
    expected = f"appliance: mount point {tmp_path / 'file'}: not a directory\n"
    assert (done.returncode, done.stderr) == (1, expected)


@pytest.mark.parametrize("number", ["0", "255"])
def test_a_number_of_threads_out_of_range_is_refused(
    store: Path, mountpoint: Path, number: str
) -> None:
    done = run_to_its_end(store, "--threads", number, mountpoint)
    assert done.returncode == 2
    assert f"--threads {number}: expected 1 to 254" in done.stderr


def test_a_mount_whose_server_was_killed_is_replaced(
    store: Path, name: str, mountpoint: Path
) -> None:
    leave_dead_mount(store, mountpoint)
    with Mounted(store, mountpoint):
        assert (mountpoint / name / "large").read_bytes() == LARGE
    assert not is_mounted(mountpoint)


@pytest.mark.parametrize("needed", ["store", "state"])
def test_a_mount_that_would_cover_its_own_store_is_refused(tmp_path: Path, needed: str) -> None:
    # A process that accessed such a mount would wait for ever, and no signal would end it.
    (tmp_path / "mnt").mkdir()
    inside, outside = tmp_path / "mnt" / needed, tmp_path / "elsewhere"
    store, state = (inside, outside) if needed == "store" else (outside, inside)
    done = run_to_its_end(store, "--state-dir", state, tmp_path / "mnt")
    expected = f"mount point {tmp_path / 'mnt'}: would cover {inside}, which it needs"
    assert (done.returncode, done.stderr) == (1, f"appliance: {expected}\n")
    assert not is_mounted(tmp_path / "mnt")


def leave_dead_mount(store: Path, mountpoint: Path) -> None:
    mounted = Mounted(store, mountpoint)
    mounted.process.kill()
    mounted.process.wait(DEADLINE_S)
    for _ in every_event(DEADLINE_S):  # until its workers have ended, too
        if stat_error(mountpoint) == errno.ENOTCONN:
            break


def test_a_dead_mount_that_cannot_be_taken_away_is_told_of(store: Path, mountpoint: Path) -> None:
    leave_dead_mount(store, mountpoint)
    try:
        powerless = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
        done = run_to_its_end(store, mountpoint, prefix=powerless)
        expected = f"appliance: mount point {mountpoint}: the dead mount cannot be unmounted"
        assert (done.returncode, done.stderr.splitlines()[1:]) == (1, [expected])
    finally:
        subprocess.run(["umount", "-l", mountpoint], check=True)


@pytest.mark.parametrize("num_fds", [40, 75])
def test_a_mount_that_cannot_be_served_is_taken_away_again(
    store: Path, mountpoint: Path, num_fds: int
) -> None:
    # There are too few descriptors for a clone, or a channel, for each worker.
    prefix = ("prlimit", f"--nofile={num_fds}")
    done = run_to_its_end(store, "--threads=36", mountpoint, prefix=prefix)
    assert not is_mounted(mountpoint)
    assert done.returncode == 1
    (line,) = the_reasons(done)
    assert line.startswith(f"appliance: mount point {mountpoint}: ")
    assert line.endswith("Too many open files")


def the_reasons(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the lines on stderr that are errors of the command and not log lines."""
    return [line for line in done.stderr.splitlines() if line.startswith("appliance: ")]


def run_from(directory: Path) -> tuple[str, ...]:
    """Return a command prefix that makes Python import the program from `directory`."""
    return ("env", "PYTHONSAFEPATH=1", f"PYTHONPATH={directory}")


def broken_fork_server(directory: Path) -> tuple[str, ...]:
    """Copy the program without a working fork server; return the prefix to run the copy."""
    shutil.copytree(Path(appliance.__file__).parent, directory / "appliance")
    (directory / "appliance" / "worker" / "forkserver.py").write_text("raise SystemExit(3)")
    return run_from(directory)


def test_a_mount_without_a_worker_gives_up(store: Path, mountpoint: Path, tmp_path: Path) -> None:
    done = run_to_its_end(
        store, "--threads=1", mountpoint, prefix=broken_fork_server(tmp_path / "broken")
    )
    assert not is_mounted(mountpoint)
    assert done.returncode == 1
    (last,) = the_reasons(done)
    assert last.startswith(f"appliance: mount point {mountpoint}: ")
    assert last.endswith("5 workers died at startup")


def stat_error(path: Path) -> int | None:
    try:
        path.stat()
    except OSError as exc:
        return exc.errno
    return None


def test_a_dead_mount_of_another_program_is_left_alone(
    store: Path, tmp_path: Path, mountpoint: Path
) -> None:
    (tmp_path / "tree").mkdir()
    image = tmp_path / "image"
    subprocess.run(["mksquashfs", tmp_path / "tree", image, "-quiet"], check=True)
    other = subprocess.Popen(["squashfuse", "-f", image, mountpoint])
    try:
        for _ in every_event(DEADLINE_S):
            if is_mounted(mountpoint):
                break
        other.kill()
        other.wait(DEADLINE_S)
        done = run_to_its_end(store, mountpoint)
        assert done.returncode == 1
        assert done.stderr.endswith(
            "a dead mount of type fuse.squashfuse, only fuse.appliance is replaced\n"
        )
        assert is_mounted(mountpoint)
    finally:
        subprocess.run(["umount", "-l", mountpoint], check=True)


def names_in(path: Path) -> set[str]:
    return {child.name for child in path.iterdir()}


def test_without_list_root_names_are_reachable_and_not_listed(
    store: Path, name: str, mountpoint: Path
) -> None:
    with Mounted(store, mountpoint):
        assert names_in(mountpoint) == set()
        assert len(names_in(mountpoint / name)) == 65


def test_a_path_imported_later_appears(store: Path, mountpoint: Path, tmp_path: Path) -> None:
    with Mounted(store, mountpoint, "--list-root"):
        before = names_in(mountpoint)
        (tmp_path / "later").write_text("later")
        (later,) = import_tree(store, tmp_path / "later")
        assert (mountpoint / later).read_text() == "later"
        for _ in every_event(DEADLINE_S):  # the kernel may keep the root's listing for a second
            if names_in(mountpoint) == before | {later}:
                break
        assert names_in(mountpoint) == before | {later}


def as_user(command: Sequence[str]) -> int:
    done = subprocess.run(
        command, check=False, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True
    )
    return done.returncode


@pytest.mark.parametrize(("options", "is_let_in"), [([], False), (["--allow-other"], True)])
def test_other_users_get_in_where_they_are_allowed(
    store: Path, name: str, open_directory: Path, options: list[str], *, is_let_in: bool
) -> None:
    with Mounted(store, open_directory / "mnt", *options):
        assert (as_user(["ls", str(open_directory / "mnt" / name)]) == 0) == is_let_in


@pytest.fixture
def open_directory() -> Iterator[Path]:
    # Not below pytest's directory, which only one user may enter.
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o777)
        (path / "mnt").mkdir()
        os.chown(path / "mnt", NOBODY, NOBODY)
        yield path


@pytest.fixture
def device_for_all() -> Iterator[None]:
    # As Debian's udev sets it; in containers it is often only for root.
    device = Path("/dev/fuse")
    mode = device.stat().st_mode
    device.chmod(0o666)
    yield
    device.chmod(mode & 0o777)


@pytest.mark.usefixtures("device_for_all")
def test_an_ordinary_user_mounts_by_fusermount3(open_directory: Path, tmp_path: Path) -> None:
    mountpoint, store = open_directory / "mnt", open_directory / "store"
    (tmp_path / "file").write_text("content")
    (name,) = import_tree(store, tmp_path / "file")
    subprocess.run(["chown", "-R", str(NOBODY), store], check=True)
    with Mounted(store, mountpoint, prefix=AS_NOBODY) as mounted:
        assert as_user(["cat", str(mountpoint / name)]) == 0
        mounted.process.send_signal(signal.SIGTERM)
        assert mounted.process.wait(DEADLINE_S) == 0
        assert not is_mounted(mountpoint)


def test_every_thread_is_a_process_and_status_tells_of_it(
    store: Path, name: str, mountpoint: Path
) -> None:
    with Mounted(store, mountpoint, "--threads=3") as mounted:
        (mountpoint / name / "large").read_bytes()
        session = mounted.status()
        assert len({worker["pid"] for worker in session["workers"]}) == 3
        assert session["requests"]["INIT"] == 1
        assert session["requests"]["READ"] >= 1


def test_killing_workers_loses_no_request(store: Path, name: str, mountpoint: Path) -> None:
    # The directories are cold, so some requests are parked in the worker when it dies.
    with Mounted(store, mountpoint, "--threads=2") as mounted:
        problems: list[object] = []
        done = threading.Event()

        def read_all() -> None:
            try:
                while not done.is_set():
                    for number in range(64):
                        path = mountpoint / name / f"dir{number}" / "file"
                        assert path.read_text() == str(number)
                    assert (mountpoint / name / "large").read_bytes() == LARGE
                    Path("/proc/sys/vm/drop_caches").write_text("3")
            except Exception as exc:  # noqa: BLE001 - the test asserts that there are none
                problems.append(exc)

        readers = [threading.Thread(target=read_all) for _ in range(3)]
        for reader in readers:
            reader.start()
        for kill in range(4):
            os.kill(mounted.worker_pids()[kill % 2], signal.SIGKILL)
            for _ in every_event(DEADLINE_S):
                workers = mounted.status()["workers"]
                if len(workers) == 2 and sum(w["restarts"] for w in workers) == kill + 1:
                    break
        done.set()
        for reader in readers:
            reader.join(DEADLINE_S)
            assert not reader.is_alive()
        assert problems == []
        assert "Traceback" not in mounted.log()


def test_a_request_that_a_killed_worker_had_parked_is_answered(
    name: str, store: Path, mountpoint: Path, tmp_path: Path
) -> None:
    # With a new state directory nothing is indexed yet, so the worker has to ask the supervisor.
    with Mounted(store, mountpoint, "--threads=1", f"--state-dir={tmp_path}/state") as mounted:
        supervisor = mounted.process.pid
        (pid,) = workers_of(supervisor)
        os.kill(supervisor, signal.SIGSTOP)  # and thereby the resolver
        try:
            command: list[str | Path] = ["cat", mountpoint / name / "dir1" / "file"]
            reader = subprocess.Popen(command, stdout=subprocess.PIPE)
            for _ in every_event(DEADLINE_S):
                if system_call_of(pid) == EPOLL_WAIT:  # it has parked the request that it read
                    break
            assert system_call_of(pid) == EPOLL_WAIT
            os.kill(pid, signal.SIGKILL)
        finally:
            os.kill(supervisor, signal.SIGCONT)
        output, _errors = reader.communicate(timeout=DEADLINE_S)
        assert (reader.returncode, output) == (0, b"1")


# The number on x86-64. A worker that waits for a request is in readv(2) instead.
EPOLL_WAIT = 232


def system_call_of(pid: int) -> int | None:
    number = Path(f"/proc/{pid}/syscall").read_text().split()[0]
    return int(number) if number.isdecimal() else None


def workers_of(supervisor: int) -> list[int]:
    (fork_server,) = children_of(supervisor)
    return children_of(fork_server)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("signum", [signal.SIGKILL])
def test_killing_the_fork_server_is_survived(
    store: Path, name: str, mountpoint: Path, signum: signal.Signals
) -> None:
    with Mounted(store, mountpoint) as mounted:
        (pid, *_others) = mounted.worker_pids()
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(parent, signum)
        assert (mountpoint / name / "dir5" / "file").read_text() == "5"


def test_the_mount_may_cover_the_program_itself(tmp_path: Path) -> None:
    # Just as a mount on /nix/store covers the interpreter that was started from there.
    work = tmp_path / "work"
    shutil.copytree(Path(appliance.__file__).parent, work / "appliance")
    (work / "file").write_text("covered")
    (name,) = import_tree(tmp_path / "store", work / "file")
    with Mounted(tmp_path / "store", work, prefix=run_from(work)):
        assert (work / name).read_text() == "covered"
        with pytest.raises(FileNotFoundError):
            (work / "appliance").stat()


def test_metrics_of_a_mount_are_served_until_it_ends(
    store: Path, name: str, mountpoint: Path, tmp_path: Path
) -> None:
    socket_path = tmp_path / "metrics.sock"
    with Mounted(store, mountpoint, f"--metrics={socket_path}") as mounted:
        assert (mountpoint / name / "large").read_bytes() == LARGE
        scraped = get_over_unix(socket_path, "/metrics")
        read = re.search(
            r'appliance_read_bytes_total\{source="store_file",vm="(.*)"\} (.*)', scraped
        )
        assert read, scraped
        assert read[1] == str(mountpoint)
        assert float(read[2]) == len(LARGE)
        mounted.stop()
    assert not socket_path.exists()
