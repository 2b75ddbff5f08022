"""Stores on read-only file systems, and of other users: they can be read and served."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import SymlinkNode
from appliance.db.environment import Environment
from appliance.errors import ReadOnlyStoreError, StoreError
from appliance.nix.path_info import encode_nar_addressed
from appliance.nix.store_path import nar_path
from appliance.store import schema
from appliance.store.batch import Batch
from appliance.store.store import Store
from tests.contracts.rig import Rig
from tests.db.test_environment import opened, put
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.mounted import Mounted
from tests.fakes.running_command import APPLIANCE

BIG = b"big" * 100_000
# Runs as root, but without the capabilities that override file permissions.
NO_PRIVILEGE = ("setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner")
OTHER_UID = 4242


class Readonly(NamedTuple):
    """A store that can only be read, and the prefix of commands that can only read it."""

    store: Path
    path: str
    prefix: Sequence[str]

    @property
    def uri(self) -> str:
        return f"lmdb://{self.store}"


def make_store(directory: Path) -> str:
    tree = directory / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/big").write_bytes(BIG)
    (tree / "sub/small").write_bytes(b"small")
    (name,) = import_tree(directory / "store", tree)
    return f"/nix/store/{name}"


@contextmanager
def readonly_disk(directory: Path) -> Iterator[Path]:
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


@pytest.fixture(
    scope="module", params=["disk", "disk without a lock file", "mount", "owner", "earlier release"]
)
def readonly(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Readonly]:
    directory = tmp_path_factory.mktemp("readonly")
    with readonly_disk(directory / "disk") as disk:
        path = make_store(disk)
        store = disk / "store"
        if request.param == "owner":
            for name in (store, *store.rglob("*")):
                os.chown(name, OTHER_UID, -1)  # the group may still read it
            disk.chmod(0o555)
            os.chown(disk, OTHER_UID, OTHER_UID)
            yield Readonly(store, path, NO_PRIVILEGE)
            return
        if request.param == "disk without a lock file":
            (store / "lock.mdb").unlink()
        if request.param == "earlier release":
            forget_images(store)
        if request.param == "mount":
            subprocess.run(["mount", "--bind", disk, disk], check=True)
        how = "bind,remount,ro" if request.param == "mount" else "remount,ro"
        subprocess.run(["mount", "-o", how, disk], check=True)
        yield Readonly(store, path, ())
        if request.param == "mount":
            subprocess.run(["umount", "-l", disk], check=True)


def forget_images(store: Path) -> None:
    env = Environment(store, databases=[schema.IMAGES], is_readonly=False, is_durable=False)
    env.write(lambda txn: txn.drop(env.database(schema.IMAGES), delete=True))
    env.close()


def run(
    readonly: Readonly, *arguments: str, status: int = 0
) -> "subprocess.CompletedProcess[bytes]":
    done = subprocess.run(
        [*readonly.prefix, *APPLIANCE, *arguments], capture_output=True, check=False, timeout=60
    )
    assert done.returncode == status, done.stderr
    return done


@pytest.mark.slow
def test_commands_that_read_do(readonly: Readonly) -> None:
    store = ["--store", readonly.uri]
    assert run(readonly, "path-info", *store).stdout.decode().split() == [readonly.path]
    assert run(readonly, "cat", *store, f"{readonly.path}/sub/big").stdout == BIG
    assert run(readonly, "ls", *store, readonly.path).stdout == b"./sub\n"
    assert b"small" in run(readonly, "nar", *store, readonly.path).stdout
    done = run(readonly, "verify", *store)
    assert done.stdout == b"paths: 1, bytes: %d, failures: 0\n" % (len(BIG) + 5)


@pytest.mark.slow
def test_commands_that_write_are_one_line_and_status_one(
    readonly: Readonly, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for arguments in (["import", str(tmp_path / "file")], ["verify", "--repair"]):
        done = run(readonly, *arguments, "--store", readonly.uri, status=1)
        assert done.stderr.startswith(f"appliance: {readonly.store}".encode())
        assert done.stderr.count(b"\n") == 1


@pytest.mark.slow
def test_daemon_serves_what_is_there_and_refuses_the_rest(
    readonly: Readonly, tmp_path: Path
) -> None:
    options = ["--store", f"grpc+unix://{tmp_path}/daemon.sock"]
    with DaemonProcess(readonly.uri, tmp_path, prefix=readonly.prefix) as daemon:
        assert run(readonly, "cat", *options, f"{readonly.path}/sub/big").stdout == BIG
        sha256 = bytes(32)
        path = nar_path(sha256, "new")
        node = SymlinkNode(b"", b"target")
        encoded = encode_nar_addressed(path, node, nar_size=1, nar_sha256=sha256)
        with pytest.raises(StoreError, match="opened for reading only"):
            Rig(daemon.unix_uri).run(lambda services: services.path_infos.put(encoded))
        # Calculated each time, as the result cannot be stored.
        Rig(daemon.unix_uri).run(lambda services: services.path_infos.calculate_nar(node))


@pytest.mark.slow
def test_guests_and_mounts_are_served(readonly: Readonly, tmp_path: Path) -> None:
    state = f"--state-dir={tmp_path}/state"
    name = Path(readonly.path).name
    (tmp_path / "mount").mkdir()
    with Mounted(readonly.store, tmp_path / "mount", state, prefix=readonly.prefix) as mounted:
        assert (mounted.path / name / "sub/big").read_bytes() == BIG
        assert (mounted.path / name / "sub/small").read_bytes() == b"small"
    if readonly.prefix:
        return  # as above
    with (
        ApplianceProcess(readonly.store, tmp_path, state) as appliance,
        FakeGuest(appliance.connect()) as guest,
    ):
        guest.mount()
        assert guest.lookup(guest.lookup(1, name.encode()), b"sub")


@pytest.mark.slow
def test_state_is_kept_elsewhere_where_none_can_be_beside_the_store(
    readonly: Readonly, tmp_path: Path
) -> None:
    environ = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [*readonly.prefix, *APPLIANCE, "status", "--store", readonly.uri],
        capture_output=True,
        check=False,
        timeout=60,
        env=environ,
    )
    assert done.returncode == 1
    assert str(readonly.store).encode() not in done.stderr
    assert b"no supervisor is running" in done.stderr


def test_writing_through_a_store_opened_for_reading_is_refused(tmp_path: Path) -> None:
    Store.open(tmp_path / "store", create=True).close()
    store = Store.open(tmp_path / "store", is_readonly=True)
    assert not store.is_writable
    batch = Batch()
    batch.add_blob(Digest.of(b"x"), b"x")
    with pytest.raises(ReadOnlyStoreError, match="opened for reading only"):
        store.commit(batch)
    store.close()


READ_SLOWLY = """
import sys
from pathlib import Path
from appliance.errors import SnapshotLostError
from tests.db import test_environment as t
with t.opened(Path(sys.argv[1]), is_readonly=True) as env:
    print(env.is_locked, flush=True)
    try:
        with env.read() as txn:
            sys.stdin.readline()
            print(txn.stat(env.database(b"one"))["entries"], flush=True)
    except SnapshotLostError as exc:
        print("lost", flush=True)
    print(t.num_entries(env), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_commits", [0, 1, 2, 5])
def test_unregistered_reader_hears_when_its_snapshot_may_be_gone(
    tmp_path: Path, num_commits: int
) -> None:
    path = tmp_path / "env"
    with opened(path) as env:
        put(env, range(100))
        for name in (path, path / "data.mdb", path / "lock.mdb"):
            os.chown(name, OTHER_UID, -1)  # whose group may read it
        with subprocess.Popen(
            [*NO_PRIVILEGE, sys.executable, "-c", READ_SLOWLY, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "False\n"
            for number in range(num_commits):
                put(env, range(100, 101 + number))
            told, _ = reader.communicate("\n", timeout=60)
    entries = 100 if num_commits <= 1 else "lost"
    lines = told.split()
    assert lines[-1] == str(100 + num_commits)
    assert ("lost" in lines) == (entries == "lost")
    assert entries == "lost" or lines[0] == "100"


@pytest.mark.slow
def test_reader_that_may_write_the_lock_file_alone_is_registered(tmp_path: Path) -> None:
    path = tmp_path / "env"
    with opened(path):
        pass
    for name in (path, path / "data.mdb"):
        os.chown(name, OTHER_UID, -1)  # whose group may read it
    done = subprocess.run(
        [*NO_PRIVILEGE, sys.executable, "-c", READ_SLOWLY, path],
        input="\n",
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["True", "0", "0"]
