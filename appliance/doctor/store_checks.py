"""Where the store is: rights, file system, space, and whether LMDB works there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from appliance.doctor.findings import STORING, Finding, Use, advice, good, lacking
from appliance.doctor.trial import attempt
from appliance.system import libc

_GIB: Final = 1 << 30
_MAP_BYTES: Final = _GIB
_TRIAL_FILE_BYTES: Final = 1 << 16
# Their locks and shared maps are not coherent between hosts, which LMDB relies on.
_NETWORK: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "fuse.sshfs", "virtiofs", "afs"}
)
_VOLATILE: Final = frozenset({"tmpfs", "ramfs"})
_WRITING: Final = frozenset({Use.DAEMON, Use.IMPORT})


def store_checks(store: Path) -> Iterator[Finding]:
    """Yield what is to be known about the directory `store`, which may not exist yet."""
    there = next(above for above in (store, *store.absolute().parents) if above.exists())
    yield _rights(store, there)
    yield _file_system(there)
    yield _space(there)
    yield _database(there)


def _rights(store: Path, there: Path) -> Finding:
    subject = "rights on the store"
    if os.access(there, os.R_OK | os.W_OK | os.X_OK):
        absent = "" if there == store else f"; {store} is created when it is first used"
        return good(subject, STORING, f"{there} can be written{absent}")
    me = os.geteuid()
    if there == store and os.access(there, os.R_OK | os.X_OK):
        found = f"{store} can be read, not written, so readers are not registered"
        return advice(subject, STORING, found, f"chown -R {me} {store}")
    remedy = f"install -d -o {me} -m 750 {store}"
    return lacking(subject, STORING, f"{there} cannot be used by user {me}", remedy)


def _file_system(there: Path) -> Finding:
    subject = "file system of the store"
    kind = _kind_of_mount(there)
    if kind in _NETWORK:
        remedy = "put the store on a local disk, and other hosts' stores behind `appliance daemon`"
        found = f"{kind}, on which LMDB's locks and maps are not reliable"
        return lacking(subject, STORING, found, remedy)
    if kind in _VOLATILE:
        remedy = "put the store on a disk: --store lmdb:///DIR"
        return advice(subject, STORING, f"{kind}, which is empty after the next boot", remedy)
    return good(subject, STORING, kind)


def _kind_of_mount(path: Path) -> str:
    """Return the type of the file system that `path` is on, from the list of mounts."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    real = path.resolve()
    kinds = {}
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields, _dash, kind_fields = line.partition(" - ")
        words = fields.split()
        place = Path(words[4].encode().decode("unicode_escape"))
        if words[2] == number or real.is_relative_to(place):
            # The number is the surest (btrfs has others); among the rest, the innermost mount.
            kinds[words[2] == number, len(place.parts)] = kind_fields.split()[0]
    return kinds[max(kinds)]


def _space(there: Path) -> Finding:
    subject = "space for the store"
    usage = shutil.disk_usage(there)
    inodes = os.statvfs(there)
    found = f"{usage.free / _GIB:.1f} GiB free of {usage.total / _GIB:.1f} GiB"
    remedy = "delete store paths, or put the store elsewhere: --store lmdb:///DIR"
    if inodes.f_files and not inodes.f_favail:
        return lacking(subject, _WRITING, f"{found}, but no inode is free", remedy)
    if usage.free < _GIB:
        return advice(subject, _WRITING, found, remedy)
    return good(subject, _WRITING, found)


def _database(there: Path) -> Finding:
    """Make an LMDB environment beside the store, and what blob files need, and remove both."""
    subject = "LMDB on that file system"
    if not os.access(there, os.W_OK | os.X_OK):
        return good(subject, STORING, "not tried, because nothing can be written there")
    remedy = "put the store on a local disk (ext4, XFS, btrfs): --store lmdb:///DIR"
    with tempfile.TemporaryDirectory(prefix=".appliance-doctor-", dir=there) as directory:
        trial = attempt(lambda: _write_database(Path(directory)))
        if not trial.is_success:
            return lacking(subject, STORING, trial.text, remedy)
        reserving = attempt(lambda: _reserve(Path(directory)))
    if reserving.is_success:
        return good(subject, STORING, f"{trial.text}, and {reserving.text}")
    # The store does without (`db/data_file.py`).
    found = f"{trial.text}; space cannot be reserved, so a full disk is found out late"
    return advice(subject, _WRITING, f"{found}: {reserving.text}", remedy)


def _write_database(directory: Path) -> str:
    import lmdb  # noqa: PLC0415 - never before a fork

    with lmdb.open(os.fspath(directory), map_size=_MAP_BYTES) as environment:
        with environment.begin(write=True) as txn:
            txn.put(b"key", b"value")
        with environment.begin() as txn:
            if txn.get(b"key") != b"value":
                raise OSError("what was written could not be read")
        with (directory / "blob").open("wb") as file:
            file.write(bytes(_TRIAL_FILE_BYTES))
            os.fsync(file.fileno())
            libc.syncfs(file.fileno())
    return "works"


def _reserve(directory: Path) -> str:
    with (directory / "reserved").open("wb") as file:
        libc.fallocate(file.fileno(), _TRIAL_FILE_BYTES)
    return "space can be reserved"
