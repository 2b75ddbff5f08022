"""What a worker is told of guest memory: the whole table, or what has changed of it.

A message carries the descriptors of its regions, so a large table takes several messages. The
worker maps nothing before it has the last one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from appliance.bounds import CHANNEL_FDS_MAX
from appliance.protos import control_pb2 as pb
from appliance.vhost._vhost_wire import Region

# A message, and the descriptors (lent) that go with it.
MessageWithFds = tuple[pb.Envelope, Sequence[int]]


def whole_table(table: Mapping[Region, int]) -> list[MessageWithFds]:
    """Return the messages that give `table`, each region with its descriptor, to a new worker."""
    messages: list[MessageWithFds] = []
    for part, is_last in _parts(table):
        whole = pb.SetMemory(regions=_packed(part), last=is_last)
        messages.append((pb.Envelope(set_memory=whole), list(part.values())))
    return messages


def difference(known: Mapping[Region, int], wanted: Mapping[Region, int]) -> list[MessageWithFds]:
    """Return the messages that make `wanted` of `known`, the table that a worker has."""
    removed = [region for region, fd in known.items() if wanted.get(region) != fd]
    added = {region: fd for region, fd in wanted.items() if known.get(region) != fd}
    messages: list[MessageWithFds] = []
    for part, is_last in _parts(added):
        change = pb.ChangeMemory(removed=_packed(removed), added=_packed(part), last=is_last)
        messages.append((pb.Envelope(change_memory=change), list(part.values())))
        removed = []
    return messages


def _parts(table: Mapping[Region, int]) -> Iterator[tuple[dict[Region, int], bool]]:
    """Yield what fits one message, and whether it is the last; an empty table is one part."""
    rows = list(table.items())
    for start in range(0, max(len(rows), 1), CHANNEL_FDS_MAX):
        yield dict(rows[start : start + CHANNEL_FDS_MAX]), start + CHANNEL_FDS_MAX >= len(rows)


def _packed(regions: Iterable[Region]) -> list[pb.Region]:
    return [
        pb.Region(
            gpa=region.gpa,
            size=region.size,
            user_addr=region.user_addr,
            mmap_offset=region.mmap_offset,
        )
        for region in regions
    ]
