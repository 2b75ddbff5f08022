"""Simulates a fleet of hosts that boot guests from one object store, over a recorded profile.

    python -m tools.simulate_fleet PROFILE [--hosts N]... [--set NAME=VALUE]... [--seed N]

Two questions, two parts. `cold_start`: all hosts boot an image that none of them has, within
`spread_s`; how long do their guests take, and what does the store see? `day`: hosts boot images by
popularity all day; what do their caches save? docs/scaling.md has the results, and says what every
assumption stands for.

`cold_start` is a discrete simulation: one event for each request that reaches the store. No more
than `simulated_hosts` are simulated. Each stands for several, which do everything at the same
moments, and the store's capacity is divided by as many. So if hosts begin at different moments, as
many as there are should be simulated.
"""

import argparse
import heapq
import itertools
import random
import statistics
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from appliance.castore.chunking import UNCHUNKED_MAX
from appliance.services.background_pace import BackgroundPace
from appliance.services.retry import BUDGET_S
from appliance.store.profiles import Profile, ProfiledBlob, ProfiledPath, parse_file

_WINDOW_S: Final = 0.1
_DAY_S: Final = 86_400
_MIB: Final = 1 << 20


@dataclass(frozen=True)
class Assumptions:
    """What is not known; each can be set on the command line."""

    rtt_s: float = 0.02
    """Round trip between a host and the store."""
    first_byte_s: float = 0.03
    """What the store takes until it begins to send an object."""
    host_bits_per_s: float = 50e6
    """The link of a host."""
    store_requests_per_s: float = 5500.0
    """What the store answers; it refuses the rest with 503. 5,500 is S3's for one prefix."""
    chunk_bytes: int = 256 << 10
    """Average size of a chunk, each of which is an object."""
    compression: float = 0.5
    """What zstd leaves of a chunk."""
    guests_per_host: int = 20
    """Guests that boot at the same time on a host."""
    spread_s: float = 0.0
    """Hosts begin at random moments within this time."""
    has_profile: bool = True
    """Whether the profile is played; otherwise each read waits for its own requests."""
    has_single_flight: bool = True
    """Whether the guests of a host share one fetch of each object."""
    has_jitter: bool = True
    """Whether the pause before a repetition is random."""
    hosts_per_cache: int = 1
    """Hosts behind one cache that asks the store: 1 if each asks by itself."""
    pause_min_s: float = 0.05
    """The first pause before a repetition; each is twice the one before."""
    pause_max_s: float = 1.0
    """The longest pause."""
    images: int = 10
    """Images in use."""
    shared: float = 0.8
    """The part of an image that all others have, too."""
    boots_per_day: int = 50
    """Boots on each host."""
    releases_per_day: float = 1.0
    """New images, each in place of the oldest one."""
    cache_bytes: int = 10 << 30
    """The cache of a host."""
    price_per_1000_requests: float = 0.0004
    """US dollars."""
    price_per_gb: float = 0.0
    """US dollars for a GB that leaves the store; 0 within one region."""
    simulated_hosts: int = 100
    """See the module."""


class Fetch(NamedTuple):
    """What one read of the trace needs: `requests`, one after the other, and `size` bytes."""

    think_s: float
    requests: int
    size: float


class Outcome(NamedTuple):
    """What became of a cold start; figures of the store are those of the whole fleet."""

    median_s: float
    p99_s: float
    requests_per_boot: float
    requests: float
    refused: float
    peak_per_s: float
    bytes: float
    failed: float


class Day(NamedTuple):
    """What a day costs the whole fleet; the hit rate is that of a host's cache, by content."""

    hit_rate: float
    requests: float
    bytes: float
    dollars: float


def fetches_of(profile: Profile, assumed: Assumptions) -> list[Fetch]:
    """Return what a cold boot needs, as the layout of object stores has it.

    A store path takes a request for its PathInfo and one for its closure of Directories. A file of
    one chunk takes one request; a larger one another, once, for its list of chunks; and one of up
    to 1 MiB, which is fetched as a whole, one that finds no chunk of its digest. The time between
    two reads is what the guest took to think, so the trace must be one of a boot that waited for
    nothing.
    """
    fetches, listed, last_ms = list[Fetch](), set[bytes](), 0
    for read in profile.reads:
        think_s = (read.at_ms - last_ms) / 1000 if last_ms else 0.0
        if isinstance(read, ProfiledPath):
            fetches.append(Fetch(think_s, 2, 64 << 10))
        elif isinstance(read, ProfiledBlob):
            length = read.end - read.start
            requests = max(1, round(length / assumed.chunk_bytes))
            if read.size > assumed.chunk_bytes and read.digest not in listed:
                listed.add(read.digest)
                requests += 1 + (read.size <= UNCHUNKED_MAX)
            fetches.append(Fetch(think_s, requests, length * assumed.compression))
        else:
            continue  # it comes with its closure
        last_ms = read.at_ms
    return fetches


# --- A cold start ---


