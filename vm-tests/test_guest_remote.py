"""A real kernel reads what is at a daemon, which is slow, wrong, gone and back again."""

import errno
import hashlib
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from vmharness import samples, tree
from vmharness.served import Served, serve
from vmharness.tree import TreeDigest

from appliance.castore.digest import Digest
from appliance.db.environment import WriteTransaction
from appliance.store import schema
from appliance.store.store import Store
from tests.fakes.appliance_process import import_tree
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import every_event
from tests.store.audit import blob_path

ANSWER_S = 60.0
GIVEN_UP_S = 180.0
DROP_CACHES = "echo 3 > /proc/sys/vm/drop_caches"
SMALL, LARGE = 3000, 300_000
_NUM_SMALL = 300


class Remote:
    """A daemon and its store, and a guest whose appliance knows nothing but the daemon."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.daemon = self.new_daemon()
        self.served: Served

    def new_daemon(self) -> DaemonProcess:
        return DaemonProcess(f"lmdb://{self.store}", self.directory / "daemon")

    def put(self, source: Path) -> str:
        """Import a tree into the daemon; return where the guest sees it."""
        (name,) = import_tree(self.daemon.unix_uri, source)
        return f"/mnt/{name}"

    def digest(self, seen_at: str, mode: str = "read") -> TreeDigest:
        """Return what the guest reads with empty caches of its own."""
        command = f"{DROP_CACHES}; probe tree-digest -n {mode} {seen_at} 3"
        return TreeDigest.parse(self.served.guest.check(command, ANSWER_S))

    def sums(self, paths: list[str]) -> dict[str, str]:
        """Return the SHA-256 of each file that the guest can read."""
        script = f"sha256sum {' '.join(paths)}"
        lines = self.served.guest.run(script, ANSWER_S).output.decode().splitlines()
        found = [line.split(maxsplit=1) for line in lines if not line.startswith("sha256sum:")]
        return {path: digest for digest, path in found}


class Tree(NamedTuple):
    """A tree at the daemon that the guest has read before."""

    source: Path
    seen_at: str


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    directory = tmp_path_factory.mktemp("remote")
    remote = Remote(directory)
    state = f"--state-dir={directory}/state"
    try:
        with serve("uml", remote.daemon.unix_uri, directory, state) as remote.served:
            remote.served.mount()
            yield remote
    finally:
        remote.daemon.stop()


@pytest.fixture(scope="module")
def cached(remote: Remote) -> Tree:
    source = remote.directory / "varied"
    samples.build_varied(source)
    for number in range(_NUM_SMALL):
        leaf = source / f"leaf {number % 10}"
        leaf.mkdir(exist_ok=True)
        (leaf / f"{number}").write_bytes(b"%d\n" % number * (number * 7))
    seen_at = remote.put(source)
    assert remote.digest(seen_at) == expected(source)
    return Tree(source, seen_at)


@pytest.mark.parametrize("mode", samples.MODES)
def test_what_was_read_before_is_the_hosts_without_the_daemon(
    remote: Remote, cached: Tree, mode: str
) -> None:
    with stopped(remote.daemon):
        assert remote.digest(cached.seen_at, mode) == expected(cached.source)


@pytest.mark.parametrize("mode", ["mmap", "direct", "sendfile"])
def test_what_was_never_read_is_the_hosts(remote: Remote, tmp_path: Path, mode: str) -> None:
    files = {f"{number}/{size}": size for number in range(8) for size in (1, 4097, SMALL, LARGE)}
    seen_at = put_random(remote, tmp_path / "tree", files)

    assert remote.digest(seen_at, mode) == expected(tmp_path / "tree")


def test_content_that_is_wrong_or_missing_is_an_error_until_it_is_right(
    remote: Remote, tmp_path: Path
) -> None:
    sizes = {"small-changed": SMALL, "small-missing": SMALL}
    sizes |= {"large-changed": LARGE, "large-missing": LARGE, "large-cut": LARGE}
    good = {"good": SMALL, "good-large": LARGE}
    seen_at = put_random(remote, tmp_path / "tree", sizes | good)
    content = {name: (tmp_path / "tree" / name).read_bytes() for name in sizes | good}
    damage(remote.store, {name: content[name] for name in sizes})
    expected_sums = {
        f"{seen_at}/{name}": hashlib.sha256(data).hexdigest() for name, data in content.items()
    }
    paths = list(expected_sums)

    for _ in range(2):
        assert remote.sums(paths) == {p: expected_sums[p] for p in paths if "good" in p}
    log = remote.served.server.log()
    for name in sizes:
        told = [line for line in log.splitlines() if str(Digest.of(content[name])) in line]
        assert {line.split()[0] for line in told} == {"ERROR"}, name
    listed = remote.served.guest.check(f"probe hash -n read {seen_at}", ANSWER_S)
    assert listed.count(b"!%d\n" % errno.EIO) == len(sizes)

    repair(remote.store, {name: content[name] for name in sizes})

    assert remote.sums(paths) == expected_sums


def test_a_daemon_that_hangs_keeps_nothing_waiting_but_what_it_was_asked_for(
    remote: Remote, cached: Tree, tmp_path: Path
) -> None:
    seen_at = put_random(remote, tmp_path / "tree", {"small": SMALL, "large": LARGE})
    guest = remote.served.guest
    guest.check(f"stat {seen_at}/small {seen_at}/large", ANSWER_S)
    with stopped(remote.daemon):
        waiting = [guest.start(f"sha256sum {seen_at}/{name}") for name in ("small", "large")]
        for mode in samples.MODES[:2]:
            assert remote.digest(cached.seen_at, mode) == expected(cached.source)
        assert [job.status for job in waiting] == [None, None]

    for name, job in zip(("small", "large"), waiting, strict=True):
        status, output = job.wait(ANSWER_S)
        content = (tmp_path / "tree" / name).read_bytes()
        assert (status, output.split()[0].decode()) == (0, hashlib.sha256(content).hexdigest())


def test_a_daemon_killed_under_a_reading_guest_is_missed_only_for_what_is_new(
    remote: Remote, cached: Tree, tmp_path: Path
) -> None:
    seen_at = put_random(remote, tmp_path / "tree", {"sub/small": SMALL, "large": LARGE})
    guest = remote.served.guest
    guest.check(f"stat {seen_at}/large", ANSWER_S)
    reading = guest.start(f"probe loop-read -d read {cached.seen_at} 3")
    reading.wait_for_output(b"pass 1 ", ANSWER_S)

    remote.daemon.kill()

    passes = reading.output.count(b"pass ")
    # A request waits 30 s for a daemon that is away, and the kernel reads again what failed.
    assert guest.run(f"cat {seen_at}/large", GIVEN_UP_S).status == 1
    assert guest.run(f"cat {seen_at}/sub/small", GIVEN_UP_S).status == 1
    reading.wait_for_output(b"pass %d " % (passes + 2), ANSWER_S)  # one of them began after all
    remote.daemon = remote.new_daemon()
    for _ in every_event(ANSWER_S):
        if guest.run(f"cat {seen_at}/large >/dev/null", ANSWER_S).status == 0:
            break
    assert remote.digest(seen_at) == expected(tmp_path / "tree")
    reading.close_input()
    status, output = reading.wait(ANSWER_S)
    assert status == 0, output
    assert len({line.split()[2] for line in output.splitlines()}) == 1


def expected(source: Path) -> TreeDigest:
    found = tree.tree_digest(tree.records(source, is_normalised=True))
    assert found.errors == 0
    return found


def put_random(remote: Remote, source: Path, sizes: dict[str, int]) -> str:
    for name, size in sizes.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.randbytes(size))
    return remote.put(source)


@contextmanager
def stopped(daemon: DaemonProcess) -> Iterator[None]:
    """Let a daemon answer nothing for the time of a block."""
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        daemon.process.send_signal(signal.SIGCONT)


def damage(path: Path, contents: dict[str, bytes]) -> None:
    """Break blobs in the store of a running daemon, as their names say."""
    store = Store.open(path)
    blobs = store.env.database(schema.BLOBS)

    def work(txn: WriteTransaction) -> None:
        for name, content in contents.items():
            digest, wrong = Digest.of(content), bytes([content[0] ^ 1]) + content[1:]
            file = blob_path(store, digest)
            match name:
                case "small-changed":
                    txn.put(digest, schema.pack_inline(wrong), db=blobs)
                case "small-missing":
                    txn.delete(digest, db=blobs)
                case "large-changed":
                    file.write_bytes(wrong)
                case "large-missing":
                    file.unlink()
                case "large-cut":
                    os.truncate(file, len(content) // 2)

    store.env.write(work)
    store.close()


def repair(path: Path, contents: dict[str, bytes]) -> None:
    """Put back what `damage` has broken."""
    store = Store.open(path)
    blobs = store.env.database(schema.BLOBS)

    def work(txn: WriteTransaction) -> None:
        for name, content in contents.items():
            digest = Digest.of(content)
            if name.startswith("large"):
                blob_path(store, digest).write_bytes(content)
            else:
                txn.put(digest, schema.pack_inline(content), db=blobs)

    store.env.write(work)
    store.close()
