"""Paths given by a person: the nodes they lead to, and what is shown about them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from appliance.castore.digest import EMPTY_DIGEST
from appliance.castore.directory import (
    Directory,
    DirectoryNode,
    FileNode,
    Node,
    SymlinkNode,
    node_to_message,
)
from appliance.errors import ConfigError, StoreError
from appliance.protos import pathinfo_pb2
from appliance.services.addresses import MemoryAddress, ServiceAddresses
from appliance.services.open_services import open_services
from appliance.services.store_view import StoreView
from tests.contracts.rig import put_closure

T = TypeVar("T")

NAME = "00bgd045z0d4icpbc2yyz4gx48ak44la-net-tools-1.60_p20170221182432"
KEEP_FILE = FileNode(b".keep", EMPTY_DIGEST, 0, executable=False)
WITH_KEEP = Directory(files=[KEEP_FILE])
KEEP = DirectoryNode(b"keep", WITH_KEEP.digest(), 1)
LINK = SymlinkNode(b"aa", b"/nix/store/somewhereelse")
COMPLICATED = Directory([KEEP], [KEEP_FILE], [LINK])
ROOT = DirectoryNode(NAME.encode(), COMPLICATED.digest(), 4)


def view_of_complicated(work: Callable[[StoreView], Awaitable[T]]) -> T:
    async def main() -> T:
        address = MemoryAddress()
        async with open_services(ServiceAddresses(address, address, address)) as services:
            await put_closure(services.directories, WITH_KEEP, COMPLICATED)
            message = pathinfo_pb2.PathInfo(node=node_to_message(ROOT))
            await services.path_infos.put(message.SerializeToString())
            return await work(StoreView(services))

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("below", "node"),
    [
        ("", ROOT),
        ("/", ROOT),
        ("/keep", KEEP),
        ("/keep/", KEEP),
        ("/keep/.keep", KEEP_FILE),
        ("//keep//.keep", KEEP_FILE),
        ("/./keep/./.keep/", KEEP_FILE),
        ("/aa", LINK),
    ],
)
@pytest.mark.parametrize("prefix", ["/nix/store/", ""])
def test_path_leads_to_its_node(prefix: str, below: str, node: Node) -> None:
    assert view_of_complicated(lambda view: view.find(prefix + NAME + below)) == node


@pytest.mark.parametrize("below", ["/void", "//v/oid", "/keep/.keep/foo", "/aa/x", "/keep/..", "r"])
def test_path_that_leads_nowhere_does_not_exist(below: str) -> None:
    with pytest.raises(StoreError):
        view_of_complicated(lambda view: view.find(f"/nix/store/{NAME}{below}"))


@pytest.mark.parametrize(
    "path", ["", "/", "/nix/store/", "/nix/store/foo", "/etc/passwd", "../../etc/passwd", "."]
)
def test_path_that_is_not_in_the_store_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="not a store path"):
        view_of_complicated(lambda view: view.find(path))
