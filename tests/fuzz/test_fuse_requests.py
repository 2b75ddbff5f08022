"""Damaged FUSE requests through real rings, answered in C and in Python alike."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.fuzz import fuse_requests, shares
from tests.fuzz.fuse_requests import RequestFuzzer

pytestmark = pytest.mark.slow

SEED: Final = 7
COUNT: Final = 1500


@pytest.fixture(scope="module")
def fuzzer(
    store: tuple[Path, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RequestFuzzer]:
    with RequestFuzzer(*store, tmp_path_factory.mktemp("run")) as made:
        yield made


@pytest.fixture(autouse=True)
def _no_process_ends(fuzzer: RequestFuzzer) -> Iterator[None]:
    before = fuzzer.num_requests
    yield
    fuzzer.check_alive()
    print(f"{fuzzer.num_requests - before} requests on each side")


def test_every_kind_of_request_cut_at_every_byte(fuzzer: RequestFuzzer) -> None:
    fuzzer.check(list(fuzzer.every_truncation()))


def test_every_kind_of_request_with_every_byte_damaged(fuzzer: RequestFuzzer) -> None:
    fuzzer.check(list(fuzzer.every_byte(random.Random(SEED))))


def test_requests_damaged_in_several_places(fuzzer: RequestFuzzer) -> None:
    for seed in shares.seeds(SEED, shares.REQUESTS_S):
        fuse_requests.play(fuzzer, seed, COUNT)
