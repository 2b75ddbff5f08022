"""Profiles as text, and the directory that they are in."""

from pathlib import Path

import pytest

from appliance.bounds import RECORDED_MAX
from appliance.castore.digest import Digest
from appliance.errors import ConfigError, StoreError
from appliance.store.profiles import (
    HEAD,
    Profile,
    ProfiledBlob,
    ProfiledDirectory,
    ProfiledPath,
    Profiles,
    parse_file,
)

NAME = "5ndavkqr4ai2xn3pkdl1blgmnqmn4wlq-hello-2.12"
DIGEST = Digest.of(b"something")
READS = (
    ProfiledPath(0, NAME),
    ProfiledDirectory(12, DIGEST),
    ProfiledBlob(14, DIGEST, 4711, 0, 4711),
    ProfiledBlob(20, DIGEST, 104857600, 262144, 524288),
)


def test_a_profile_is_the_same_after_a_way_through_text() -> None:
    profile = Profile(READS)
    assert Profile.parse(profile.to_text()) == profile
    assert profile.num_bytes == 4711 + 262144


def test_the_times_say_what_the_order_is() -> None:
    lines = [read.to_line() for read in READS]
    assert Profile.parse(HEAD + "".join(reversed(lines))) == Profile(READS)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "expected '# appliance profile 1'"),
        ("# appliance profile 2\n", "this release reads version 1"),
        (HEAD + "path 0 hello\n", "line 2"),
        (HEAD + f"path 0 {NAME}", "cut off"),
        (HEAD + f"\npath 1e3 {NAME}\n", "line 3: '1e3': expected a number"),
        (HEAD + f"path 1000000001 {NAME}\n", "expected a number from 0 to 1000000000"),
        (HEAD + "directory 1 b3:AAAA\n", "line 2"),
        (HEAD + f"blob 1 {DIGEST.tvix()}\n", "expected `path MS NAME`"),
        (HEAD + f"blob 1 {DIGEST.tvix()} -1\n", "'-1'"),
        (HEAD + f"blob 1 {DIGEST.tvix()} 10 5+6\n", "expected OFFSET+LENGTH within 10 bytes"),
        (HEAD + f"blob 1 {DIGEST.tvix()} 10 5+0\n", "expected OFFSET+LENGTH within 10 bytes"),
        (HEAD + f"link 1 {DIGEST.tvix()}\n", "expected `path MS NAME`"),
    ],
    ids=range(12),
)
def test_a_text_that_breaks_a_rule_is_refused(text: str, told: str) -> None:
    with pytest.raises(StoreError, match=r"line|cut off") as caught:
        Profile.parse(text)
    assert told in str(caught.value)


def test_a_profile_has_a_bounded_number_of_reads() -> None:
    lines = [ProfiledDirectory(at_ms, DIGEST).to_line() for at_ms in range(RECORDED_MAX)]
    assert len(Profile.parse("".join([HEAD, *lines])).reads) == RECORDED_MAX
    with pytest.raises(StoreError, match=f"{RECORDED_MAX} reads at most"):
        Profile.parse("".join([HEAD, *lines, lines[0]]))


def test_a_file_is_bounded_and_is_ascii(tmp_path: Path) -> None:
    path = tmp_path / "profile"
    with path.open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(StoreError, match="bytes at most"):
        parse_file(path)
    path.write_bytes(HEAD.encode() + "path 0 größe\n".encode())
    with pytest.raises(StoreError, match="not ASCII"):
        parse_file(path)


@pytest.mark.parametrize("name", ["", ".hidden", "../x", "a/b", "a" * 221, "a\n"], ids=range(6))
def test_a_name_that_breaks_the_rule_is_refused(tmp_path: Path, name: str) -> None:
    profiles = Profiles(tmp_path)
    for use in (profiles.read, profiles.path, profiles.delete, profiles.seen):
        with pytest.raises(ConfigError, match="expected 1 to 220"):
            use(name)


def test_profiles_are_written_listed_and_deleted(tmp_path: Path) -> None:
    profiles = Profiles(tmp_path)
    assert profiles.names() == []
    with pytest.raises(StoreError, match="there is none"):
        profiles.read("boot")
    profiles.write(NAME, Profile(READS))
    profiles.write("boot", Profile(READS[:1]))
    before = profiles.seen("boot")
    profiles.write("boot", Profile(READS[:2]))
    assert profiles.seen("boot") != before
    assert profiles.names() == [NAME, "boot"]
    assert profiles.read("boot") == Profile(READS[:2])
    profiles.delete("boot")
    assert profiles.names() == [NAME]
    with pytest.raises(StoreError, match="there is none"):
        profiles.delete("boot")
    assert [path.name for path in profiles.directory.iterdir()] == [NAME]
