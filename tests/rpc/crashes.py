"""Killing a daemon and importers at random moments: `python -m tests.rpc.crashes [MOMENTS]`."""

import asyncio
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from appliance.castore.nodes import Directory, DirectoryNode, FileNode
from appliance.castore.path_info import encode_nar_addressed
from appliance.castore.store_path import nar_path
from appliance.errors import ApplianceError
from appliance.rpc.open_services import open_services
from appliance.store.service_uri import ServiceAddresses, parse_service_uri
from appliance.store.services import Services
from tests.contracts.rig import fresh_bytes, put_blob, put_closure
from tests.fakes.appliance_process import APPLIANCE
from tests.fakes.daemon_process import DaemonProcess
from tests.store.audit import audit

# A store is used for so many moments: what one leaves behind, the next may trip over.
_MOMENTS_PER_STORE = 10
_WINDOW_S = 0.6
_FILE_SIZES = (0, 100, 4096, 65_537, 300_000, 3_000_000)


def kill_daemons(directory: Path, num_moments: int, seed: int) -> int:
    """Kill a daemon under load so often; return how many objects were looked at."""
    moments = random.Random(seed)
    num_objects = 0
    for number in range(num_moments):
        store = directory / f"store-{number // _MOMENTS_PER_STORE}"
        with DaemonProcess(f"lmdb://{store}", directory) as daemon:
            asyncio.run(_load_until_killed(daemon, moments.uniform(0, _WINDOW_S)))
        num_objects += _num_objects(store)
    return num_objects


def kill_importers(directory: Path, num_moments: int, seed: int) -> int:
    """Kill an import so often, and run it again; return how many objects were looked at."""
    moments = random.Random(seed)
    tree = directory / "tree"
    _make_tree(tree, moments)
    started_s = time.monotonic()
    expected = _import(directory / "whole", tree)
    duration_s = time.monotonic() - started_s
    num_objects = 0
    for number in range(num_moments):
        store = directory / f"import-{number // _MOMENTS_PER_STORE}-{number % 2}"
        process = subprocess.Popen(
            [*APPLIANCE, "import", "--store", f"lmdb://{store}", str(tree)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            process.communicate(timeout=moments.uniform(0, duration_s))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        if (store / "data.mdb").exists():
            num_objects += _num_objects(store)
        if number % _MOMENTS_PER_STORE >= _MOMENTS_PER_STORE - 2:
            assert _import(store, tree) == expected
            num_objects += _num_objects(store)
    return num_objects


def _num_objects(store: Path) -> int:
    found = audit(store)
    return found.num_blobs + found.num_directories + len(found.path_infos)


async def _load_until_killed(daemon: DaemonProcess, moment_s: float) -> None:
    address = parse_service_uri(daemon.unix_uri)
    async with open_services(ServiceAddresses(address, address, address)) as services:
        load = [asyncio.create_task(_load(services)) for _ in range(4)]
        await asyncio.sleep(moment_s)
        daemon.kill()
        for outcome in await asyncio.gather(*load, return_exceptions=True):
            assert isinstance(outcome, ApplianceError), outcome


async def _load(services: Services) -> None:
    # What is acknowledged before something that refers to it is put has to be there.
    while True:
        files = []
        for index, size in enumerate(_FILE_SIZES):
            content = fresh_bytes(size)
            digest = await put_blob(services.blobs, content)
            files.append(FileNode(b"%d" % index, digest, len(content), executable=False))
        leaf = Directory(files=files)
        top = Directory([DirectoryNode(b"leaf", leaf.digest(), leaf.size())])
        root = await put_closure(services.directories, leaf, top)
        path = nar_path(hashlib.sha256(root).digest(), "crash")
        node = DirectoryNode(b"", root, top.size())
        await services.path_infos.put(
            encode_nar_addressed(path, node, nar_size=1, nar_sha256=bytes(32))
        )


def _make_tree(tree: Path, content: random.Random) -> None:
    for number in range(40):
        directory = tree / f"d{number % 7}" / f"e{number}"
        directory.mkdir(parents=True)
        for index, size in enumerate(_FILE_SIZES[:5]):
            (directory / f"f{index}").write_bytes(content.randbytes(size))
    (tree / "large").write_bytes(content.randbytes(20_000_000))


def _import(store: Path, tree: Path) -> str:
    done = subprocess.run(
        [*APPLIANCE, "import", "--store", f"lmdb://{store}", str(tree)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    return done.stdout


if __name__ == "__main__":
    _moments = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    for _kill in (kill_daemons, kill_importers):
        with tempfile.TemporaryDirectory() as _directory:
            _seed = random.SystemRandom().getrandbits(32)
            _num = _kill(Path(_directory), _moments, _seed)
            print(f"{_kill.__name__}: {_moments} moments, {_num} objects right, seed {_seed}")
