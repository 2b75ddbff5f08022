"""Whoever publishes into an object store may be killed at any moment: what is visible is whole."""

import asyncio
import itertools
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, FileNode
from appliance.nix.path_info import read_path_info
from appliance.services.addresses import ServiceAddresses, parse_service_uri
from appliance.services.open_services import open_services
from tests.contracts.rig import read_blob
from tests.fakes.running_command import APPLIANCE, DEADLINE_S
from tests.fakes.s3_server import Asked, Fault, FaultyLink, S3Server, faulty_link

pytestmark = pytest.mark.slow

# `make kill-publishers` has more.
MOMENTS: Final = int(os.environ.get("TEST_PUBLISHER_KILLS", "20"))
# No test may take minutes.
MOMENTS_OF_A_PART: Final = 20
_BUCKETS = itertools.count()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("trees") / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "large").write_bytes(os.urandom(1_500_000))
    for number in range(6):
        (tree / "sub" / f"file-{number}").write_bytes(os.urandom(1000 + number))
    return tree


@pytest.fixture
def link(s3: S3Server) -> Iterator[FaultyLink]:
    with faulty_link(s3) as link:
        yield link


class Publisher:
    """An import that is killed at the request `at`: before it is carried out, or before its answer.

    Without `at`, it comes to its end.
    """

    def __init__(self, uri: str, tree: Path, at: int | None = None) -> None:
        self._at = at
        self._process = subprocess.Popen(
            [*APPLIANCE, "import", "--quiet", "--store", uri, str(tree)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait(self) -> int:
        return self._process.wait(DEADLINE_S)

    def kill_at(self, asked: Asked) -> None:
        if asked.number == self._at:
            os.killpg(self._process.pid, signal.SIGKILL)


async def check_is_whole(s3: S3Server, bucket: str) -> int:
    """Read all that is visible; return the number of store paths."""
    address = parse_service_uri(s3.uri(bucket))
    keys = s3.keys(bucket)
    num_paths = 0
    async with open_services(ServiceAddresses(address, address, address)) as services:

        async def check_blob(digest: Digest) -> None:
            assert await services.blobs.has(digest)
            content = await read_blob(services.blobs, digest)
            assert content is not None
            assert Digest.of(content) == digest

        for key in keys:
            kind, _, name = key.partition("/")
            if kind == "blobs":
                await check_blob(digest_of(name))
            elif kind == "dirs":
                async for directory in services.directories.get_recursive(digest_of(name)):
                    for file in directory.files:
                        await check_blob(file.digest)
        async for encoded in services.path_infos.list():
            num_paths += 1
            node = read_path_info(encoded).node
            match node:
                case DirectoryNode():
                    assert await services.directories.get(node.digest) is not None
                case FileNode():
                    await check_blob(node.digest)
    return num_paths


def digest_of(name: str) -> Digest:
    return Digest(bytes.fromhex(name[-64:]))


@pytest.mark.parametrize("part", range(MOMENTS // MOMENTS_OF_A_PART))
def test_whatever_is_visible_is_whole_when_the_publisher_is_killed(
    s3: S3Server, link: FaultyLink, tree: Path, part: int
) -> None:
    bucket = new_bucket(s3)
    assert Publisher(s3.uri(bucket, link.port), tree).wait() == 0
    assert asyncio.run(check_is_whole(s3, bucket)) == 1
    num_requests = len(link.asked)
    # Those of all parts together are spread evenly over the requests.
    for moment in range(part, MOMENTS, MOMENTS // MOMENTS_OF_A_PART):
        bucket = new_bucket(s3)
        link.asked.clear()
        at = moment * num_requests // MOMENTS
        with killing(link, is_before=moment // 2 % 2 == 0) as kill:
            publisher = Publisher(s3.uri(bucket, link.port), tree, at)
            kill.append(publisher)
            assert publisher.wait() == -signal.SIGKILL
        num_visible = asyncio.run(check_is_whole(s3, bucket))
        assert num_visible == 0 or at > 0
        if moment % 5 == 4:
            # The next one goes on from there.
            assert Publisher(s3.uri(bucket), tree).wait() == 0
            assert asyncio.run(check_is_whole(s3, bucket)) == 1


def new_bucket(s3: S3Server) -> str:
    name = f"killed-{next(_BUCKETS)}"
    s3.make_bucket(name)
    return name


@contextmanager
def killing(link: FaultyLink, *, is_before: bool) -> Iterator[list[Publisher]]:
    """Have publishers that are put into the list killed at their requests."""
    publishers: list[Publisher] = []

    def kill(asked: Asked) -> None:
        for publisher in publishers:
            publisher.kill_at(asked)

    def kill_before(asked: Asked) -> Fault | None:
        kill(asked)
        return None

    if is_before:
        link.fault = kill_before
    else:
        link.answered = kill
    try:
        yield publishers
    finally:
        link.fault, link.answered = (lambda _asked: None), (lambda _asked: None)
