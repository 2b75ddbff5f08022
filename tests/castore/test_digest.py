"""Digests and their two textual forms."""

import pytest

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.errors import DirectoryError
from tests.refusal import refused

BLOB_B = bytes(range(255)) * 4096
VECTORS = {
    b"Hello World!": "5ca7815adcb484e9a136c11efe69c1d530176d549b5d18d038eb5280b4b3470c",
    b"": "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    b"\x00\x01": "7b7015bb92cf0b318037702a6cdd81dee41224f734684c2c122cd6359cb1ee63",
    BLOB_B: "a82c5154a7a0c262c6fdb929a317585646f8fbcf80326d0a7b8747edaf2d99d2",
    b"\x01\x02\x03": "b177ec1bf26dfb3b7010d473e6d44713b29b765b99c6e60ecbfae742de496543",
    b"\x04\x05": "5f805527aa94f2a9a3a782cad8cc18b63cf6017e7bc65ca96aeada8392d4c525",
    b"Hello World": "41f8394111eb713a22165c46c90ab8f0fd9399c92028fd6d288944b23ff5bf76",
    b"x86_64-linux": "28e337fc81c4c7b61f227027949a4012561ecead12c67f5f473ef1b8297035f0",
}


@pytest.mark.parametrize("content", VECTORS, ids=lambda content: repr(content[:12]))
def test_digest_of_known_content_is_the_published_one(content: bytes) -> None:
    assert Digest.of(content).hex() == VECTORS[content]


def test_text_of_a_digest_is_hexadecimal_as_files_are_named() -> None:
    assert str(EMPTY_DIGEST) == VECTORS[b""]
    assert f"{EMPTY_DIGEST}" == VECTORS[b""]


def test_published_texts_of_a_digest_are_base64() -> None:
    assert EMPTY_DIGEST.tvix() == "b3:rxNJufX5oaagQE3qNtzJSZvLJcmtwRK3zJqTyuQfMmI="
    assert EMPTY_DIGEST.sri() == "blake3-rxNJufX5oaagQE3qNtzJSZvLJcmtwRK3zJqTyuQfMmI="
    assert Digest.of(b"x86_64-linux").tvix() == "b3:KOM3/IHEx7YfInAnlJpAElYezq0Sxn9fRz7xuClwNfA="


def test_both_texts_are_read_back() -> None:
    digest = Digest.of(b"some content")
    assert Digest.parse(digest.tvix()) == digest
    assert Digest.parse(digest.sri()) == digest


@pytest.mark.parametrize("text", ["", "b3:", "b3:!!!!", "sha256-AAAA", "b3:AAAA", "rxNJufX5oaag"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(DirectoryError):
        Digest.parse(text)


@pytest.mark.parametrize("size", [0, 20, 31, 33, 64])
def test_digest_of_another_length_is_refused(size: int) -> None:
    with refused(DirectoryError, "invalid-digest-len") as caught:
        Digest(bytes(size))
    assert str(caught.value) == f"digest has {size} bytes, expected 32"
