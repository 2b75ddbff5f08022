"""Damaged vhost-user messages, in and out of order, with any descriptors."""

from pathlib import Path
from typing import Final

import pytest

from tests.fuzz import shares
from tests.fuzz.vhost_messages import MessageFuzzer

pytestmark = pytest.mark.slow

SEED: Final = 7
PLAYS: Final = 40
STATES: Final = 100


def test_messages_of_any_kind_harm_nobody_else(store: tuple[Path, bytes], tmp_path: Path) -> None:
    with MessageFuzzer(*store, tmp_path) as fuzzer:
        for seed in shares.seeds(SEED, shares.MESSAGES_S, PLAYS):
            fuzzer.play(seed)
        before, halfway, after = fuzzer.replace_descriptors(SEED, 300)
        num_taken = fuzzer.play_state(SEED, STATES)
        fuzzer.check()
        print(f"{num_taken} of {STATES} damaged states taken")
        print(f"descriptors of a session: {before}, {halfway}, {after}")
        print(f"{fuzzer.num_messages} messages")
        assert fuzzer.num_messages > 20 * PLAYS
        assert max(halfway, after) <= before + 8, "what a message replaces is closed"
