"""Cut points against the published ones, and against the algorithm as the paper writes it down."""

import hashlib
import random
from pathlib import Path
from typing import Final

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.castore.chunking import SNIX, Chunker, Parameters, unpack

# A woodcut of 1776, which the crate `fastcdc` (MIT) has for its tests.
PICTURE: Final = Path(__file__).with_name("SekienAkashita.jpg").read_bytes()

# From the crate's table of masks, by the base-2 logarithm of the size.
MASKS: Final = {
    7: 0x0000000018035100,
    9: 0x0000019000353000,
    13: 0x0000D90303530000,
    14: 0x0000D90313530000,
    15: 0x0000D90F03530000,
    16: 0x0000D90303537000,
    17: 0x0000D90703537000,
    19: 0x0000D91707537000,
}


def level_1(least: int, normal: int, most: int) -> Parameters:
    bits = normal.bit_length() - 1
    return Parameters(least, normal, most, MASKS[bits + 1], MASKS[bits - 1])


# --- The published vectors: the crate's tests of v2020 at normalization level 1 ---

PUBLISHED: Final = [
    (level_1(4096, 16384, 65535), [21325, 17140, 28084, 18217, 24700]),
    (level_1(8192, 32768, 131072), [66549, 42917]),
    (Parameters(16384, 65536, 262144, MASKS[17], MASKS[15]), [109466]),
    (Parameters(4096, 16384, 65535, MASKS[14], MASKS[14]), [6634, 59915, 25597, 5237, 12083]),
]
PUBLISHED_DIGESTS: Final = [
    "261930e84e14c240210ae8c459acc4bb85dd52f1b91c868f2106dbc1ceb3acca",
    "a01747cf21202f0068b8897d2be92aa4479b7ac7207b3baa5057b8ec75fa1c10",
    "01e5305fb8f54d214ed2946843ea360fb9bb3f5df66ef3e34fb024d32ebcaee1",
    "fc28c67b6ef846a841452a215bf704058f65cba5c1d78160398d3c2e046642f9",
    "f6996300fce24d3da56c81ea52e5f4f461ce6adb4496f65252996e1082471aac",
]


def sizes(content: bytes, parameters: Parameters, step: int = 1 << 20) -> list[int]:
    chunker = Chunker(parameters)
    for at in range(0, len(content), step):
        chunker.update(content[at : at + step])
    chunks = list(unpack(chunker.finish()))
    ends = [sum(chunk.size for chunk in chunks[: index + 1]) for index in range(len(chunks))]
    for chunk, end in zip(chunks, ends, strict=True):
        assert chunk.digest == blake3(content[end - chunk.size : end]).digest()
    return [chunk.size for chunk in chunks]


@pytest.mark.parametrize("step", [1 << 20, 4097, 4096, 1])
@pytest.mark.parametrize(("parameters", "expected"), PUBLISHED)
def test_published_cut_points(parameters: Parameters, expected: list[int], step: int) -> None:
    assert sizes(PICTURE, parameters, step) == expected


def test_published_digests() -> None:
    chunker = Chunker(PUBLISHED[0][0])
    chunker.update(PICTURE)
    assert [str(chunk.digest) for chunk in unpack(chunker.finish())] == PUBLISHED_DIGESTS


def test_published_zeros() -> None:
    assert sizes(bytes(10240), level_1(64, 256, 1024)) == [1024] * 10


# --- An oracle: two bytes at a time over the whole content, as the paper has it ---

GEAR: Final = [
    int.from_bytes(hashlib.md5(bytes([value]) * 64).digest()[:8], "big") for value in range(256)
]


def oracle_cut(content: bytes, parameters: Parameters) -> int:
    least, normal, most, mask_short, mask_long = parameters
    if len(content) <= least:
        return len(content)
    end = min(len(content), most)
    fingerprint = 0
    for half in range(least // 2, end // 2):
        mask = mask_short if half < min(normal, end) // 2 else mask_long
        even = 2 * half
        fingerprint = (fingerprint << 2) + (GEAR[content[even]] << 1) & (1 << 64) - 1
        if fingerprint & mask << 1 == 0:
            return even
        fingerprint = fingerprint + GEAR[content[even + 1]] & (1 << 64) - 1
        if fingerprint & mask == 0:
            return even + 1
    return end


def oracle(content: bytes, parameters: Parameters) -> list[int]:
    found = []
    while content:
        found.append(oracle_cut(content, parameters))
        content = content[found[-1] :]
    return found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    size=st.integers(0, 9000),
    step=st.sampled_from([1, 2, 3, 255, 256, 1023, 9000]),
    most=st.integers(256, 1100),
)
def test_like_the_oracle_however_the_content_arrives(
    seed: int, size: int, step: int, most: int
) -> None:
    content = random.Random(seed).randbytes(size)
    parameters = Parameters(64, 256, most, MASKS[9], MASKS[7])
    assert sizes(content, parameters, step) == oracle(content, parameters)


@pytest.mark.slow
def test_the_parameters_of_snix_like_the_oracle() -> None:
    content = random.Random(1).randbytes((3 << 20) + 1)
    found = sizes(content, SNIX, 1000003)
    assert found == oracle(content, SNIX)
    assert all(128 << 10 <= size <= 512 << 10 for size in found[:-1])
    assert len(found) > 6


def test_a_large_blob_of_zeros_has_one_chunk_many_times() -> None:
    assert sizes(bytes(2 << 20), SNIX) == [512 << 10] * 4


def test_chunks_are_taken_as_they_end() -> None:
    content = random.Random(2).randbytes(2 << 20)
    chunker = Chunker()
    chunker.update(content[: 1 << 20])
    first = chunker.take_packed()
    chunker.update(content[1 << 20 :])
    rest = chunker.finish()
    whole = Chunker()
    whole.update(content)
    assert len(first) > 0
    assert first + rest == whole.finish()
