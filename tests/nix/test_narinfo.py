"""Narinfos: those of a public cache, invalid ones, and those that we make from a PathInfo."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.castore.directory import SymlinkNode
from appliance.errors import PathInfoError
from appliance.nix.hashes import NixHash
from appliance.nix.narinfo import narinfo_of, parse_narinfo
from appliance.nix.path_info import encode_nar_addressed
from appliance.nix.signing import PublicKey, SecretKey, Signature
from appliance.nix.store_path import StorePath
from appliance.protos import pathinfo_pb2
from tests.refusal import refused

KEY = PublicKey.parse("cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=")
CURL_NAME = "syd87l2rxw8cbsxmxl853h0r6pdwhwjr-curl-7.82.0-bin"
CURL_REFERENCES = (
    "0jqd0rlxzra1rs38rdxl43yh6rxchgc6-curl-7.82.0",
    "6w8g7njm4mck5dmjxws0z1xnrxvl81xa-glibc-2.34-115",
    "j5jxw3iy7bbz4a57fh9g2xm2gxmyal8h-zlib-1.2.12",
    "yxvjs9drzsphm9pcf42a4byzj1kb9m7k-openssl-1.1.1n",
)
# As the public cache serves them, except that digikam lacks its Compression line.
SERVED = {path.stem: path.read_text() for path in Path(__file__).parent.glob("narinfos/*.narinfo")}
CURL, DIGIKAM, GCC, PERL, TEXLIVE = (SERVED[name] for name in sorted(SERVED))


@pytest.mark.parametrize("text", SERVED.values(), ids=SERVED.keys())
def test_narinfo_of_a_public_cache_is_signed_by_it(text: str) -> None:
    narinfo = parse_narinfo(text)

    (signature,) = narinfo.signatures
    assert KEY.verifies(signature, narinfo.fingerprint())


@pytest.mark.parametrize("text", [CURL, GCC, TEXLIVE], ids=["curl", "gcc", "texlive"])
def test_narinfo_is_written_as_it_was_read(text: str) -> None:
    assert str(parse_narinfo(text)) == text


def test_every_value_is_read() -> None:
    narinfo = parse_narinfo(CURL)

    assert narinfo.path.basename() == CURL_NAME
    assert narinfo.url.endswith("gmj56.nar.xz")
    assert narinfo.compression == "xz"
    assert str(narinfo.file_hash).endswith("gmj56")
    assert (narinfo.file_size, narinfo.nar_size) == (68852, 196040)
    assert narinfo.nar_hash.digest.hex()[:8] == "407bcd9b"
    assert tuple(path.basename() for path in narinfo.references) == CURL_REFERENCES
    assert narinfo.deriver == StorePath.parse("5rwxzi7pal3qhpsyfc16gzkh939q1np6-curl-7.82.0.drv")
    assert (narinfo.system, narinfo.ca) == (None, None)
    assert parse_narinfo(DIGIKAM).system == "i686-linux"


def test_fingerprint_is_the_published_one() -> None:
    assert parse_narinfo(CURL).fingerprint() == (
        f"1;/nix/store/{CURL_NAME};sha256:1b4sb93wp679q4zx9k1ignby1yna3z7c4c2ri3wphylbc2dwsys0;"
        "196040;" + ",".join(f"/nix/store/{name}" for name in CURL_REFERENCES)
    )


def test_unsorted_references_were_signed_so_and_keep_their_order() -> None:
    names = [path.name for path in parse_narinfo(GCC).references]

    assert names == ["glibc-2.7", "binutils-2.18", "bash-3.2-p39", "gcc-3.4.6", "gcc-3.4.6"]


def test_content_address_is_read() -> None:
    address = parse_narinfo(TEXLIVE).ca

    assert address is not None
    assert address.hash.digest.hex() == "5cba3c77236ae4f9650270a27fbad375551fa60a"


def test_digest_of_the_nar_may_be_in_base_16_and_is_written_in_base_32() -> None:
    narinfo = parse_narinfo(PERL)

    assert narinfo.nar_hash.digest.hex().startswith("60adfd293a4d81ad")
    again = parse_narinfo(str(narinfo))
    assert again == narinfo
    assert f"NarHash: {narinfo.nar_hash}\n" in str(narinfo)


def without(name: str, text: str = CURL) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(name))


def test_what_is_not_said_has_the_meaning_it_has_for_nix() -> None:
    text = CURL
    for name in ("Compression", "FileHash", "FileSize", "References", "Deriver", "Sig"):
        text = without(name, text)
    narinfo = parse_narinfo(text)

    assert narinfo.compression == parse_narinfo(DIGIKAM).compression == "bzip2"
    assert (narinfo.file_hash, narinfo.file_size, narinfo.deriver) == (None, None, None)
    assert (narinfo.references, narinfo.signatures) == ((), ())
    assert narinfo.fingerprint().endswith(";196040;")


def test_unknown_deriver_is_none_and_unknown_names_are_ignored() -> None:
    narinfo = parse_narinfo(without("Deriver") + "Deriver: unknown-deriver\nFuture: value\n")

    assert narinfo.deriver is None
    assert "Future" not in str(narinfo)


@pytest.mark.parametrize("name", ["StorePath", "URL", "NarHash", "NarSize"])
def test_what_has_to_be_said_is_missed_by_name(name: str) -> None:
    with refused(PathInfoError, "missing-field", match=f"{name} is missing"):
        parse_narinfo(without(name))


@pytest.mark.parametrize("line", without("Sig").splitlines())
def test_what_may_be_said_once_is_refused_twice(line: str) -> None:
    name = line.partition(":")[0]
    with refused(PathInfoError, "duplicate-field", match=f"{name} occurs 2 times"):
        parse_narinfo(f"{CURL}{line}\n")


@pytest.mark.parametrize(
    "line",
    [
        "StorePath: " + CURL_NAME,
        "StorePath: /nix/store/short",
        "URL: ",
        "Compression: ",
        "FileHash: sha1:1ak1ymbmsfx7z8kh09jzkr3a4dvkrfjw",
        "FileSize: -1",
        "NarHash: 1b4sb93wp679q4zx9k1ignby1yna3z7c4c2ri3wphylbc2dwsys0",
        "NarHash: sha256:1b4sb93wp679q4zx9k1ignby1yna3z7c4c2ri3wphylbc2dwsys",
        f"NarSize: {1 << 64}",
        "NarSize: 1_000",
        "NarSize: ",
        "References: " + "  ".join(CURL_REFERENCES[:2]),
        "References: /nix/store/" + CURL_REFERENCES[0],
        "Deriver: 5rwxzi7pal3qhpsyfc16gzkh939q1np6-curl-7.82.0",
        "System: ",
        "Sig: cache.nixos.org-1",
        "CA: sha256:08813cbee9903c62be4c5027726a418a300da4500b2d369d3af9286f4815ceba",
    ],
)
def test_value_that_breaks_a_rule_is_refused_by_its_name(line: str) -> None:
    name = line.partition(":")[0]
    with refused(PathInfoError, "invalid-field", match=f"^narinfo, {name}: "):
        parse_narinfo(f"{without(name)}{line}\n")


@pytest.mark.parametrize("line", ["", "References:", "no colon", "Key:value", "Key :value"])
def test_line_that_is_no_name_and_value_is_refused(line: str) -> None:
    with refused(PathInfoError, "invalid-line", match="is not a name, colon, space and value"):
        parse_narinfo(f"{CURL}{line}\n")


@pytest.mark.slow
@given(st.text(max_size=200))
def test_any_text_is_a_narinfo_or_refused(text: str) -> None:
    for whole in (text, CURL + text, CURL.replace("196040", text)):
        try:
            narinfo = parse_narinfo(whole)
        except PathInfoError:
            continue
        assert parse_narinfo(str(narinfo)) == narinfo


def libcxx() -> pathinfo_pb2.PathInfo:
    path = StorePath.parse("z6r3bn5l51679pwkvh9nalp6c317z34m-libcxx-16.0.6-dev")
    nar_sha256 = NixHash.parse("sha256-E73Nt0NAKGxCnsyBFDUaCAbA+wiF5qjq1O9J7WrnT0E=").digest
    message = pathinfo_pb2.PathInfo.FromString(
        encode_nar_addressed(path, SymlinkNode(b"", b"x"), nar_size=7020664, nar_sha256=nar_sha256)
    )
    deriver = StorePath.parse("vs9976cyyxpykvdnlv7x85fpp3shn6ij-libcxx-16.0.6")
    reference = StorePath.parse("lzzd5jgybnpfj86xkcpnd54xgwc4m457-libcxx-16.0.6")
    signature = Signature.parse(
        "cache.nixos.org-1:"
        "cTdhK6hnpPwtMXFX43CYb7v+CbpAusVI/MORZ3v5aHvpBYNg1MfBHVVeoexMBpNtHA8uFAn0aEsJaLXYIDhJDg=="
    )
    narinfo = message.narinfo
    narinfo.ClearField("ca")
    narinfo.deriver.CopyFrom(pathinfo_pb2.StorePath(**deriver._asdict()))
    narinfo.signatures.add(**signature._asdict())
    narinfo.reference_names.append(reference.basename())
    message.references.append(reference.digest)
    return message


def test_narinfo_of_a_path_info_has_its_values_and_its_signatures_hold() -> None:
    narinfo = narinfo_of(libcxx())

    (signature,) = narinfo.signatures
    assert KEY.verifies(signature, narinfo.fingerprint())
    nar = "0hagwxmfsjggskmairl513xw01h838si90fckr16qa208fvwvg8k"
    assert NixHash.parse(f"sha256:{narinfo.url[4:-4]}") == narinfo.nar_hash
    assert without("Sig", str(narinfo)).splitlines() == [
        "StorePath: /nix/store/z6r3bn5l51679pwkvh9nalp6c317z34m-libcxx-16.0.6-dev",
        f"URL: nar/{nar}.nar",
        "Compression: none",
        f"FileHash: sha256:{nar}",
        "FileSize: 7020664",
        f"NarHash: sha256:{nar}",
        "NarSize: 7020664",
        "References: lzzd5jgybnpfj86xkcpnd54xgwc4m457-libcxx-16.0.6",
        "Deriver: vs9976cyyxpykvdnlv7x85fpp3shn6ij-libcxx-16.0.6.drv",
    ]


def test_references_of_a_path_info_come_sorted_by_their_text() -> None:
    message = libcxx()
    for name in reversed(CURL_REFERENCES):
        message.narinfo.reference_names.append(name)
        message.references.append(StorePath.parse(name).digest)
    names = [path.basename() for path in narinfo_of(message).references]

    assert names == sorted([*CURL_REFERENCES, "lzzd5jgybnpfj86xkcpnd54xgwc4m457-libcxx-16.0.6"])


def test_signature_is_added_once() -> None:
    key = SecretKey("test-1", bytes(range(32)))
    narinfo = narinfo_of(libcxx())
    signature = key.sign(narinfo.fingerprint())
    signed = narinfo.with_signature(signature)

    assert signed.signatures == (*narinfo.signatures, signature)
    assert signed.with_signature(signature) == signed
    assert parse_narinfo(str(signed)) == signed
    assert key.public.verifies(signed.signatures[-1], signed.fingerprint())


def test_path_info_that_does_not_say_enough_has_no_narinfo() -> None:
    without_digest, without_names = libcxx(), libcxx()
    without_digest.narinfo.nar_sha256 = b""
    without_names.ClearField("narinfo")
    for message in (without_digest, without_names):
        with refused(PathInfoError, "incomplete", match="are not on record"):
            narinfo_of(message)


def test_name_of_a_signature_cannot_bring_lines_of_its_own() -> None:
    message = libcxx()
    message.narinfo.signatures[0].name = "key\nCA: fixed"
    with refused(PathInfoError, "invalid-name"):
        narinfo_of(message)
