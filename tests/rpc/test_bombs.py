"""Trees that a few directories make endless: told at once, and what is in them is checked."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node, node_to_message
from appliance.errors import StoreError
from appliance.nix.store_path import StorePath
from appliance.protos import pathinfo_pb2
from appliance.services.contracts import Services
from appliance.services.nar_extent import BYTES_MAX, ENTRIES_MAX, extent_of
from tests.contracts.rig import Rig, parent_of, put_blob, put_closure
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import APPLIANCE

pytestmark = pytest.mark.slow

CONTENT = b"content"
LEVELS = 60
DEADLINE_S = 30


class Bombs(NamedTuple):
    uri: str
    # Endless by its directories, and by the size of what it has a few million times.
    wide: str
    heavy: str
    deep: str


def bomb(leaf: Directory, levels: int) -> list[Directory]:
    directories = [leaf]
    for _ in range(levels):
        directories.append(parent_of(directories[-1], directories[-1]))
    return directories


def chain(levels: int) -> list[Directory]:
    directories = [Directory()]
    for _ in range(levels):
        directories.append(parent_of(directories[-1]))
    return directories


async def put_path(services: Services, name: str, node: Node) -> str:
    path = StorePath(name.ljust(20).encode(), name)
    named = node._replace(name=path.basename().encode())
    message = pathinfo_pb2.PathInfo(node=node_to_message(named))
    await services.path_infos.put(message.SerializeToString())
    return path.absolute()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bombs]:
    directory = tmp_path_factory.mktemp("bombs")
    uri = f"lmdb://{directory}/store"

    async def work(services: Services) -> Bombs:
        digest = await put_blob(services.blobs, CONTENT)
        file = FileNode(b"file", digest, len(CONTENT), executable=False)
        huge = FileNode(b"huge", Digest.of(b"huge"), BYTES_MAX >> 19, executable=False)
        paths = []
        for name, directories in (
            ("wide", bomb(Directory(files=[file]), LEVELS)),
            ("heavy", bomb(Directory(files=[file, huge]), 20)),
            ("deep", chain(1000)),
        ):
            root = await put_closure(services.directories, *directories)
            node = DirectoryNode(b"", root, directories[-1].size())
            paths.append(await put_path(services, name, node))
        return Bombs(uri, *paths)

    return directory, Rig(uri).run(work)


@pytest.fixture(params=["lmdb", "grpc"])
def bombs(
    request: pytest.FixtureRequest, stored: tuple[Path, Bombs], tmp_path: Path
) -> Iterator[Bombs]:
    _directory, found = stored
    if request.param == "lmdb":
        yield found
    else:
        with DaemonProcess(found.uri, tmp_path / "daemon") as daemon:
            yield found._replace(uri=daemon.unix_uri)


def run(*arguments: str, status: int) -> "subprocess.CompletedProcess[bytes]":
    done = subprocess.run(
        [*APPLIANCE, *arguments], capture_output=True, check=False, timeout=DEADLINE_S
    )
    assert done.returncode == status, done.stderr[-1000:]
    return done


NUM_WIDE = (1 << (LEVELS + 1)) - 2 + (1 << LEVELS)


@pytest.mark.parametrize(
    "words", [["nar"], ["ls", "-R"], ["ls", "-lR"], ["ls", "-R", "--json"], ["verify"]]
)
def test_commands_on_an_endless_tree_say_so_at_once(bombs: Bombs, words: list[str]) -> None:
    done = run(*words, "--store", bombs.uri, bombs.wide, status=1)
    told = done.stderr.splitlines()
    assert len(told) == (2 if words == ["verify"] else 1)
    assert b"%d entries" % NUM_WIDE in told[0]
    assert done.stdout == b""


@pytest.mark.parametrize("command", ["nar", "verify"])
def test_too_many_bytes_are_said_at_once(bombs: Bombs, command: str) -> None:
    done = run(command, "--store", bombs.uri, bombs.heavy, status=1)
    assert b"has a NAR of " in done.stderr


def test_what_can_be_done_of_an_endless_tree_is(bombs: Bombs) -> None:
    assert run("ls", "--store", bombs.uri, bombs.wide, status=0).stdout == b"./a\n./b\n"
    below = "/".join("ab" * (LEVELS // 2))
    path = f"{bombs.wide}/{below}/file"
    assert run("cat", "--store", bombs.uri, path, status=0).stdout == CONTENT


def test_contents_of_an_endless_tree_are_checked_once_each(bombs: Bombs) -> None:
    done = run("verify", "--store", bombs.uri, bombs.wide, "--json", status=1)
    assert json.loads(done.stdout)["bytes"] == len(CONTENT)
    done = run("verify", "--store", bombs.uri, bombs.heavy, status=1)
    (line,) = [line for line in done.stderr.splitlines() if b"blob" in line]
    assert Digest.of(b"huge").hex().encode() in line


def test_nar_of_an_endless_tree_is_not_calculated(bombs: Bombs) -> None:
    root = bomb(Directory(), LEVELS)

    async def work(services: Services) -> None:
        digest = await put_closure(services.directories, *root)
        with pytest.raises(Exception, match=f"the limit is {ENTRIES_MAX}"):
            await services.path_infos.calculate_nar(DirectoryNode(b"", digest, root[-1].size()))

    Rig(bombs.uri).run(work)


def test_depth_is_no_bomb_but_json_nests_no_deeper_than_it_is_read(bombs: Bombs) -> None:
    options = ["--store", bombs.uri, bombs.deep]
    lines = run("ls", "-R", *options, status=0).stdout.splitlines()
    assert len(lines) == 1000
    assert run("nar", *options, status=0).stdout.count(b"directory") == 1001
    run("verify", *options, status=0)
    done = run("ls", "-R", "--json", *options, status=1)
    assert done.stderr == b"appliance: tree is more than 400 directories deep\n"


def test_extent_of_what_is_not_all_there_is_not_known(stored: tuple[Path, Bombs]) -> None:
    _directory, bombs = stored
    missing = parent_of(Directory(files=[FileNode(b"x", Digest(bytes(32)), 0, executable=False)]))

    async def work(services: Services) -> None:
        node = DirectoryNode(b"", missing.digest(), missing.size())
        assert await extent_of(node, services.directories) is None
        with pytest.raises(StoreError):
            await services.path_infos.calculate_nar(node)

    Rig(bombs.uri).run(work)
