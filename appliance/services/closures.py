"""Closures: store paths with all that they refer to, directly or not."""

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from appliance.nix.path_info import read_path_info
from appliance.nix.store_path import StorePath
from appliance.protos import pathinfo_pb2
from appliance.services.contracts import PathInfoService

# PathInfos that are asked for at a time: a service may be far away.
_CONCURRENT_GETS: Final = 32


class PathInfos(NamedTuple):
    """PathInfos that were found, and the paths that are not in the store.

    Each missing path is there with one of those that refer to it, if any.
    """

    found: dict[StorePath, pathinfo_pb2.PathInfo]
    missing: dict[StorePath, StorePath | None]

    def problems(self) -> list[str]:
        """Return one line for each missing path."""
        lines = []
        for path, referrer in self.missing.items():
            why = f", a reference of {referrer.absolute()}," if referrer else ""
            lines.append(f"path {path.absolute()}{why} is not valid")
        return sorted(lines)


def references_of(message: pathinfo_pb2.PathInfo) -> list[StorePath]:
    """Return the references of a valid PathInfo; none if it lacks their names."""
    return [StorePath.parse(name) for name in message.narinfo.reference_names]


async def look_up(
    path_infos: PathInfoService, paths: Iterable[StorePath], *, is_recursive: bool
) -> PathInfos:
    """Return the PathInfos of `paths`, and of their closures if `is_recursive`.

    Raises:
        StoreError: a service fails, or a PathInfo is damaged.
    """
    import asyncio  # noqa: PLC0415 - it is slow to load, and a copy to a local store has no loop

    result = PathInfos({}, {})
    room = asyncio.Semaphore(_CONCURRENT_GETS)

    async def get(path: StorePath) -> pathinfo_pb2.PathInfo | None:
        async with room:
            encoded = await path_infos.get(path.digest)
        if encoded is None or read_path_info(encoded).path != path:
            return None
        return pathinfo_pb2.PathInfo.FromString(encoded)

    level: dict[StorePath, StorePath | None] = dict.fromkeys(paths)
    while level:
        following: dict[StorePath, StorePath | None] = {}
        messages = await asyncio.gather(*map(get, level))
        for (path, referrer), message in zip(level.items(), messages, strict=True):
            if message is None:
                result.missing[path] = referrer
                continue
            result.found[path] = message
            if is_recursive:
                following.update(dict.fromkeys(references_of(message), path))
        for path in [*result.found, *result.missing]:
            following.pop(path, None)
        level = following
    return result


def closure_size(path: StorePath, infos: Mapping[StorePath, pathinfo_pb2.PathInfo]) -> int:
    """Return the total size in bytes of the NARs of a closure, all of which `infos` has.

    Paths that are missing count nothing.
    """
    seen = {path}
    left = [path]
    total = 0
    while left:
        message = infos.get(left.pop())
        if message is None:
            continue
        total += message.narinfo.nar_size
        new = [other for other in references_of(message) if other not in seen]
        seen.update(new)
        left += new
    return total
