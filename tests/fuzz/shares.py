"""How long the suite fuzzes: for two minutes, if two fuzzers of C code run at a time.

`TEST_FUZZ_S` in the environment is the number of seconds for each of the three kinds of fuzzers
instead; `make fuzz` goes on for as long as it is told to.
"""

import os
import time
from collections.abc import Iterator
from typing import Final

C_CODE_S: Final = 40.0
REQUESTS_S: Final = 20.0
MESSAGES_S: Final = 20.0


def seeds(first: int, share_s: float, fewest: int = 1) -> Iterator[int]:
    """Yield one seed after the other until the time is up, at least `fewest` of them."""
    began_s = time.monotonic()
    end_s = began_s + float(os.environ.get("TEST_FUZZ_S", share_s))
    seed = first
    while seed < first + fewest or time.monotonic() < end_s:
        yield seed
        seed += 1
    print(f"{seed - first} seeds in {time.monotonic() - began_s:.1f} s")
