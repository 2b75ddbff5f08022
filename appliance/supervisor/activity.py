"""What virtual machines did between two reports of their supervisors."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from appliance.session.request_statistics import BUCKETS, quantile_ns

Reports = Sequence[Mapping[str, Any]]


class Activity(NamedTuple):
    """One virtual machine or mount: rates, and what is so now."""

    name: str
    requests_per_s: float
    bytes_per_s: float
    """Content that was read."""
    p50_us: float
    p99_us: float
    misses_per_s: float
    """What its workers wanted of the supervisor."""
    restarts: int
    memory_bytes: int


def activities(before: Reports, after: Reports, elapsed_s: float) -> list[Activity]:
    """Return what each session of `after` did since `before`, by name.

    A session that was not there before, or whose counters began anew, did all that it counts.
    """
    earlier = {_name(session): session for session in _sessions(before)}
    found = []
    for session in _sessions(after):
        name = _name(session)
        past = earlier.get(name)
        if past is not None and _num_requests(past) > _num_requests(session):
            past = None
        found.append(_activity(name, past, session, elapsed_s))
    return sorted(found)


def _activity(
    name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any], elapsed_s: float
) -> Activity:
    numbers = [float(number) for number in _numbers(after)]
    buckets = _all_buckets(after)
    if before is not None:
        numbers = [now - past for now, past in zip(numbers, _numbers(before), strict=True)]
        pairs = zip(buckets, _all_buckets(before), strict=True)
        buckets = [max(0, now - past) for now, past in pairs]
    requests, read, misses = (max(0.0, number) / elapsed_s for number in numbers)
    return Activity(
        name,
        requests,
        read,
        quantile_ns(buckets, 0.5) / 1000,
        quantile_ns(buckets, 0.99) / 1000,
        misses,
        sum(worker["restarts"] for worker in after["workers"]),
        after["memory_bytes"],
    )


def _sessions(reports: Reports) -> Iterable[Mapping[str, Any]]:
    return (session for report in reports for session in report["sessions"])


def _name(session: Mapping[str, Any]) -> str:
    name: str = session.get("socket") or session["mount"]
    return name


def _numbers(session: Mapping[str, Any]) -> tuple[int, int, int]:
    wanted = session["wants"]["kinds"].values()
    return (
        _num_requests(session),
        session["read_inline_bytes"] + session["read_file_bytes"],
        sum(number for kind in wanted for number in kind["outcomes"].values()),
    )


def _num_requests(session: Mapping[str, Any]) -> int:
    requests: Mapping[str, int] = session["requests"]
    return sum(requests.values())


def _all_buckets(session: Mapping[str, Any]) -> list[int]:
    totals = [0] * BUCKETS
    for buckets in session["histograms"].values():
        totals = [total + number for total, number in zip(totals, buckets, strict=True)]
    return totals
