"""Where roots come from: lists, views, leases, what was put lately, and who is importing."""

import time
from pathlib import Path
from typing import NamedTuple

from appliance.castore.digest import Digest
from appliance.nix.store_path import StorePath
from appliance.store.leases import LeaseKind, living_leases
from appliance.store.root_lists import read_listed
from appliance.store.schema import ROOTS_DIRECTORY, VIEWS_DIRECTORY


class Roots(NamedTuple):
    """The roots of a store at one moment.

    Args:
        paths: where each store path is a root, for people, by digest. It need not be in the store.
        names: the same store paths, by digest.
        blobs: blobs that are roots themselves, because a view has them as files.
        objects_since_ns: what was put at this time (CLOCK_REALTIME) or later is kept.
        all_held_by: a lease that holds every path, for people; empty if there is none.
    """

    paths: dict[bytes, str]
    names: dict[bytes, StorePath]
    blobs: list[Digest]
    objects_since_ns: int
    all_held_by: str


def gather_roots(store_path: Path, grace_s: float) -> Roots:
    """Read the roots; the caller holds their lock exclusively (`root_lists.roots_locked`).

    Args:
        store_path: directory of the store.
        grace_s: for how many seconds what was put is kept. What was put since the beginning of an
            import that still runs is kept in any case.

    Raises:
        StoreError: a list, view or lease breaks a rule, or the disk failed.
    """
    roots = Roots({}, {}, [], 0, "")
    for directory in (ROOTS_DIRECTORY, VIEWS_DIRECTORY):
        for path in sorted((store_path / directory).glob("[A-Za-z0-9]*")):
            listed = read_listed(path)
            roots.blobs.extend(listed.blobs)
            for one in listed.paths:
                _add(roots, one, f"{directory}/{path.name}")
    since_ns = time.time_ns() - int(grace_s * 10**9)
    all_held_by = ""
    for lease in living_leases(store_path):
        where = f"leases/{lease.lease_id}" + (f" ({lease.owner})" if lease.owner else "")
        if lease.kind == LeaseKind.IMPORT:
            since_ns = min(since_ns, lease.since_ns)
        if lease.holds_all:
            all_held_by = where
        for one in lease.paths:
            _add(roots, one, where)
    return roots._replace(objects_since_ns=since_ns, all_held_by=all_held_by)


def _add(roots: Roots, path: StorePath, where: str) -> None:
    roots.paths.setdefault(path.digest, where)
    roots.names.setdefault(path.digest, path)
