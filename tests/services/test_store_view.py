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
from appliance.nix.hashes import NixHash
from appliance.nix.path_info import encode_nar_addressed
from appliance.nix.store_path import StorePath
from appliance.protos import pathinfo_pb2
from appliance.services.addresses import MemoryAddress, ServiceAddresses
from appliance.services.open_services import open_services
from appliance.services.store_view import StoreView, path_info_json
from tests.contracts.rig import put_closure
from tests.nix.test_narinfo import libcxx

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


def known(path: str, nar_hash: str, nar_size: int, *references: str) -> pathinfo_pb2.PathInfo:
    parsed = StorePath.parse(path)
    encoded = encode_nar_addressed(
        parsed, LINK, nar_size=nar_size, nar_sha256=NixHash.parse(nar_hash).digest
    )
    message = pathinfo_pb2.PathInfo.FromString(encoded)
    message.references.extend(StorePath.parse(name).digest for name in references)
    message.narinfo.reference_names.extend(references)
    return message


LIBUNISTRING = "7n0mbqydcipkpbxm24fab066lxk68aqk-libunistring-1.1"
HELLO = "dbghhbq1x39yxgkv3vkgfwbxrmw9nfzi-hello-2.12.1"
GLIBC = "ddwyrxif62r8n6xclvskjyy6szdhvj60-glibc-2.39-5"
LIBGCC = "rxganm4ibf31qngal3j3psp20mak37yy-xgcc-13.2.0-libgcc"
LIBIDN2 = "s32cldbh9pfzd9z82izi12mdlrw0yf8q-libidn2-2.3.7"
# What Nix exports about a closure.
EXPORTED = [
    (
        "sha256:11vm2x1ajhzsrzw7lsyss51mmr3b6yll9wdjn51bh7liwkpc8ila",
        1828984,
        [LIBUNISTRING, LIBUNISTRING],
    ),
    (
        "sha256:0alzbhjxdcsmr1pk7z0bdh46r2xpq3xs3k9y82bi4bx5pklcvw5x",
        226560,
        [HELLO, HELLO, GLIBC],
    ),
    (
        "sha256:1zw5p05fh0k836ybfxkskv8apcv2m3pm2wa6y90wqn5w5kjyj13c",
        30119936,
        [GLIBC, GLIBC, LIBGCC, LIBIDN2],
    ),
    ("sha256:10q8iyvfmpfck3yiisnj1j8vp6lq3km17r26sr95zpdf9mgmk69s", 159560, [LIBGCC]),
    (
        "sha256:1cv997nzxbd91jhmzwnhxa1ahlzp5ffli8m4a5npcq8zg0vb1kwg",
        361136,
        [LIBIDN2, LIBUNISTRING, LIBIDN2],
    ),
]


@pytest.mark.parametrize(("nar_hash", "nar_size", "names"), EXPORTED)
def test_path_is_shown_with_the_values_that_nix_exports(
    nar_hash: str, nar_size: int, names: list[str]
) -> None:
    shown = path_info_json(known(names[0], nar_hash, nar_size, *names[1:]))

    assert str(NixHash.parse(str(shown["narHash"]))) == nar_hash
    assert shown["narSize"] == nar_size
    assert shown["references"] == [f"/nix/store/{name}" for name in names[1:]]


def test_path_is_shown_as_nix_shows_it() -> None:
    assert path_info_json(libcxx()) == {
        "ca": None,
        "deriver": "/nix/store/vs9976cyyxpykvdnlv7x85fpp3shn6ij-libcxx-16.0.6.drv",
        "narHash": "sha256-E73Nt0NAKGxCnsyBFDUaCAbA+wiF5qjq1O9J7WrnT0E=",
        "narSize": 7020664,
        "references": ["/nix/store/lzzd5jgybnpfj86xkcpnd54xgwc4m457-libcxx-16.0.6"],
        "signatures": [
            "cache.nixos.org-1:cTdhK6hnpPwtMXFX43CYb7v+CbpAusVI/MORZ3v5aHvpBYNg1MfBHVVeoexMBpNt"
            "HA8uFAn0aEsJaLXYIDhJDg=="
        ],
    }


def test_unknown_digest_of_a_nar_is_none() -> None:
    assert path_info_json(pathinfo_pb2.PathInfo())["narHash"] is None
