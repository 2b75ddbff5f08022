"""A cold boot over a slow link takes half as long if it is known what it reads."""

import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.fakes import fuse_client
from tests.fakes.appliance_process import (
    APPLIANCE,
    DEADLINE_S,
    ApplianceProcess,
    FakeGuest,
    every_event,
    import_tree,
)
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.hosts import Network
from tests.fakes.slow_link import SlowLink

pytestmark = pytest.mark.slow

ROOT: Final = 1
DAEMON_PORT: Final = 7000
LINK_PORT: Final = 7001
# 20 ms there and back, 50 Mbit/s.
LINK: Final = {"delay_s": 0.01, "bytes_per_s": 50e6 / 8, "loss": 0.0}
NUM_PATHS: Final = 12
# Files of each path, and of all, that a boot reads.
NUM_FILES: Final = 120
NUM_READ: Final = int(os.environ.get("TEST_BOOT_READS", "250"))
# What a guest does with what it has read takes time.
THINK_S: Final = 0.004
PAGE: Final = 128 << 10


class File(NamedTuple):
    """A file that a boot reads `length` bytes of, in pieces."""

    path: str
    directory: bytes
    name: bytes
    length: int


class Site:
    """A store host with a daemon, and a slow link in front of it."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.network = stack.enter_context(Network("store", "a"))
        self.directory = directory
        self.store = f"lmdb://{directory}/store"
        host = self.network.hosts["store"]
        address, listen = (f"{host.address}:{port}" for port in (DAEMON_PORT, LINK_PORT))
        stack.enter_context(
            DaemonProcess(
                self.store, directory / "daemon", listen=[address], prefix=host.prefix
            )
        )
        self.link = stack.enter_context(SlowLink(listen, address, prefix=host.prefix, **LINK))
        self.uri = f"grpc+http://{listen}"

    def received(self) -> int:
        return self.link.bytes_to(self.network.hosts["a"].address)

    def appliance(self, state: str, *options: str) -> ApplianceProcess:
        """Return an appliance on host `a`, with a state directory of its own."""
        directory = self.directory / state
        directory.mkdir(exist_ok=True)
        return ApplianceProcess(
            self.uri,
            directory,
            f"--state-dir={directory}/state",
            *options,
            prefix=self.network.hosts["a"].prefix,
        )


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(tmp_path, stack)


def make_boot(site: Site) -> list[File]:
    """Put store paths with many files into the store; return what a boot reads of them."""
    chance = random.Random(1)
    trees = []
    for number in range(NUM_PATHS):
        tree = site.directory / f"path{number}"
        for at in range(NUM_FILES):
            size = 400_000 if at % 40 == 7 else chance.randrange(500, 30_000)
            file = tree / f"d{at // 15}" / f"f{at}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(chance.randbytes(size))
        (tree / "d0" / "large").write_bytes(chance.randbytes(6 << 20))
        trees.append(tree)
    names = import_tree(site.store, *trees)
    files = []
    for name, tree in zip(names, trees, strict=True):
        paths = [path for path in sorted(tree.rglob("*")) if path.is_file()]
        for path in chance.sample(paths, NUM_READ // NUM_PATHS):
            length = min(path.stat().st_size, 300_000)
            files.append(File(name, *(os.fsencode(part) for part in path.parts[-2:]), length))
    # As programs start: one path after the other, and within each no order that a walk has.
    return files


def boot(guest: FakeGuest, files: list[File]) -> float:
    """Read the files as a guest would whose caches are empty; return how long that took."""
    began_s = time.perf_counter()
    guest.mount()
    nodes: dict[tuple[bytes, ...], int] = {(): ROOT}
    for file in files:
        above: tuple[bytes, ...] = ()
        for name in (file.path.encode(), file.directory, file.name):
            below = (*above, name)
            if below not in nodes:
                nodes[below] = guest.lookup(nodes[above], name)
            above = below
        for offset in range(0, file.length, PAGE):
            size = min(PAGE, file.length - offset)
            request = fuse_client.read(nodes[above], offset, size)
            assert len(guest.ask(request, room=PAGE).body) == size
        time.sleep(THINK_S)
    return time.perf_counter() - began_s


def playbacks(process: ApplianceProcess) -> list[dict[str, object]]:
    (supervisor,) = json.loads(process.status_text("--json"))["supervisors"]
    found: list[dict[str, object]] = supervisor["remote"]["playbacks"]
    return found


def test_a_cold_boot_with_a_profile_takes_half_as_long(site: Site) -> None:
    files = make_boot(site)
    with site.appliance("recorded", "--record-profile=boot") as process:
        with FakeGuest(process.connect()) as guest:
            without_s = boot(guest, files)
        without_bytes = site.received()
    exported = subprocess.run(
        [*APPLIANCE, "profile", "export", "boot", "--store", site.uri,
         f"--state-dir={site.directory}/recorded/state"],
        check=True, stdout=subprocess.PIPE,
    ).stdout
    (site.directory / "boot.profile").write_bytes(exported)
    state = f"--state-dir={site.directory}/played/state"
    command = [*APPLIANCE, "profile", "import", "boot", f"{site.directory}/boot.profile"]
    subprocess.run([*command, "--store", site.uri, state], check=True)
    with site.appliance("played", "--profile=boot") as process:
        with FakeGuest(process.connect()) as guest:
            with_s = boot(guest, files)
        with_bytes = site.received() - without_bytes
        print(process.log())
    print(f"{without_s=:.2f} {without_bytes=} {with_s=:.2f} {with_bytes=} load {os.getloadavg()}")
    assert with_s <= 0.5 * without_s
