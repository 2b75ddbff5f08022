"""Two hosts and a store host, and a link between them that is slow, cut, or dead at one end."""

import errno
import os
import random
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from appliance.services.retry import BUDGET_S
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.hosts import Network
from tests.fakes.mounted import Mounted
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event
from tests.fakes.slow_link import SlowLink

pytestmark = pytest.mark.slow

ROOT = 1
DAEMON_PORT: Final = 7000
LINK_PORT: Final = 7001
# 20 ms there and back, 50 Mbit/s.
LINK: Final = {"delay_s": 0.01, "bytes_per_s": 50e6 / 8, "loss": 0.01}
# How long the link is cut. `make long-cut` cuts it for a minute.
CUT_S: Final = float(os.environ.get("TEST_CUT_S", "3"))
# What is pending when the link is back may take this long; a dead connection is found before.
RECOVERY_S: Final = 25
NUM_WARM: Final = 50


class Site:
    """A store host with a daemon that can be restarted, and what leads to it."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.network = stack.enter_context(Network("store", "a", "b"))
        self._directory = directory
        self.store = f"lmdb://{directory}/store"
        host = self.network.hosts["store"]
        self._prefix = host.prefix
        self._address = f"{host.address}:{DAEMON_PORT}"
        self.daemon = self._start()
        stack.callback(self._stop)
        listen = f"{host.address}:{LINK_PORT}"
        self.link = stack.enter_context(SlowLink(listen, self._address, prefix=host.prefix, **LINK))
        self.uri = f"grpc+http://{listen}"

    def restart(self, *, kill: bool) -> None:
        if kill:
            self.daemon.kill()
        else:
            self.daemon.stop()
        self.daemon = self._start()

    def _stop(self) -> None:
        self.daemon.stop()

    def _start(self) -> DaemonProcess:
        return DaemonProcess(
            self.store, self._directory / "daemon", listen=[self._address], prefix=self._prefix
        )


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def site(tmp_path: Path, stack: ExitStack) -> Site:
    return Site(tmp_path, stack)


def make_tree(tree: Path, num_files: int) -> dict[Path, bytes]:
    """Make a tree of small files and a few large ones; return the contents by relative path."""
    chance = random.Random(1)
    contents = {}
    for number in range(num_files):
        path = Path(f"{number // 20:03}") / f"{number:05}"
        size = 300_000 if number % 100 == 50 else chance.randrange(500, 8000)
        contents[path] = chance.randbytes(size)
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(contents[path])
    return contents


class Walk:
    """A walk through a mount in a thread: `num_read` files were as they should be."""

    def __init__(self, top: Path, contents: dict[Path, bytes], threads: ThreadPoolExecutor) -> None:
        self.num_read = 0
        self._top = top
        self._contents = contents
        self._done: Future[None] = threads.submit(self._run)

    def wait_for(self, number: int) -> None:
        for _ in every_event(4 * DEADLINE_S):
            if self.num_read >= number or self._done.done():
                return
        raise AssertionError(f"only {self.num_read} files were read")

    def finish(self) -> None:
        self._done.result(4 * DEADLINE_S)
        assert self.num_read == len(self._contents)

    def _run(self) -> None:
        for path, content in self._contents.items():
            assert (self._top / path).read_bytes() == content
            self.num_read += 1


def mounted(stack: ExitStack, site: Site, host: str, directory: Path, name: str) -> Mounted:
    path = directory / name
    path.mkdir()
    return stack.enter_context(
        Mounted(
            site.uri,
            path,
            f"--state-dir={directory}/state-{host}",
            prefix=site.network.hosts[host].prefix,
        )
    )


def test_a_walk_goes_on_while_the_daemon_is_restarted(
    site: Site, stack: ExitStack, tmp_path: Path
) -> None:
    contents = make_tree(tmp_path / "tree", 600)
    (base,) = import_tree(site.store, tmp_path / "tree")
    mount = mounted(stack, site, "a", tmp_path, "mnt")
    threads = stack.enter_context(ThreadPoolExecutor(1))
    walk = Walk(mount.path / base, contents, threads)
    for number in range(5):
        walk.wait_for((number + 1) * 100)
        site.restart(kill=bool(number % 2))
    walk.finish()
    assert "ERROR" not in mount.log()


def test_an_import_goes_on_while_the_daemon_is_restarted(site: Site, tmp_path: Path) -> None:
    trees = [tmp_path / name for name in ("one", "other")]
    for tree in trees:
        make_tree(tree, 400)
    command = [*APPLIANCE, "import", "--store", site.uri, *map(str, trees)]
    log_path = tmp_path / "import.log"
    with (
        log_path.open("wb") as log,
        subprocess.Popen(
            [*site.network.hosts["a"].prefix, *command],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as importing,
    ):
        assert importing.stdout is not None
        for kill in (True, False):
            before = site.link.bytes_from()
            for _ in every_event(DEADLINE_S):
                if importing.poll() is not None or site.link.bytes_from() > before + (1 << 20):
                    break
            site.restart(kill=kill)
        printed = importing.stdout.read().splitlines()
        assert importing.wait(4 * DEADLINE_S) == 0, log_path.read_text()
    assert [line.partition("-")[2] for line in printed] == ["one", "other"]
    subprocess.run([*APPLIANCE, "verify", "--store", site.store], check=True)


def test_each_blob_crosses_the_link_once_for_each_host(
    site: Site, stack: ExitStack, tmp_path: Path
) -> None:
    contents = make_tree(tmp_path / "tree", 300)
    (base,) = import_tree(site.store, tmp_path / "tree")
    mounts = [
        mounted(stack, site, host, tmp_path, f"{host}{number}")
        for host in ("a", "b")
        for number in range(2)
    ]
    threads = stack.enter_context(ThreadPoolExecutor(len(mounts)))
    walks = [Walk(mount.path / base, contents, threads) for mount in mounts]
    for walk in walks:
        walk.finish()
    num_bytes = sum(map(len, contents.values()))
    for host in ("a", "b"):
        # Directories, of which each process takes its own, and framing come on top.
        crossed = site.link.bytes_to(site.network.hosts[host].address)
        assert num_bytes <= crossed < 1.2 * num_bytes


class CachedReads:
    """A guest on host `a` that has read the small files of a tree, and can read them again."""

    def __init__(self, site: Site, stack: ExitStack, directory: Path, *options: str) -> None:
        contents = {b"%03d" % number: os.urandom(3000) for number in range(NUM_WARM + 50)}
        tree = directory / "tree"
        tree.mkdir()
        for name, content in contents.items():
            (tree / os.fsdecode(name)).write_bytes(content)
        self.large = os.urandom(500_000)
        (tree / "large").write_bytes(self.large)
        (base,) = import_tree(site.store, tree)
        process = ApplianceProcess(
            site.uri,
            directory,
            f"--state-dir={directory}/state",
            *options,
            prefix=site.network.hosts["a"].prefix,
        )
        self.process = stack.enter_context(process)
        self.guest = stack.enter_context(FakeGuest(process.connect()))
        self.guest.mount()
        top = self.guest.lookup(ROOT, base.encode())
        self._warm = [
            (self.guest.lookup(top, name), contents[name]) for name in list(contents)[:NUM_WARM]
        ]
        self.large_nodeid = self.guest.lookup(top, b"large")
        self.seconds_for_all()

    def seconds_for_all(self) -> float:
        """Read everything that is cached once."""
        began_s = time.perf_counter()
        for nodeid, content in self._warm:
            answer = self.guest.ask(fuse_client.read(nodeid, 0, 4096))
            assert answer.body == content
        return time.perf_counter() - began_s

    def want_large(self) -> None:
        """Ask for something that is not cached, without waiting for it."""
        self.guest.send(fuse_client.read(self.large_nodeid, 0, 4096, unique=7))

    def take_large(self, timeout_s: float) -> int:
        """Wait for that, and return the error of the answer."""
        (used,) = self.guest.rings[1].collect(timeout_s=timeout_s)
        answer = fuse_client.parse_reply(used.data)
        assert answer.unique == 7
        assert answer.error or answer.body == self.large[:4096]
        return answer.error


def check_as_fast(reads: CachedReads, usual_s: float) -> None:
    """Check that cached reads take about as long as when nothing is wrong."""
    assert min(reads.seconds_for_all() for _ in range(5)) < 3 * usual_s


def test_cached_reads_go_on_while_the_link_is_cut_and_the_rest_comes_afterwards(
    site: Site, stack: ExitStack, tmp_path: Path
) -> None:
    reads = CachedReads(site, stack, tmp_path)
    usual_s = min(reads.seconds_for_all() for _ in range(5))
    with site.network.cut("a"):
        ends_s = time.monotonic() + CUT_S
        if CUT_S < RECOVERY_S:
            reads.want_large()
        check_as_fast(reads, usual_s)
        if CUT_S > BUDGET_S + RECOVERY_S:
            check_failing_at_once(reads)
        for _ in every_event(max(0.0, ends_s - time.monotonic())):
            reads.seconds_for_all()
    if CUT_S < RECOVERY_S:
        assert reads.take_large(RECOVERY_S) == 0
        assert "ERROR" not in reads.process.log()
        return
    ends_s = time.monotonic() + RECOVERY_S
    error = errno.EIO
    while error:
        reads.want_large()
        error = reads.take_large(ends_s - time.monotonic())


def check_failing_at_once(reads: CachedReads) -> None:
    """Wait until the service is known to be away; check that from then on nothing waits for it."""
    while "it is looked for every second" not in reads.process.log():
        reads.want_large()
        assert reads.take_large(BUDGET_S + DEADLINE_S) == errno.EIO
    began_s = time.monotonic()
    for _ in range(10):
        reads.want_large()
        assert reads.take_large(DEADLINE_S) == errno.EIO
    assert time.monotonic() - began_s < BUDGET_S / 2


def test_a_dead_connection_is_given_up_and_another_one_made(
    site: Site, stack: ExitStack, tmp_path: Path
) -> None:
    reads = CachedReads(site, stack, tmp_path)
    usual_s = min(reads.seconds_for_all() for _ in range(5))
    site.link.freeze()
    reads.want_large()
    check_as_fast(reads, usual_s)
    assert reads.take_large(RECOVERY_S) == 0
    assert "ERROR" not in reads.process.log()
