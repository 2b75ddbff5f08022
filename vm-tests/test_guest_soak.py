"""Everything on one store at once, for two minutes: no error, and not one wrong byte.

Two importers, one after another each, a daemon under load, and a guest that reads what was
imported, new paths as they come and the same ones again and again.
"""

import asyncio
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from vmharness import tree
from vmharness.guest import Job
from vmharness.samples import MODES
from vmharness.served import Served, serve
from vmharness.tree import TreeDigest

from appliance.services.addresses import ServiceAddresses, parse_service_uri
from appliance.services.contracts import Services
from appliance.services.open_services import open_services
from tests.contracts.rig import (
    closure,
    fresh_bytes,
    fresh_leaf,
    parent_of,
    put_blob,
    put_closure,
    read_blob,
)
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import APPLIANCE
from tests.store.audit import audit

SECONDS = 120.0
ANSWER_S = 120.0
_SIZES = (0, 500, 65_536, 65_537, 300_000)
_NUM_LOADS = 3
# Read again beside the newest, so that the host's work on comparing is bounded.
_NUM_OLDER = 2
DROP_CACHES = "echo 3 > /proc/sys/vm/drop_caches"


class _Soak:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.end_s = time.monotonic() + SECONDS
        self.imported: dict[str, TreeDigest] = {}
        self.num_calls = 0
        self.num_read = 0
        self._has_imported = asyncio.Event()

    def is_over(self) -> bool:
        return time.monotonic() >= self.end_s

    async def import_trees(self, importer: str) -> None:
        number = 0
        while not self.is_over():
            source = self.directory / f"{importer}-{number}"
            expected = await asyncio.to_thread(_make_tree, source)
            process = await asyncio.create_subprocess_exec(
                *APPLIANCE,
                "import",
                "--store",
                f"lmdb://{self.store}",
                source,
                stdout=asyncio.subprocess.PIPE,
            )
            output, _ = await process.communicate()
            assert process.returncode == 0
            self.imported[Path(output.decode().strip()).name] = expected
            self._has_imported.set()
            await asyncio.to_thread(shutil.rmtree, source)
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

    async def read_in_guest(self, served: Served) -> None:
        await self._has_imported.wait()
        first = next(iter(self.imported))
        again = served.guest.start(f"probe loop-read -d read /mnt/{first} 2")
        while not self.is_over():
            await asyncio.to_thread(self._compare_some, served)
        await asyncio.to_thread(self._check_end, again)
        await asyncio.to_thread(self._compare, served, first)

    def _compare_some(self, served: Served) -> None:
        # The root's listing has grown with the store, and its newest path is there by name.
        names = list(self.imported)
        listed = served.guest.check("ls /mnt", ANSWER_S).decode().split()
        assert not set(names) - set(listed)
        for name in {names[-1], *random.sample(names, min(_NUM_OLDER, len(names)))}:
            self._compare(served, name)

    def _compare(self, served: Served, name: str) -> None:
        script = f"{DROP_CACHES}; probe tree-digest -n {random.choice(MODES)} /mnt/{name} 2"
        found = TreeDigest.parse(served.guest.check(script, ANSWER_S))
        assert found == self.imported[name]
        self.num_read += 1

    def _check_end(self, again: Job) -> None:
        again.close_input()
        status, output = again.wait(ANSWER_S)
        assert status == 0, output  # of two passes that differ the status would be 1
        self.num_read += output.count(b"pass ")


@pytest.mark.slow
def test_importers_daemon_and_guest_share_one_store(tmp_path: Path) -> None:
    soak = _Soak(tmp_path)
    with (
        DaemonProcess(f"lmdb://{soak.store}", tmp_path) as daemon,
        serve("uml", soak.store, tmp_path, "--list-root") as served,
    ):
        served.mount()
        asyncio.run(_run(soak, daemon, served))
        for log in (daemon.log(), served.server.log()):
            assert "ERROR" not in log, log
            assert "Traceback" not in log, log
    audit(soak.store)
    shutil.rmtree(soak.store)  # pytest would keep it for the next two runs
    print(f"{len(soak.imported)} imports, {soak.num_calls} calls, {soak.num_read} trees read")
    assert min(len(soak.imported), soak.num_calls, soak.num_read) > 10


async def _run(soak: _Soak, daemon: DaemonProcess, served: Served) -> None:
    address = parse_service_uri(daemon.unix_uri)
    async with (
        open_services(ServiceAddresses(address, address, address)) as services,
        asyncio.TaskGroup() as group,
    ):
        for importer in ("one", "other"):
            group.create_task(soak.import_trees(importer))
        for _ in range(_NUM_LOADS):
            group.create_task(soak.load(services))
        group.create_task(soak.read_in_guest(served))


def _make_tree(source: Path) -> TreeDigest:
    for number in range(5):
        below = source / f"d{number}"
        below.mkdir(parents=True)
        for index, size in enumerate(_SIZES):
            (below / f"f{index}").write_bytes(os.urandom(size))
        (below / "link").symlink_to("f1")
    return tree.tree_digest(tree.records(source, is_normalised=True))
