"""Killing a daemon and importers at random moments: `python -m tests.rpc.crashes [MOMENTS]`."""

import asyncio
import hashlib
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from appliance.castore.directory import Directory, DirectoryNode, FileNode
from appliance.errors import ApplianceError
from appliance.nix.path_info import encode_nar_addressed
from appliance.nix.store_path import nar_path
from appliance.services.addresses import ServiceAddresses, parse_service_uri
from appliance.services.contracts import Services
from appliance.services.open_services import open_services
from tests.contracts.rig import fresh_bytes, put_blob, put_closure
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.prepared_commands import Command, Ended, PreparedCommands
from tests.store.audit import audit

# A store is killed this many times, so that each kill meets what the last one left behind.
_MOMENTS_PER_STORE = 10
_WINDOW_S = 0.6
_FILE_SIZES = (0, 100, 4096, 65_537, 300_000)
_LARGE_SIZE = 3_000_000


class Killed(NamedTuple):
    """How often something was killed at its work, and how many objects were looked at since."""

    num_killed: int
    num_objects: int


def kill_daemons(directory: Path, num_moments: int, seed: int) -> Killed:
    """Kill a daemon under load so often."""
    moments = random.Random(seed)
    num_objects = 0
    for number in range(num_moments):
        store = directory / f"store-{number // _MOMENTS_PER_STORE}"
        with DaemonProcess(f"lmdb://{store}", directory) as daemon:
            asyncio.run(_load_until_killed(daemon, moments.uniform(0, _WINDOW_S)))
        num_objects += _num_objects(store)
    return Killed(num_moments, num_objects)


def kill_importers(directory: Path, num_moments: int, seed: int) -> Killed:
    """Kill an import so often, and run it again each time."""
    moments = random.Random(seed)
    num_killed = num_objects = 0
    with PreparedCommands() as commands:
        imports = _Imports(commands, directory, moments)
        for number in range(num_moments):
            store = directory / f"import-{number // _MOMENTS_PER_STORE}"
            uri = f"lmdb://{store}"
            command = imports.start(uri, number)
            num_killed += command.is_running(imports.moment_s())
            command.kill()
            if (store / "data.mdb").exists():
                num_objects += _num_objects(store)
            imports.repeat(uri, number)
            num_objects += _num_objects(store)
    return Killed(num_killed, num_objects)


def kill_daemons_of_importers(directory: Path, num_moments: int, seed: int) -> Killed:
    """Kill a daemon under an importer so often, start it, and run the import again in the end."""
    moments = random.Random(seed)
    num_killed = num_objects = 0
    with PreparedCommands() as commands:
        imports = _Imports(commands, directory, moments)
        for first in range(0, num_moments, _MOMENTS_PER_STORE):
            store = directory / f"served-{first}"
            daemon = _PreparedDaemon(commands, store, directory)
            for number in range(first, min(first + _MOMENTS_PER_STORE, num_moments)):
                command = imports.start(daemon.uri, number)
                num_killed += command.is_running(imports.moment_s())
                daemon.kill()
                num_objects += _num_objects(store, is_readonly=True)
                left = set((store / "tmp").glob("*"))
                daemon = _PreparedDaemon(commands, store, directory)
                assert not left.intersection((store / "tmp").glob("*"))
                imports.check_end(command, daemon.uri, number)
                imports.repeat(daemon.uri, number)
            daemon.kill()
            num_objects += _num_objects(store)
    return Killed(num_killed, num_objects)


class _Imports:
    """Imports of one of a few small trees, whose store paths are known."""

    def __init__(self, commands: PreparedCommands, directory: Path, content: random.Random) -> None:
        self._commands = commands
        self._temp = directory / "staging"
        self._temp.mkdir()
        self._moments = content
        self._trees = [directory / f"tree-{number}" for number in range(_MOMENTS_PER_STORE)]
        for tree in self._trees:
            _make_tree(tree, content)
        self._expected: list[str] = []
        started_s = time.monotonic()
        for tree in self._trees:
            done = commands.run("import", "--store", f"lmdb://{directory}/whole", tree, temp=tree)
            assert done.status == 0, done.errors
            self._expected.append(done.output)
        self._duration_s = (time.monotonic() - started_s) / len(self._trees)

    def moment_s(self) -> float:
        """Return a time that an import is likely to last: as long as the last one that ended."""
        return self._moments.uniform(0, self._duration_s)

    def start(self, uri: str, number: int) -> Command:
        tree = self._trees[number % len(self._trees)]
        return self._commands.start("import", "--store", uri, tree, temp=self._temp)

    def repeat(self, uri: str, number: int) -> None:
        """Import to the end, which succeeds."""
        started_s = time.monotonic()
        done = self.start(uri, number).wait()
        self._duration_s = time.monotonic() - started_s
        assert done == Ended(0, self._expected[number % len(self._trees)], "")
        staged = [path for path in self._temp.glob("*/*/*") if path.exists()]
        assert staged == []

    def check_end(self, command: Command, uri: str, number: int) -> None:
        """Wait for an import whose daemon was killed, and started again.

        It goes on with the next daemon. Only if the first one was killed before it had answered
        anything, the import says that it is away.
        """
        done = command.wait()
        if done == Ended(0, self._expected[number % len(self._trees)], ""):
            return
        socket_path = uri.removeprefix("grpc+unix://")
        assert (done.status, done.output) == (1, ""), done
        assert done.errors.startswith(f"appliance: unix:{socket_path}: "), done
        assert done.errors.count("\n") == 1, done


class _PreparedDaemon:
    """A daemon on a store, up when the constructor returns."""

    def __init__(self, commands: PreparedCommands, store: Path, directory: Path) -> None:
        address = directory / "daemon.sock"
        self.uri = f"grpc+unix://{address}"
        self._command = commands.start(
            "daemon", "--store", f"lmdb://{store}", "--listen-address", address, temp=directory
        )
        said = b""
        while b"READY" not in said:
            more = os.read(self._command.errors, 4096)
            assert more, said
            said += more

    def kill(self) -> None:
        self._command.kill()


def _num_objects(store: Path, *, is_readonly: bool = False) -> int:
    found = audit(store, is_readonly=is_readonly)
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
        for index, size in enumerate((*_FILE_SIZES, _LARGE_SIZE)):
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
    for number in range(4):
        directory = tree / f"d{number % 2}" / f"e{number}"
        directory.mkdir(parents=True)
        for index, size in enumerate(_FILE_SIZES):
            (directory / f"f{index}").write_bytes(content.randbytes(size))


if __name__ == "__main__":
    _moments = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    for _kill in (kill_daemons, kill_daemons_of_importers, kill_importers):
        with tempfile.TemporaryDirectory() as _directory:
            _seed = random.SystemRandom().getrandbits(32)
            _killed = _kill(Path(_directory), _moments, _seed)
            print(f"{_kill.__name__}: {_moments} moments, {_killed}, seed {_seed}")
