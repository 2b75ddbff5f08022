"""Four imports and two collectors at once, as real processes that are killed at random moments.

`make soak-gc` runs it for long: APPLIANCE_SOAK_ROUNDS is the number of rounds.
"""

import os
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from appliance.nix.store_path import StorePath
from appliance.store import schema
from appliance.store.root_lists import RootLists
from appliance.store.store import Store
from tests.collector.stored_trees import files_of, keys_of
from tests.fakes.prepared_commands import Command, PreparedCommands
from tests.fakes.running_command import DEADLINE_S, every_event
from tests.store.audit import audit

pytestmark = pytest.mark.slow

ROUNDS = int(os.environ.get("APPLIANCE_SOAK_ROUNDS", "4"))
NUM_TREES = 8
NUM_IMPORTS = 4
NUM_COLLECTORS = 2
NUM_FILES = 200
# How many of the commands are killed, if they last until their moment comes.
KILLED_SHARE = 0.7
TABLES = (
    schema.BLOBS,
    schema.CHUNKS,
    schema.CHUNK_PLACES,
    schema.DIRECTORIES,
    schema.IMAGES,
    schema.PATH_INFOS,
    schema.PATH_TIMES,
)


class Contents(NamedTuple):
    """What a store has: keys by table, digests of files, and PathInfos by digest of the path."""

    keys: dict[bytes, set[bytes]]
    files: set[bytes]
    path_infos: dict[bytes, bytes]


class Source(NamedTuple):
    """A tree, its store path, and what a store has that has nothing else."""

    tree: Path
    path: StorePath
    contents: Contents


@dataclass(slots=True)
class Running:
    """A command, what it imports (None: it collects), and when it is killed, if it is."""

    command: Command
    source: Source | None
    killed_at_s: float | None

    def is_over(self) -> bool:
        return not self.command.is_running(0)

    def is_due(self) -> bool:
        return self.killed_at_s is not None and time.monotonic() >= self.killed_at_s


def contents_of(path: Path) -> Contents:
    store = Store.open(path)
    try:
        keys = {table: set(keys_of(store, table)) for table in TABLES}
        with store.snapshot() as snapshot:
            return Contents(keys, files_of(path), dict(snapshot.path_infos()))
    finally:
        store.close()


def union(all_contents: list[Contents]) -> Contents:
    keys = {
        table: {key for contents in all_contents for key in contents.keys[table]}
        for table in TABLES
    }
    files = {digest for contents in all_contents for digest in contents.files}
    return Contents(keys, files, {k: v for one in all_contents for k, v in one.path_infos.items()})


def make_tree(tree: Path, number: int) -> Path:
    """Make a tree of which half is in other trees, too; with files of every size that matters."""
    for at in range(NUM_FILES):
        file = tree / f"d{at % 7}" / f"f{at}"
        file.parent.mkdir(parents=True, exist_ok=True)
        chance = random.Random(at if at % 2 else at * 100 + number)
        file.write_bytes(chance.randbytes(chance.randrange(6000)))
    for size in (70_000, 2_500_000):
        (tree / f"shared{size}").write_bytes(random.Random(size).randbytes(size))
        (tree / f"own{size}").write_bytes(random.Random(size + number).randbytes(size))
    return tree


class Processes:
    """The store and the commands that work on it."""

    def __init__(self, commands: PreparedCommands, directory: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.store = directory / "store"
        self._commands = commands
        self._temp = directory
        self.sources = [self._source(directory, number) for number in range(NUM_TREES)]
        Store.open(self.store, create=True).close()
        began_s = time.monotonic()
        self.collect()
        # How long a command may last when there are as many of them as there will be.
        self._window_s = 2 * (time.monotonic() - began_s) * (NUM_IMPORTS + NUM_COLLECTORS)
        self.num_killed = 0

    def _source(self, directory: Path, number: int) -> Source:
        tree = make_tree(directory / f"tree{number}", number)
        alone = directory / f"alone{number}"
        done = self._commands.run("import", "--store", f"lmdb://{alone}", tree, temp=self._temp)
        assert done.status == 0, done.errors
        return Source(tree, StorePath.parse_absolute(done.output.strip()), contents_of(alone))

    def collect(self) -> None:
        done = self._collector().wait()
        assert done.status == 0, done.errors

    def run_round(self, sources: list[Source]) -> list[Source]:
        """Import `sources`, collect meanwhile, kill some; return what was imported to the end."""
        active = [self._fated(self._import(source), source) for source in sources]
        finished: list[Source] = []
        for _ in every_event(2 * DEADLINE_S):
            for running in list(active):
                if running.is_over() or running.is_due():
                    active.remove(running)
                    finished += self._end(running)
            if not active:
                return finished
            if any(running.source is not None for running in active):
                num_collectors = sum(running.source is None for running in active)
                active += [
                    self._fated(self._collector(), None)
                    for _ in range(NUM_COLLECTORS - num_collectors)
                ]
        raise AssertionError("imports or collectors do not end")

    def _end(self, running: Running) -> list[Source]:
        if not running.is_over():
            running.command.kill()
            self.num_killed += 1
            return []
        done = running.command.wait()
        assert done.status == 0, done.errors
        if running.source is None:
            return []
        assert done.output == f"{running.source.path.absolute()}\n"
        return [running.source]

    def _import(self, source: Source) -> Command:
        uri = f"lmdb://{self.store}"
        return self._commands.start("import", "--store", uri, source.tree, temp=self._temp)

    def _collector(self) -> Command:
        uri = f"lmdb://{self.store}"
        return self._commands.start("gc", "--store", uri, "--grace", "0", temp=self._temp)

    def _fated(self, command: Command, source: Source | None) -> Running:
        killed_at_s = None
        if self.chance.random() < KILLED_SHARE:
            killed_at_s = time.monotonic() + self.chance.uniform(0, self._window_s)
        return Running(command, source, killed_at_s)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory where syncs cost nothing: no power cut is tested."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def test_what_is_rooted_stays_whole_and_the_rest_goes_whoever_is_killed(memory: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    with PreparedCommands() as commands:
        processes = Processes(commands, memory, seed)
        chance, sources = processes.chance, processes.sources
        roots = RootLists(processes.store)
        rooted: list[Source] = []
        present: set[bytes] = set()
        for _ in range(ROUNDS):
            if rooted:
                roots.remove("kept")
            rooted = chance.sample(sources, NUM_TREES // 2)
            roots.add("kept", [source.path for source in rooted])
            imported = processes.run_round(chance.sample(sources, NUM_IMPORTS))
            audit(processes.store)
            found = contents_of(processes.store)
            known = {source.path.digest: source for source in sources}
            for digest, path_info in found.path_infos.items():
                assert path_info == known[digest].contents.path_infos[digest]
            must_stay = present | {source.path.digest for source in imported}
            kept = [source for source in rooted if source.path.digest in found.path_infos]
            assert must_stay & {source.path.digest for source in rooted} <= {
                source.path.digest for source in kept
            }
            processes.collect()
            assert contents_of(processes.store) == union([source.contents for source in kept])
            present = {source.path.digest for source in kept}
        assert processes.num_killed
