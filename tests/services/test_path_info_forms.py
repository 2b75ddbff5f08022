"""PathInfos in JSON: the values and the forms of Nix."""

import json

import pytest

from appliance.castore.directory import SymlinkNode
from appliance.copier.path_info_json import parse_path_infos
from appliance.nix.hashes import NixHash
from appliance.nix.narinfo import narinfo_of
from appliance.nix.path_info import encode_nar_addressed, read_path_info
from appliance.nix.store_path import StorePath
from appliance.protos import pathinfo_pb2
from appliance.services.path_info_forms import FORMATS, path_info_v1, path_infos_json
from tests.nix.test_narinfo import libcxx

LINK = SymlinkNode(b"aa", b"/nix/store/somewhereelse")


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
    shown = path_info_v1(known(names[0], nar_hash, nar_size, *names[1:]))

    assert str(NixHash.parse(str(shown["narHash"]))) == nar_hash
    assert shown["narSize"] == nar_size
    assert shown["references"] == [f"/nix/store/{name}" for name in names[1:]]


def test_path_is_shown_as_nix_shows_it() -> None:
    assert path_info_v1(libcxx()) == {
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
    assert path_info_v1(pathinfo_pb2.PathInfo())["narHash"] is None


def libcxx_path() -> StorePath:
    return read_path_info(libcxx().SerializeToString()).path


def test_form_2_has_base_names_and_a_structured_address() -> None:
    addressed = known(HELLO, EXPORTED[1][0], 226560, HELLO, GLIBC)
    path = StorePath.parse(HELLO)
    absent = StorePath(bytes(20), "absent")
    sri = NixHash.parse(EXPORTED[1][0]).sri()
    assert path_infos_json({path: addressed, absent: None}, {path: 30_000_000}, "2") == {
        "version": 2,
        "storeDir": "/nix/store",
        "info": {
            HELLO: {
                "ca": {"method": "nar", "hash": sri},
                "closureSize": 30_000_000,
                "deriver": None,
                "narHash": sri,
                "narSize": 226560,
                "references": [HELLO, GLIBC],
                "signatures": [],
                "storeDir": "/nix/store",
                "version": 2,
            },
            absent.basename(): None,
        },
    }


def test_the_list_leaves_out_what_is_empty() -> None:
    path = libcxx_path()
    absent = StorePath(bytes(20), "absent")
    shown = path_infos_json({path: libcxx(), absent: None}, None, "list")
    whole = path_info_v1(libcxx())
    del whole["ca"]
    assert shown == [
        {"path": path.absolute(), **whole},
        {"path": absent.absolute(), "valid": False},
    ]


@pytest.mark.parametrize("form", FORMATS)
def test_every_form_is_read_again(form: str) -> None:
    path = libcxx_path()
    claim = parse_path_infos(json.dumps(path_infos_json({path: libcxx()}, None, form)))[path]
    expected = narinfo_of(libcxx())
    assert claim == expected._replace(url=claim.url, file_hash=None, file_size=None)
