"""What a measurement prints: a table of phases, or the same as JSON."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from appliance.bench.phases import PhaseResult
from appliance.bench.tree_walk import Entry

_US_PER_S: Final = 1e6
_MIB: Final = 1 << 20
_HEADINGS: Final = (
    "op",
    "depth",
    "requests/s",
    "MiB/s",
    "p50 us",
    "p99 us",
    "p99.9 us",
    "max us",
    "CPU us",
)
_GAP: Final = "  "
# Ops for which the bytes of a reply matter.
_COUNTED_IN_BYTES: Final = "read"


@dataclass(frozen=True)
class Report:
    """A whole measurement.

    Args:
        target: the socket or directory.
        protocol: the version of FUSE that was agreed on; empty for a mount.
        entries: what the walk has found.
        walk_s: how long it took.
        verified: the directory that everything was compared with, if it was.
        num_queues: request queues that carried requests at the same time.
        phases: what was measured, in order.
    """

    target: str
    protocol: str
    entries: Sequence[Entry]
    walk_s: float
    verified: str | None
    num_queues: int
    phases: Sequence[PhaseResult]

    def lines(self) -> list[str]:
        """Return the report as aligned text."""
        rows = [_HEADINGS, *map(_row, self.phases)]
        whole = [row for row in rows if len(row) == len(_HEADINGS)]
        widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
        widths[0] = max(len(row[0]) for row in rows)
        return [*self._head(), "", *(_aligned(row, widths) for row in rows), *self._oddities()]

    def as_json(self) -> dict[str, Any]:
        """Return the report as values that JSON has; seconds, bytes and counts."""
        return {
            "target": self.target,
            "fuse": self.protocol or None,
            "entries": dict(_kinds(self.entries)),
            "walk_s": self.walk_s,
            "verified": self.verified,
            "queues": self.num_queues,
            "phases": [_phase_json(phase) for phase in self.phases],
        }

    def _head(self) -> list[str]:
        kinds = ", ".join(f"{kind}: {count:,}" for kind, count in _kinds(self.entries).items())
        how = [f"FUSE {self.protocol}", f"request queues: {self.num_queues}"]
        lines = [
            ", ".join([self.target, *(how if self.protocol else [])]),
            f"walked in {self.walk_s:.3f} s; {kinds}",
        ]
        return [*lines, *([f"everything is as in {self.verified}"] if self.verified else [])]

    def _oddities(self) -> list[str]:
        return [
            f"{phase.op}: the used ring states a wrong length for {phase.odd_lengths:,} of "
            f"{phase.completed:,} replies"
            for phase in self.phases
            if phase.odd_lengths
        ]


def _row(phase: PhaseResult) -> tuple[str, ...]:
    if phase.reason:
        return (phase.op, str(phase.depth), f"not measured: {phase.reason}")
    has_bytes = phase.op.startswith(_COUNTED_IN_BYTES)
    cpu_s = phase.cpu_each_s
    quantiles = (phase.quantile_s(fraction) * _US_PER_S for fraction in (0.5, 0.99, 0.999))
    return (
        phase.op,
        str(phase.depth),
        f"{phase.per_s:,.0f}",
        f"{phase.bytes_per_s / _MIB:,.0f}" if has_bytes else "-",
        *(f"{each:,.1f}" for each in quantiles),
        f"{max(each.max_s for each in phase.figures) * _US_PER_S:,.0f}",
        "-" if cpu_s is None else f"{cpu_s * _US_PER_S:,.2f}",
    )


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    if len(row) < len(widths):  # not measured: the reason goes over all columns
        return _GAP.join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), *row[2:]])
    numbers = (text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
    return _GAP.join([row[0].ljust(widths[0]), *numbers])


def _phase_json(phase: PhaseResult) -> dict[str, Any]:
    if phase.reason:
        return {"op": phase.op, "depth": phase.depth, "not_measured": phase.reason}
    return {
        "op": phase.op,
        "depth": phase.depth,
        "requests": phase.completed,
        "requests_per_s": phase.per_s,
        "bytes_per_s": phase.bytes_per_s,
        "p50_s": phase.quantile_s(0.5),
        "p99_s": phase.quantile_s(0.99),
        "p999_s": phase.quantile_s(0.999),
        "max_s": max(each.max_s for each in phase.figures),
        "cpu_per_request_s": phase.cpu_each_s,
        "kicks": sum(each.kicks for each in phase.figures),
        "waits": sum(each.waits for each in phase.figures),
        "wrong_used_lengths": phase.odd_lengths,
    }


def _kinds(entries: Sequence[Entry]) -> Counter[str]:
    def kind(entry: Entry) -> str:
        if entry.is_directory:
            return "directories"
        if entry.is_symlink:
            return "symlinks"
        return "files" if entry.is_file else "other"

    return Counter(sorted(kind(entry) for entry in entries))
