"""Three hosts and an S3 server: one host publishes, guests on the other two read it."""

import errno
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.hosts import Network
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event
from tests.fakes.s3_server import Moto
from tests.fakes.slow_link import SlowLink

pytestmark = pytest.mark.slow

ROOT: Final = 1
BUCKET: Final = "hosts"
# From each host to the server: 20 ms there and back, 50 Mbit/s.
LINK: Final = {"delay_s": 0.01, "bytes_per_s": 50e6 / 8, "loss": 0.0}
FIRST_PORT: Final = 7001
HOSTS: Final = ("publisher", "a", "b")
# How long the server stands still. `make long-cut` has it stand for a minute.
STOP_S: Final = float(os.environ.get("TEST_CUT_S", "3"))
# A request is given up after this time.
BUDGET_S: Final = 30
RECOVERY_S: Final = 25
READ_SIZE: Final = 1 << 18


class Site:
    """The hosts, the server on another one, and a link from each of them to it."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.network = stack.enter_context(Network("store", *HOSTS))
        self._directory = directory
        self._stack = stack
        store = self.network.hosts["store"]
        self.server = stack.enter_context(Moto(directory, store))
        self.server.make_bucket(BUCKET)
        self._ports = {name: FIRST_PORT + index for index, name in enumerate(HOSTS)}
        target = f"{store.address}:{self.server.port}"
        self.links = {
            name: stack.enter_context(
                SlowLink(f"{store.address}:{port}", target, prefix=store.prefix, **LINK)
            )
            for name, port in self._ports.items()
        }

    def uri(self, host: str) -> str:
        """Return the address of the bucket for a host."""
        return self.server.uri(BUCKET, self._ports[host])

    def bytes_to(self, host: str) -> int:
        """Return how many bytes the server has sent to a host."""
        return self.links[host].bytes_to(self.network.hosts[host].address)

    def publish(self, tree: Path) -> str:
        """Import a tree on the publishing host and copy it into the bucket; return its name."""
        local = f"lmdb://{self._directory}/published"
        (base,) = import_tree(local, tree)
        command = ["copy", "--quiet", "--store", local, "--to", self.uri("publisher")]
        subprocess.run(
            [*self.network.hosts["publisher"].prefix, *APPLIANCE, *command, f"/nix/store/{base}"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return base

    def guest(self, host: str) -> tuple[FakeGuest, ApplianceProcess]:
        directory = self._directory / host
        directory.mkdir()
        process = ApplianceProcess(
            self.uri(host),
            directory,
            f"--state-dir={directory}/state",
            prefix=self.network.hosts[host].prefix,
        )
        self._stack.enter_context(process)
        guest = self._stack.enter_context(FakeGuest(process.connect(), num_request_queues=2))
        guest.mount()
        return guest, process

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Have the server answer nothing in the block; its connections stay."""
        self.server.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.server.process.send_signal(signal.SIGCONT)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(tmp_path, stack)


def make_tree(tree: Path) -> dict[Path, bytes]:
    """Make a tree of small files and a few large ones; return the contents by relative path."""
    chance = random.Random(1)
    contents = {}
    for number in range(120):
        size = 700_000 if number % 40 == 20 else chance.randrange(500, 8000)
        path = Path(f"{number // 20:03}") / f"{number:05}"
        contents[path] = chance.randbytes(size)
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(contents[path])
    return contents


class Reader:
    """Reads files of a path in a guest."""

    def __init__(self, guest: FakeGuest, base: str) -> None:
        self._guest = guest
        self._top = guest.lookup(ROOT, base.encode())

    def find(self, path: Path) -> int:
        nodeid = self._top
        for part in path.parts:
            nodeid = self._guest.lookup(nodeid, part.encode())
        return nodeid

    def read(self, nodeid: int, size: int) -> bytes:
        parts = []
        for start in range(0, size, READ_SIZE):
            answer = self._guest.ask(fuse_client.read(nodeid, start, READ_SIZE), room=READ_SIZE)
            assert answer.error == 0
            parts.append(answer.body)
        return b"".join(parts)

    def walk(self, contents: dict[Path, bytes]) -> None:
        for path, content in contents.items():
            assert self.read(self.find(path), len(content)) == content


def test_each_chunk_crosses_each_link_once(site: Site, tmp_path: Path) -> None:
    contents = make_tree(tmp_path / "tree")
    base = site.publish(tmp_path / "tree")
    readers = [Reader(site.guest(host)[0], base) for host in ("a", "b")]
    with ThreadPoolExecutor(len(readers)) as threads:
        for walk in [threads.submit(reader.walk, contents) for reader in readers]:
            walk.result(4 * DEADLINE_S)
    published = site.server.carried_out("PUT")
    assert set(published.values()) == {1}
    chunks = {key for key in published if key.startswith("chunks/")}
    fetched = site.server.carried_out("GET")
    assert {key: fetched[key] for key in chunks} == dict.fromkeys(chunks, 2)
    num_bytes = sum(map(len, contents.values()))
    for host in ("a", "b"):
        # Lists, directories and framing come on top.
        assert num_bytes <= site.bytes_to(host) < 1.3 * num_bytes


def test_what_is_cached_is_read_while_the_server_stands_still_and_the_rest_afterwards(
    site: Site, tmp_path: Path
) -> None:
    contents = make_tree(tmp_path / "tree")
    base = site.publish(tmp_path / "tree")
    guest, process = site.guest("a")
    reader = Reader(guest, base)
    cached = dict(list(contents.items())[:20])
    reader.walk(cached)
    nodeids = {path: reader.find(path) for path in cached}
    # It is known, and its content is not there.
    large = next(path for path, content in contents.items() if len(content) > READ_SIZE)
    assert large not in cached
    wanted = reader.find(large)

    def seconds_for_all() -> float:
        began_s = time.perf_counter()
        for one, nodeid in nodeids.items():
            assert reader.read(nodeid, len(cached[one])) == cached[one]
        return time.perf_counter() - began_s

    usual_s = min(seconds_for_all() for _ in range(5))
    with site.stopped():
        ends_s = time.monotonic() + STOP_S
        guest.send(fuse_client.read(wanted, 0, 4096, unique=7), queue=2)
        assert min(seconds_for_all() for _ in range(5)) < 3 * usual_s
        for _ in every_event(max(0.0, ends_s - time.monotonic())):
            seconds_for_all()
    (used,) = guest.rings[2].collect(timeout_s=RECOVERY_S)
    answer = fuse_client.parse_reply(used.data)
    if STOP_S < BUDGET_S:
        assert answer.body == contents[large][:4096]
        assert "ERROR" not in process.log()
    ends_s = time.monotonic() + RECOVERY_S
    while guest.ask(fuse_client.read(wanted, 0, 4096)).error == errno.EIO:
        assert time.monotonic() < ends_s
    reader.walk(contents)
