"""All fuzzers in turn, for as long as one likes: `make fuzz SECONDS=600 SEED=1`."""

import argparse
import contextlib
import random
import tempfile
import time
from pathlib import Path

from tests.fakes.appliance_process import import_tree
from tests.fakes.hostile_guest import make_tree
from tests.fuzz import c_fuzzers, fuse_requests
from tests.fuzz.fuse_requests import RequestFuzzer
from tests.fuzz.vhost_messages import MessageFuzzer

REQUESTS = 2000
PLAYS = 40
STATES = 100


def main() -> None:
    """Run rounds of all fuzzers until the time is up; a fault ends the run with its traceback."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="how long (default: 600)")
    parser.add_argument("--seed", type=int, default=None, help="of the first round")
    options = parser.parse_args()
    seed: int = random.randrange(1 << 30) if options.seed is None else options.seed
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-")))
        run(directory, seed, options.seconds)


def run(directory: Path, seed: int, seconds: float) -> None:
    programs, messages, requests = (directory / name for name in ("c", "messages", "requests"))
    for made in (programs, messages, requests):
        made.mkdir()
    store = directory / "store"
    (name,) = import_tree(store, make_tree(directory))
    c_fuzzers.build(programs)
    end_s = time.monotonic() + seconds
    with (
        MessageFuzzer(store, name.encode(), messages) as message_fuzzer,
        RequestFuzzer(store, name.encode(), requests) as request_fuzzer,
    ):
        request_fuzzer.check(list(request_fuzzer.every_truncation()))
        while time.monotonic() < end_s:
            print(f"--- seed {seed}, {max(0, end_s - time.monotonic()):.0f} s left", flush=True)
            for said in c_fuzzers.run_round(programs, seed):
                print(said, flush=True)
            request_fuzzer.check(list(request_fuzzer.every_byte(random.Random(seed))))
            fuse_requests.play(request_fuzzer, seed, REQUESTS)
            request_fuzzer.check_alive()
            for number in range(PLAYS):
                message_fuzzer.play(seed * PLAYS + number)
            nums = message_fuzzer.replace_descriptors(seed, 500)
            num_taken = message_fuzzer.play_state(seed, STATES)
            message_fuzzer.check()
            print(f"descriptors of a session: {nums}; {num_taken} of {STATES} states taken")
            print(
                f"{request_fuzzer.num_requests} requests on each side, "
                f"{message_fuzzer.num_messages} messages so far",
                flush=True,
            )
            seed += 1
    print(c_fuzzers.table(c_fuzzers.coverage(programs)))


if __name__ == "__main__":
    main()