class Store:
    """The object store: answers so many requests in each window, and refuses the rest."""

    def __init__(self, requests_per_s: float) -> None:
        self._per_window = max(1.0, requests_per_s * _WINDOW_S)
        self.taken: dict[int, int] = {}
        self.seen: dict[int, int] = {}
        self.num_refused = 0

    def ask(self, now_s: float) -> bool:
        """Return whether a request that arrives now is answered."""
        window = int(now_s / _WINDOW_S)
        self.seen[window] = self.seen.get(window, 0) + 1
        if self.taken.get(window, 0) >= self._per_window:
            self.num_refused += 1
            return False
        self.taken[window] = self.taken.get(window, 0) + 1
        return True

    def peak_per_s(self) -> float:
        """Return the most requests of a second, refused ones included."""
        return max(self.seen.values(), default=0) / _WINDOW_S


class Clock:
    """The events to come, in the order of their times."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, time_s: float, event: Callable[[], None]) -> None:
        """Have an event at a time that has not passed."""
        heapq.heappush(self._events, (time_s, next(self._numbers), event))

    def run(self) -> None:
        """Go on until nothing is left."""
        while self._events:
            self.now_s, _number, event = heapq.heappop(self._events)
            event()


class Host:
    """A host whose guests boot; `boot_s` is how long that took, once it is over."""

    def __init__(
        self,
        clock: Clock,
        store: Store,
        fetches: Sequence[Fetch],
        assumed: Assumptions,
        chance: random.Random,
    ) -> None:
        self._clock, self._store, self._fetches = clock, store, fetches
        self._assumed, self._chance = assumed, chance
        self._copies = 1 if assumed.has_single_flight else assumed.guests_per_host
        self._link_free_s = 0.0
        self._is_here = [False] * len(fetches)
        self._begun_s: dict[int, float] = {}
        self._pace = BackgroundPace()
        self._under_way = 0.0
        self._at = 0  # what the guest reads next
        self._is_waiting = False
        self._ahead = 0  # what is fetched ahead next
        self.num_requests = self.num_failed = 0
        self.num_bytes = 0.0
        self.boot_s = 0.0
        self._start_s = chance.uniform(0.0, assumed.spread_s)
        clock.at(self._start_s, self._begin)

    def _begin(self) -> None:
        self._play()
        self._think()

    # The guest.

    def _think(self) -> None:
        if self._at == len(self._fetches):
            self.boot_s = self._clock.now_s - self._start_s
            return
        self._clock.at(self._clock.now_s + self._fetches[self._at].think_s, self._read)

    def _read(self) -> None:
        if self._is_here[self._at]:
            self._at += 1
            self._think()
            return
        self._is_waiting = True
        self._fetch(self._at)

    # What is fetched ahead.

    def _play(self) -> None:
        while self._assumed.has_profile and self._ahead < len(self._fetches):
            size = self._fetches[self._ahead].size
            if self._under_way and self._under_way + size > self._pace.window:
                return
            self._fetch(self._ahead)
            self._ahead += 1

    # Fetches.

    def _fetch(self, index: int) -> None:
        if index not in self._begun_s and not self._is_here[index]:
            self._begun_s[index] = self._clock.now_s
            self._under_way += self._fetches[index].size
            self._ask(
                index, self._fetches[index].requests * self._copies, self._assumed.pause_min_s
            )

    def _ask(self, index: int, left: int, pause_s: float) -> None:
        assumed = self._assumed
        self.num_requests += 1
        if self._store.ask(self._clock.now_s + assumed.rtt_s / 2):
            step_s = assumed.rtt_s + assumed.first_byte_s
            if left > 1:
                # The list comes first; chunks come side by side, so the rest is one round.
                rest = left - 1
                self._clock.at(self._clock.now_s + step_s, lambda: self._ask_all(index, rest))
            else:
                self._receive(index, step_s)
            return
        if self._clock.now_s - self._begun_s[index] > BUDGET_S:
            self.num_failed += 1
            self._receive(index, 0.0)
            return
        wait_s = pause_s * (self._chance.uniform(0.5, 1.5) if assumed.has_jitter else 1.0)
        longer_s = min(2 * pause_s, assumed.pause_max_s)
        at_s = self._clock.now_s + assumed.rtt_s + wait_s
        self._clock.at(at_s, lambda: self._ask(index, left, longer_s))

    def _ask_all(self, index: int, left: int) -> None:
        for _ in range(left - 1):
            self.num_requests += 1
            self._store.ask(self._clock.now_s)
        self._ask(index, 1, self._assumed.pause_min_s)

    def _receive(self, index: int, step_s: float) -> None:
        size = self._fetches[index].size * self._copies
        self.num_bytes += size
        sent_s = max(self._clock.now_s + step_s, self._link_free_s)
        self._link_free_s = sent_s + 8 * size / self._assumed.host_bits_per_s
        self._clock.at(self._link_free_s, lambda: self._arrive(index))

    def _arrive(self, index: int) -> None:
        self._is_here[index] = True
        self._under_way -= self._fetches[index].size
        took_s = self._clock.now_s - self._begun_s.pop(index)
        self._pace.learn(int(self._fetches[index].size), took_s)
        self._play()
        if self._is_waiting and index == self._at:
            self._is_waiting = False
            self._at += 1
            self._think()


def cold_start(profile: Profile, hosts: int, assumed: Assumptions, seed: int) -> Outcome:
    """Have all hosts boot an image that none of them has."""
    clients = max(1, hosts // assumed.hosts_per_cache)
    simulated = min(clients, assumed.simulated_hosts)
    scale = clients / simulated
    clock, store = Clock(), Store(assumed.store_requests_per_s / scale)
    fetches = fetches_of(profile, assumed)
    chance = random.Random(seed)  # noqa: S311 - a simulation
    all_hosts = [Host(clock, store, fetches, assumed, chance) for _ in range(simulated)]
    clock.run()
    times = sorted(host.boot_s for host in all_hosts)
    requests = sum(host.num_requests for host in all_hosts)
    return Outcome(
        statistics.median(times),
        times[min(len(times) - 1, int(0.99 * len(times)))],
        requests / simulated / assumed.guests_per_host,
        requests * scale,
        store.num_refused * scale,
        store.peak_per_s() * scale,
        sum(host.num_bytes for host in all_hosts) * scale,
        sum(host.num_failed for host in all_hosts) * scale,
    )


# --- A day ---


def day(profile: Profile, hosts: int, assumed: Assumptions, seed: int) -> Day:
    """Have a host boot images by popularity (the n-th by 1/n) for a day, and multiply."""
    fetches = fetches_of(profile, assumed)
    num_bytes = sum(fetch.size for fetch in fetches)
    num_requests = sum(fetch.requests for fetch in fetches)
    chance = random.Random(seed)  # noqa: S311 - a simulation
    cache: OrderedDict[object, float] = OrderedDict()
    fetched = missed = 0.0
    for image in _boots(assumed, chance):
        for key, part in (("base", assumed.shared), (image, 1 - assumed.shared)):
            if key in cache:
                cache.move_to_end(key)
                continue
            missed += part
            fetched += part * num_bytes
            # The cache has what was sent, unpacked.
            cache[key] = part * num_bytes / assumed.compression
            while sum(cache.values()) > assumed.cache_bytes:
                cache.popitem(last=False)
    clients = max(1, hosts // assumed.hosts_per_cache)
    requests, sent = missed * num_requests * clients, fetched * clients
    dollars = requests / 1000 * assumed.price_per_1000_requests + sent / 1e9 * assumed.price_per_gb
    return Day(1 - missed / assumed.boots_per_day, requests, sent, dollars)


def _boots(assumed: Assumptions, chance: random.Random) -> Iterator[int]:
    weights = [1 / rank for rank in range(1, assumed.images + 1)]
    for number in range(assumed.boots_per_day):
        newest = int(number / assumed.boots_per_day * assumed.releases_per_day)
        (rank,) = chance.choices(range(assumed.images), weights)
        yield newest - rank


# --- The command ---


def _assumptions(given: Sequence[str]) -> Assumptions:
    assumed = Assumptions()
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not hasattr(assumed, name):
            names = ", ".join(field.name for field in fields(Assumptions))
            raise SystemExit(f"--set {text}: expected NAME=VALUE with one of {names}")
        known: Any = getattr(assumed, name)
        parsed = value == "true" if isinstance(known, bool) else type(known)(value)
        assumed = replace(assumed, **{name: parsed})
    return assumed


def _tables(profile: Profile, sizes: Sequence[int], assumed: Assumptions, seed: int) -> str:
    lines = ["hosts boot_s p99_s requests/boot requests refused peak/s GB failed"]
    for hosts in sizes:
        one = cold_start(profile, hosts, assumed, seed)
        lines.append(
            f"{hosts} {one.median_s:.1f} {one.p99_s:.1f} {one.requests_per_boot:.1f} "
            f"{one.requests:,.0f} {one.refused:,.0f} {one.peak_per_s:,.0f} "
            f"{one.bytes / 1e9:,.1f} {one.failed:,.0f}"
        )
    lines.append("hosts hit_rate requests/day GB/day USD/day")
    for hosts in sizes:
        whole = day(profile, hosts, assumed, seed)
        lines.append(
            f"{hosts} {whole.hit_rate:.3f} {whole.requests:,.0f} {whole.bytes / 1e9:,.1f} "
            f"{whole.dollars:.2f}"
        )
    return "".join(f"{line}\n" for line in lines)


def main() -> None:
    """Print a table for each question."""
    parser = argparse.ArgumentParser(prog="python -m tools.simulate_fleet", allow_abbrev=False)
    parser.add_argument("profile", type=Path, help="what `appliance profile export` has printed")
    parser.add_argument("--hosts", type=int, action="append", help="default: 10, 1000, 10000")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="given")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    sizes = options.hosts or [10, 1000, 10000]
    assumed = _assumptions(options.given)
    sys.stdout.write(_tables(parse_file(options.profile), sizes, assumed, options.seed))


if __name__ == "__main__":
    main()
