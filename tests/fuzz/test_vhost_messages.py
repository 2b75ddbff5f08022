"""Damaged vhost-user messages, in and out of order, with any descriptors."""

import os
import time
from pathlib import Path
from typing import Final

import pytest

from tests.fuzz.vhost_messages import MessageFuzzer

pytestmark = pytest.mark.slow

SEED: Final = 7
PLAYS: Final = 40
STATES: Final = 100
ALL_S: Final = float(os.environ.get("TEST_FUZZ_S", "0"))


def test_messages_of_any_kind_harm_nobody_else(store: tuple[Path, bytes], tmp_path: Path) -> None:
    with MessageFuzzer(*store, tmp_path) as fuzzer:
        end_s = time.monotonic() + ALL_S
        seed = SEED
        while seed < SEED + PLAYS or time.monotonic() < end_s:
            fuzzer.play(seed)
            seed += 1
        before, halfway, after = fuzzer.replace_descriptors(SEED, 300)
        num_taken = fuzzer.play_state(SEED, STATES)
        fuzzer.check()
        print(f"{num_taken} of {STATES} damaged states taken")
        print(f"descriptors of a session: {before}, {halfway}, {after}")
        print(f"{seed - SEED} connections, {fuzzer.num_messages} messages")
        assert fuzzer.num_messages > 20 * PLAYS
        assert max(halfway, after) <= before + 8, "what a message replaces is closed"
