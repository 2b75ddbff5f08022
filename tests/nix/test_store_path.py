"""Store paths: grammar and computation."""

import hashlib

import pytest

from appliance.nix import store_path
from appliance.nix.store_path import StorePath, StorePathError
from tests.refusal import refused

DUMMY = "0" * 32 + "-dummy"
FOO = StorePath.parse("vxjiwkjkn7x4079qvh1jkl5pn05j2aw0-foo")


def test_base_name_is_read_and_written() -> None:
    path = StorePath.parse("00bgd045z0d4icpbc2yyz4gx48ak44la-net-tools-1.60_p20170221182432")
    assert path.digest.hex() == "8a12321522fd91efbd60ebb2481af88580f61600"
    assert path.name == "net-tools-1.60_p20170221182432"
    assert StorePath.parse(path.basename()) == path
    assert StorePath.parse_absolute(path.absolute()) == path
    assert StorePath.parse(DUMMY) == (bytes(20), "dummy")
    assert StorePath.parse(DUMMY.encode()) == StorePath.parse(DUMMY)


@pytest.mark.parametrize("name", [".gitignore", "a+b-c._?=Z9", "n" * 211])
def test_unusual_name_is_allowed(name: str) -> None:
    assert StorePath.parse("fli4bwscgna7lpm7v5xgnjxrxh0yc7ra-" + name).name == name


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "invalid-length"),
        ("invalid", "invalid-length"),
        ("0" * 32 + "-", "invalid-length"),
        ("00bgd045z0d4icpbc2yy-", "invalid-length"),
        ("00bgd045z0d4icpbc2yy-net-tools-1.60", "invalid-hash-encoding"),
        ("00bgd045z0d4icpbc2yyz4gx48aku4la-net-tools", "invalid-hash-encoding"),
        ("00bgd045z0d4icpbc2yyz4gx48ak44lanet-tools", "missing-dash"),
        ("00bgd045z0d4icpbc2yyz4gx48ak44la-net-tools/bin/arp", "invalid-name"),
        ("0" * 32 + "-" + "n" * 212, "invalid-length"),
        ("e" * 32 + "-dummy", "invalid-hash-encoding"),
        ("0" * 32 + "_dummy", "missing-dash"),
        ("0" * 32 + "-dum my", "invalid-name"),
        ("0" * 32 + "-dum/my", "invalid-name"),
        ("0" * 32 + "-dummy\n", "invalid-name"),
        ("0" * 32 + "-dümmy", "invalid-name"),
    ],
)
def test_text_that_breaks_a_rule_is_refused_by_that_rule(text: str, rule: str) -> None:
    with refused(StorePathError, rule):
        StorePath.parse(text)


def test_bytes_that_are_no_text_are_refused() -> None:
    with refused(StorePathError, "invalid-name"):
        StorePath.parse(b"0" * 32 + b"-\xff\xfe")


@pytest.mark.parametrize("path", ["/nix/" + DUMMY, DUMMY, "foobar-123"])
def test_absolute_path_elsewhere_is_refused(path: str) -> None:
    with refused(StorePathError, "missing-store-dir"):
        StorePath.parse_absolute(path)


@pytest.mark.parametrize("name", [".", "..", ".-a", "..-a"])
def test_name_that_nix_refuses_is_read_but_not_given_to_a_new_path(name: str) -> None:
    assert store_path.check_name(name) == name
    with refused(StorePathError, "invalid-name"):
        store_path.check_new_name(name)


def test_text_paths_are_the_published_ones() -> None:
    foo = store_path.text_path(b"bar", "foo")
    assert foo == FOO
    reference = foo.absolute()
    baz = store_path.text_path(reference.encode(), "baz", [foo])
    assert baz.basename() == "5xd714cbfnkz02h2vbsj4fm03x3f15nf-baz"


def test_fixed_output_paths_are_the_published_ones() -> None:
    sha1 = bytes.fromhex("0beec7b5ea3f0fdbc95d0dd47f3c5bc275da8a33")
    path = store_path.fixed_output_path("sha1", sha1, "bar", is_recursive=True)
    assert path.basename() == "mp57d33657rf34lzvlbpfa1gjfv5gmpg-bar"
    nar_sha256 = bytes.fromhex("61cf372bed19421393b0a286aada0b30dbc638c9923e8b0fb82e813416fb13f7")
    reference = StorePath.parse("dxwkwjzdaq7ka55pkk252gh32bgpmql4-foo")
    path = store_path.fixed_output_path(
        "sha256", nar_sha256, "baz", is_recursive=True, references=[reference]
    )
    assert path.basename() == "s89y431zzhmdn3k8r96rvakryddkpv2v-baz"
    with refused(StorePathError, "invalid-reference"):
        store_path.fixed_output_path("sha1", sha1, "b", is_recursive=True, references=[reference])


@pytest.mark.parametrize(
    ("nar_sha256", "digest"),
    [
        (
            "097d397e9b5826384eaa16c457715d1c1a51670313ead0f58566e0b232539cf1",
            "f1dbqnj508kha3429mvy2h6dwcqbr31v",
        ),
        (
            "03e7f63be30b065d78bcf615f5473545fdb4eb69aa416f43495b4e05cdfb8040",
            "7nn1mg7sbg5c7rs9nzcfks9almxk6m5x",
        ),
        (
            "ebd52279a8df024c9fd5718de4103bf5e760dc7f2cf49044ee7dea87ab16911a",
            "4jagc832b703jlcbarhzgf6m4yxp3hj1",
        ),
        (
            "a50a5ab6d992f5598edd92105059fae9acfc192981e08bd88534c2167e92526a",
            "5mdfnlrv8zpnc25i15vzv4c3d3hh0bzh",
        ),
    ],
)
def test_paths_of_known_nars_are_the_published_ones(nar_sha256: str, digest: str) -> None:
    path = store_path.nar_path(bytes.fromhex(nar_sha256), "test")
    assert path.basename() == f"{digest}-test"


def test_self_reference_and_references_change_the_path() -> None:
    nar_sha256 = hashlib.sha256(b"nar").digest()
    plain = store_path.nar_path(nar_sha256, "x")
    with_self = store_path.nar_path(nar_sha256, "x", has_self_reference=True)
    with_reference = store_path.nar_path(nar_sha256, "x", [FOO])
    assert len({plain, with_self, with_reference}) == 3


def test_placeholder_of_out_is_the_published_one() -> None:
    expected = "/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9"
    assert store_path.placeholder("out") == expected
