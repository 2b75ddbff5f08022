"""Registrations: the input of `nix-store --load-db`, as closureInfo in nixpkgs writes it.

Each path has these lines: the path, the hash of its NAR, the size of the NAR in bytes, the deriver
or an empty line, the number of references, and one line per reference.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from appliance.errors import StoreError
from appliance.nix.narinfo import NarInfoFile, narinfo_of
from appliance.nix.store_path import StorePath
from appliance.services.closures import look_up
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
    known = await look_up(services.path_infos, paths, is_recursive=is_recursive)
    if known.missing:
        raise StoreError("\n".join(known.problems()))
    return [
        Registered(path, narinfo_of(known.found[path]))
        for path in sorted(known.found, key=StorePath.basename)
    ]
