"""The simulation of a fleet, over the profile of a Debian that was recorded from a local store."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from appliance.store.profiles import parse_file
from tools.simulate_fleet import Assumptions, cold_start, day, fetches_of

TRACE: Final = Path(__file__).with_name("debian_boot.profile")
PROFILE: Final = parse_file(TRACE)
# Four hosts of a small fleet are as good as a hundred for what is tested here.
FEW: Final = Assumptions(simulated_hosts=4)


def test_a_boot_takes_the_requests_of_its_objects() -> None:
    fetches = fetches_of(PROFILE, FEW)
    lines = TRACE.read_text().splitlines()
    assert len(fetches) == sum(line.startswith(("path ", "blob ")) for line in lines)
    assert sum(fetch.size for fetch in fetches) > 0.4 * PROFILE.num_bytes
    one = cold_start(PROFILE, 1, FEW, seed=1)
    # The guests of a host share every fetch.
    assert one.requests == sum(fetch.requests for fetch in fetches)
    assert one.requests_per_boot == one.requests / FEW.guests_per_host
    assert one.refused < one.requests
    assert one.failed == 0


def test_the_guest_never_takes_less_time_than_it_thinks() -> None:
    thinks_s = sum(fetch.think_s for fetch in fetches_of(PROFILE, FEW))
    for has_profile in (True, False):
        one = cold_start(PROFILE, 1, replace(FEW, has_profile=has_profile), seed=1)
        assert one.median_s >= thinks_s


def test_a_profile_hides_the_round_trips() -> None:
    far = replace(FEW, rtt_s=0.1)
    with_it, without = (
        cold_start(PROFILE, 10, replace(far, has_profile=has_profile), seed=1).median_s
        for has_profile in (True, False)
    )
    assert with_it < 0.6 * without


def test_a_store_that_refuses_requests_takes_as_long_as_it_needs() -> None:
    outcome = cold_start(PROFILE, 1000, FEW, seed=1)
    answered = outcome.requests - outcome.refused
    assert outcome.refused > 0
    assert outcome.p99_s > 0.8 * answered / FEW.store_requests_per_s


HERD: Final = Assumptions(has_jitter=False, simulated_hosts=20)


@pytest.mark.parametrize(
    "better",
    [
        replace(HERD, spread_s=900.0),
        replace(HERD, hosts_per_cache=50),
        replace(HERD, has_jitter=True),
    ],
    ids=["spread", "caches", "jitter"],
)
def test_what_helps_a_herd(better: Assumptions) -> None:
    plain = cold_start(PROFILE, 4000, HERD, seed=1)
    assert cold_start(PROFILE, 4000, better, seed=1).refused < plain.refused


def test_without_single_flight_each_guest_fetches() -> None:
    shared = cold_start(PROFILE, 1, FEW, seed=1)
    apart = cold_start(PROFILE, 1, replace(FEW, has_single_flight=False), seed=1)
    assert apart.bytes == pytest.approx(FEW.guests_per_host * shared.bytes)


def test_a_seed_makes_it_repeatable() -> None:
    spread = replace(FEW, spread_s=60.0)
    assert cold_start(PROFILE, 100, spread, 7) == cold_start(PROFILE, 100, spread, 7)
    assert cold_start(PROFILE, 100, spread, 7) != cold_start(PROFILE, 100, spread, 8)
    assert day(PROFILE, 10, FEW, 7) == day(PROFILE, 10, FEW, 7)


def test_caches_save_most_of_a_day_unless_they_are_too_small() -> None:
    usual = day(PROFILE, 1000, FEW, seed=1)
    small = day(PROFILE, 1000, replace(FEW, cache_bytes=1 << 20), seed=1)
    assert usual.hit_rate > 0.9
    assert small.hit_rate < 0.1
    assert small.dollars > 5 * usual.dollars
    assert day(PROFILE, 10_000, FEW, seed=1).requests == pytest.approx(10 * usual.requests)


def test_the_command_prints_both_tables() -> None:
    command = [sys.executable, "-m", "tools.simulate_fleet", str(TRACE), "--hosts", "10"]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["hosts", "10"] * 2
    wrong = [*command, "--set", "colour=red"]
    refused = subprocess.run(wrong, check=False, capture_output=True, cwd=root)
    assert refused.returncode == 1
    assert b"expected NAME=VALUE" in refused.stderr
