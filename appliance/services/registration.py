"""Registrations: the input of `nix-store --load-db`, as closureInfo in nixpkgs writes it.

Each path has these lines: the path, the hash of its NAR, the size of the NAR in bytes, the deriver
or an empty line, the number of references, and one line per reference.
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
    """A path, and what Nix registers about it."""

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
    """Return `paths`, with their closure if `is_recursive`, in ascending order.

    Raises:
        StoreError: some are not in the store: one line for each.
        PathInfoError: the store does not know the NAR hash or the references of a path.
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
            why = f", a reference of {referrer.absolute()}," if referrer else ""
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
