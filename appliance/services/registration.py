"""Registrations: what `nix-store --load-db` takes, as closureInfo of nixpkgs has it.

Of each path, one a line: the path, the hash of its NAR, the size of that, the deriver or an empty
line, the number of references, and those.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from appliance.errors import StoreError
from appliance.nix.narinfo import NarInfoFile, narinfo_of
from appliance.nix.path_info import read_path_info
from appliance.nix.store_path import StorePath
from appliance.protos import pathinfo_pb2
from appliance.services.contracts import Services


class Registered(NamedTuple):
    """A path with what Nix registers of it."""

    path: StorePath
    narinfo: NarInfoFile

    def lines(self) -> Iterator[str]:
        """Yield the lines of the path, without their ends."""
        narinfo = self.narinfo
        yield self.path.absolute()
        yield str(narinfo.nar_hash)
        yield str(narinfo.nar_size)
        yield "" if narinfo.deriver is None else narinfo.deriver.absolute()
        yield str(len(narinfo.references))
        for reference in narinfo.references:
            yield reference.absolute()


async def registered(
    services: Services, paths: Iterable[StorePath], *, is_recursive: bool
) -> Sequence[Registered]:
    """Return `paths`, and what they refer to if `is_recursive`, by ascending path.

    Raises:
        StoreError: some are not there: one line for each.
        PathInfoError: of one is not enough known.
    """
    found: dict[StorePath, Registered] = {}
    missing: list[str] = []
    # Each with the path that refers to it.
    left: list[tuple[StorePath, StorePath | None]] = [(path, None) for path in paths]
    seen = {path for path, _referrer in left}
    while left:
        path, referrer = left.pop()
        encoded = await services.path_infos.get(path.digest)
        if encoded is None or read_path_info(encoded).path != path:
            why = f", to which {referrer.absolute()} refers," if referrer else ""
            missing.append(f"path {path.absolute()}{why} is not valid")
            continue
        narinfo = narinfo_of(pathinfo_pb2.PathInfo.FromString(encoded))
        found[path] = Registered(path, narinfo)
        if is_recursive:
            new = [(other, path) for other in narinfo.references if other not in seen]
            seen.update(other for other, _referrer in new)
            left += new
    if missing:
        raise StoreError("\n".join(sorted(missing)))
    return [found[path] for path in sorted(found, key=StorePath.basename)]
