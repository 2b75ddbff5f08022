"""A guest whose store is far away starts what it did before in half the time, with a profile."""

import os
import random
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

from vmharness.served import TAG, boot_guest

from tests.fakes.appliance_process import ApplianceProcess, import_tree
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.hosts import Network
from tests.fakes.running_command import APPLIANCE
from tests.fakes.slow_link import SlowLink

ANSWER_S: Final = 300.0
DAEMON_PORT: Final = 7000
LINK_PORT: Final = 7001
# 20 ms there and back, 50 Mbit/s.
LINK: Final = {"delay_s": 0.01, "bytes_per_s": 50e6 / 8, "loss": 0.0}
NUM_PATHS: Final = 8
NUM_FILES: Final = 120
# `make debian-profile` boots a whole Debian instead.
NUM_READ: Final = 240
LARGE: Final = 4 << 20


class Start(NamedTuple):
    """How long it took from a guest's boot until its programs had read everything.

    Attributes:
        crossed: the bytes that crossed the link for it.
        digest: of what they have read.
    """

    seconds: float
    crossed: int
    digest: bytes


class Far:
    """A store behind a slow link, with paths of which a guest reads some files."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory = directory
        self.store = f"lmdb://{directory}/store"
        self._script = self._fill()
        self._network = stack.enter_context(Network("store", "a"))
        host = self._network.hosts["store"]
        address, listen = (f"{host.address}:{port}" for port in (DAEMON_PORT, LINK_PORT))
        stack.enter_context(
            DaemonProcess(self.store, directory / "daemon", listen=[address], prefix=host.prefix)
        )
        self._link = stack.enter_context(SlowLink(listen, address, prefix=host.prefix, **LINK))
        self._uri = f"grpc+http://{listen}"

    def _fill(self) -> str:
        # Programs read one path after the other, and the files of each in no order that a walk has;
        # of large ones, they read pages here and there.
        chance = random.Random(1)
        trees = []
        for number in range(NUM_PATHS):
            tree = self._directory / f"path{number}"
            for at in range(NUM_FILES):
                file = tree / f"d{at // 15}" / f"f{at}"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(chance.randbytes(chance.randrange(500, 40_000)))
            (tree / "large").write_bytes(chance.randbytes(LARGE))
            trees.append(tree)
        lines = []
        for name in import_tree(self.store, *trees):
            places = chance.sample(range(NUM_FILES), NUM_READ // NUM_PATHS)
            lines.append(" ".join(["cat", *(f"/mnt/{name}/d{at // 15}/f{at}" for at in places)]))
            place = chance.randrange(LARGE // 4096)
            lines.append(f"dd if=/mnt/{name}/large bs=4096 skip={place} count=16 2>/dev/null")
        return "; ".join(lines)

    def start(self, run: str, *options: str) -> Start:
        """Have a guest read its files, with an empty cache in a state directory called `run`."""
        directory = self._directory / run
        directory.mkdir(exist_ok=True)
        host = self._network.hosts["a"]
        before = self._link.bytes_to(host.address)
        with ApplianceProcess(
            self._uri,
            directory,
            f"--state-dir={self._state(run)}",
            f"--tag={TAG}",
            "--num-request-queues=1",
            *options,
            prefix=host.prefix,
        ) as process:
            began_s = time.monotonic()
            with boot_guest("uml", process.sockets, directory) as guest:
                guest.check(f"mount -t virtiofs -o ro {TAG} /mnt", ANSWER_S)
                digest = guest.check(f"({self._script}) | sha256sum", ANSWER_S)
                seconds = time.monotonic() - began_s
            print(f"{run}: {process.log()}")
        return Start(seconds, self._link.bytes_to(host.address) - before, digest)

    def profile(self, command: str, run: str, words: Sequence[str], data: bytes = b"") -> bytes:
        """Run a command of `appliance profile` on a state directory."""
        store = ["--store", self._uri, "--state-dir", os.fspath(self._state(run))]
        return subprocess.run(
            [*APPLIANCE, "profile", command, *store, *words],
            check=True,
            input=data,
            stdout=subprocess.PIPE,
        ).stdout

    def _state(self, run: str) -> Path:
        return self._directory / run / "state"


def test_a_cold_start_with_a_profile_takes_half_as_long(tmp_path: Path) -> None:
    with ExitStack() as stack:
        far = Far(tmp_path, stack)
        without = far.start("without", "--record-profile=start")
        profile = far.profile("export", "without", ["start"])
        far.profile("import", "with", ["start", "-"], profile)
        with_it = far.start("with", "--profile=start")
    print(f"{without=} {with_it=} load={os.getloadavg()[0]:.1f}")
    assert with_it.digest == without.digest
    assert with_it.crossed < without.crossed
    assert with_it.seconds <= 0.5 * without.seconds
