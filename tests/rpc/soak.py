"""Everything on one store at once: `python -m tests.rpc.soak [SECONDS]`.

Two importers, one after another each, a daemon under load, and a guest reading what was imported
over a virtqueue. Every byte that comes back is compared.
"""

import asyncio
import os
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from appliance.rpc.open_services import open_services
from appliance.store.service_uri import ServiceAddresses, parse_service_uri
from appliance.store.services import Services
from tests.contracts.rig import (
    closure,
    fresh_bytes,
    fresh_leaf,
    parent_of,
    put_blob,
    put_closure,
    read_blob,
)
from tests.fakes import fuse_client
from tests.fakes.appliance_process import APPLIANCE, ApplianceProcess, FakeGuest
from tests.fakes.daemon_process import DaemonProcess
from tests.store.audit import audit

ROOT = fuse_client.ROOT
_SIZES = (0, 500, 65_536, 65_537, 900_000)
_READ_SIZE = 1 << 17
_NUM_LOADS = 3


class Totals(NamedTuple):
    """How much was done without an error."""

    imports: int
    calls: int
    guest_files: int


class _Soak:
    def __init__(self, directory: Path, seconds: float) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.end_s = time.monotonic() + seconds
        self.imported: list[tuple[bytes, Path]] = []
        self.num_calls = 0
        self.num_guest_files = 0

    def is_over(self) -> bool:
        return time.monotonic() >= self.end_s

    async def import_trees(self, name: str) -> None:
        number = 0
        while not self.is_over():
            tree = self.directory / f"{name}-{number}"
            await asyncio.to_thread(_make_tree, tree)
            process = await asyncio.create_subprocess_exec(
                *APPLIANCE,
                "import",
                "--store",
                f"lmdb://{self.store}",
                tree,
                stdout=asyncio.subprocess.PIPE,
            )
            output, _ = await process.communicate()
            assert process.returncode == 0
            self.imported.append((Path(output.decode().strip()).name.encode(), tree))
            number += 1

    async def load(self, services: Services) -> None:
        while not self.is_over():
            content = fresh_bytes(random.choice(_SIZES))
            digest = await put_blob(services.blobs, content)
            assert await read_blob(services.blobs, digest) == content
            leaf = fresh_leaf()
            top = parent_of(leaf)
            await put_closure(services.directories, leaf, top)
            assert await closure(services.directories, top.digest()) == [top, leaf]
            self.num_calls += 4

    def read_as_guest(self, guest: FakeGuest) -> None:
        guest.mount()
        while not self.is_over():
            for name, tree in self.imported[-5:]:
                root = guest.lookup(ROOT, name)
                for path in sorted(tree.rglob("f*")):
                    nodeid = guest.lookup(
                        guest.lookup(root, path.parent.name.encode()), b"%s" % (path.name.encode())
                    )
                    assert _read(guest, nodeid) == path.read_bytes()
                    self.num_guest_files += 1


def soak(directory: Path, seconds: float) -> Totals:
    """Run everything for so long; raise at the first error or wrong byte."""
    state = _Soak(directory, seconds)
    store = f"lmdb://{state.store}"
    with ExitStack() as stack:
        daemon = stack.enter_context(DaemonProcess(store, directory))
        server = stack.enter_context(ApplianceProcess(state.store, directory))
        guest = stack.enter_context(FakeGuest(server.connect()))
        asyncio.run(_run(state, daemon, guest))
        for log in (daemon.log(), server.log()):
            assert "ERROR" not in log, log
            assert "Traceback" not in log, log
    audit(state.store)
    return Totals(len(state.imported), state.num_calls, state.num_guest_files)


async def _run(state: _Soak, daemon: DaemonProcess, guest: FakeGuest) -> None:
    address = parse_service_uri(daemon.unix_uri)
    async with (
        open_services(ServiceAddresses(address, address, address)) as services,
        asyncio.TaskGroup() as group,
    ):
        for name in ("one", "other"):
            group.create_task(state.import_trees(name))
        for _ in range(_NUM_LOADS):
            group.create_task(state.load(services))
        group.create_task(asyncio.to_thread(state.read_as_guest, guest))


def _read(guest: FakeGuest, nodeid: int) -> bytes:
    parts: list[bytes] = []
    offset = 0
    while part := guest.ask(fuse_client.read(nodeid, offset, _READ_SIZE), room=_READ_SIZE).body:
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _make_tree(tree: Path) -> None:
    for number in range(5):
        below = tree / f"d{number}"
        below.mkdir(parents=True)
        for index, size in enumerate(_SIZES):
            (below / f"f{index}").write_bytes(os.urandom(size))


if __name__ == "__main__":
    _seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 120.0
    with tempfile.TemporaryDirectory() as _directory:
        print(f"{_seconds:.0f} s without an error: {soak(Path(_directory), _seconds)}")
