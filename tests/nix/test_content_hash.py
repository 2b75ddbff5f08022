"""Hashes of content with and without its own path in it, in pieces of any size."""

import hashlib

import pytest

from appliance.nix.hashes import ContentHash
from appliance.nix.store_path import StorePath

ITSELF = StorePath.parse("s2742zlcvgpwpni323lmqqdn56iilwvr-self")
DIGEST = ITSELF.basename()[:32].encode()
CONTENT = b"ab" + DIGEST + b"c" + DIGEST + DIGEST + DIGEST[:31] + DIGEST + DIGEST[:5]
PLACES = b"|2|35|67|130"


@pytest.mark.parametrize("size", range(1, len(CONTENT) + 1))
def test_own_digest_counts_as_zeros_and_its_places_may_be_hashed_too(size: int) -> None:
    content_hash = ContentHash("sha1", ITSELF)
    for start in range(0, len(CONTENT), size):
        content_hash.update(CONTENT[start : start + size])

    zeroed = CONTENT.replace(DIGEST, bytes(32))
    without_places, with_places = content_hash.digests()
    assert without_places == hashlib.sha1(zeroed).digest()
    assert with_places == hashlib.sha1(zeroed + PLACES).digest()


def test_digest_of_another_path_is_content_as_any() -> None:
    content_hash = ContentHash("md5")
    content_hash.update(CONTENT)

    assert set(content_hash.digests()) == {hashlib.md5(CONTENT).digest()}
