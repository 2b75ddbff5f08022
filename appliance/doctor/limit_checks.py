"""Limits on resources: descriptors, memory, address space, processes."""

import mmap
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from appliance.doctor.findings import SERVING, STORING, Finding, Use, advice, good, lacking
from appliance.doctor.trial import attempt
from appliance.system import libc

_MIB: Final = 1 << 20
_GIB: Final = 1 << 30
# What the units ask for.
_DESCRIPTORS_ENOUGH: Final = 65536
_DESCRIPTORS_MIN: Final = 256
# LMDB's map doubles with the store, so this is a store of 32 GiB beside its blob files.
_MAP_ENOUGH_BYTES: Final = 64 * _GIB
_MAP_MIN_BYTES: Final = _GIB
_SHM: Final = Path("/dev/shm")  # noqa: S108 - checked, not written to by name
_SHM_ENOUGH_BYTES: Final = _GIB
_LOCKED_BYTES: Final = 64 << 10
_CGROUPS: Final = Path("/sys/fs/cgroup")
_MEMORY_ENOUGH_BYTES: Final = 256 * _MIB
# A supervisor, its fork server, and a worker for each of 16 queues of some guests.
_PROCESSES_ENOUGH: Final = 256
# Version 1 of control groups has no word for no limit, but a number beyond all memory.
_NO_LIMIT: Final = 1 << 60


def limit_checks() -> Iterator[Finding]:
    """Yield what limits this process has inherited."""
    yield _descriptors()
    yield _address_space()
    yield _locked_memory()
    yield _shared_memory()
    yield _processes()
    yield from _control_groups()


def _descriptors() -> Finding:
    subject = "open descriptors"
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    system = int(Path("/proc/sys/fs/nr_open").read_text())
    limit = system if hard == resource.RLIM_INFINITY else min(hard, system)

    def work() -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        os.dup2(0, limit - 1)
        return f"up to {limit}"

    trial = attempt(work)
    remedy = (
        f"LimitNOFILE={_DESCRIPTORS_ENOUGH} in the service, or `ulimit -Hn {_DESCRIPTORS_ENOUGH}`"
    )
    uses = SERVING | {Use.DAEMON}
    if not trial.is_success or limit < _DESCRIPTORS_MIN:
        return lacking(subject, uses, trial.text, remedy)
    if limit < _DESCRIPTORS_ENOUGH:
        return advice(subject, uses, f"{trial.text}, so few guests or clients", remedy)
    return good(subject, uses, trial.text)


def _address_space() -> Finding:
    """Map a sparse file, as LMDB maps its data file."""
    subject = "address space for LMDB"

    def largest() -> str:
        size = _MAP_ENOUGH_BYTES
        fd = os.memfd_create("trial")
        while size >= _MIB:
            try:
                os.ftruncate(fd, size)
                mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ).close()
            except OSError:
                size //= 2
            else:
                break
        return str(size)

    trial = attempt(largest)
    if not trial.is_success:
        return lacking(subject, STORING, trial.text, "ulimit -v unlimited; ulimit -f unlimited")
    size = int(trial.text)
    found = f"a map of {size // _MIB} MiB"
    if size >= _MAP_ENOUGH_BYTES:
        return good(subject, STORING, found)
    remedy = "LimitAS=infinity in the service, or `ulimit -v unlimited`"
    if size < _MAP_MIN_BYTES:
        return lacking(subject, STORING, f"{found} at most", remedy)
    return advice(subject, STORING, f"{found} at most, which bounds the store", remedy)


def _locked_memory() -> Finding:
    subject = "locked memory"

    def work() -> str:
        libc.lock_memory(mmap.mmap(-1, _LOCKED_BYTES))
        return ""

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    most = "without limit" if limit == resource.RLIM_INFINITY else f"up to {limit // 1024} KiB"
    trial = attempt(work)
    uses = frozenset({Use.VIRTIOFS})
    if trial.is_success:
        return good(subject, uses, f"{most}; only VMMs that lock guest memory need it")
    remedy = "LimitMEMLOCK=infinity in the service of VMMs that lock guest memory"
    return advice(subject, uses, f"{most}: {trial.text}", remedy)


def _shared_memory() -> Finding:
    subject = f"shared memory ({_SHM})"
    uses = frozenset({Use.VIRTIOFS, Use.TESTS})
    remedy = f"mount -o remount,size=50% {_SHM}   (Docker: --shm-size; Kubernetes: an emptyDir)"

    def work() -> str:
        fd = os.open(_SHM, os.O_TMPFILE | os.O_RDWR, 0o600)
        libc.fallocate(fd, mmap.PAGESIZE)
        mmap.mmap(fd, mmap.PAGESIZE).close()
        return ""

    trial = attempt(work)
    if not trial.is_success:
        return advice(subject, uses, f"{trial.text}; VMMs need memory files then", remedy)
    room = os.statvfs(_SHM)
    free_bytes = room.f_bavail * room.f_frsize
    found = f"{free_bytes // _MIB} MiB free of {room.f_blocks * room.f_frsize // _MIB} MiB"
    if free_bytes < _SHM_ENOUGH_BYTES:
        return advice(subject, uses, f"{found}; guests whose memory is there need more", remedy)
    return good(subject, uses, found)


def _processes() -> Finding:
    subject = "processes of this user"
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if limit == resource.RLIM_INFINITY or os.geteuid() == 0:
        return good(subject, SERVING, "without limit")
    if limit >= _PROCESSES_ENOUGH:
        return good(subject, SERVING, f"up to {limit}")
    remedy = f"`ulimit -u {_PROCESSES_ENOUGH}`, or a line in /etc/security/limits.conf"
    return advice(subject, SERVING, f"up to {limit}, with a worker for each queue", remedy)


# --- Control groups ---


class _GroupLimit(NamedTuple):
    controller: str
    files: tuple[str, str]
    """What holds the limit, in version 2 and in version 1 of control groups."""
    enough: int
    unit: int
    unit_name: str
    setting: str
    """What a service calls it."""


_GROUP_LIMITS: Final = (
    _GroupLimit("pids", ("pids.max", "pids.max"), _PROCESSES_ENOUGH, 1, "processes", "TasksMax"),
    _GroupLimit(
        "memory",
        ("memory.max", "memory.limit_in_bytes"),
        _MEMORY_ENOUGH_BYTES,
        _MIB,
        "MiB",
        "MemoryMax",
    ),
)


def _control_groups() -> Iterator[Finding]:
    for rule in _GROUP_LIMITS:
        subject = f"control group ({rule.controller})"
        limits = [
            (limit, path)
            for path in _limit_files(rule)
            if (limit := _limit(path)) is not None and limit < _NO_LIMIT
        ]
        if not limits:
            yield good(subject, SERVING, "without limit")
            continue
        limit, path = min(limits)
        found = f"{limit // rule.unit} {rule.unit_name} by {path}"
        if limit >= rule.enough:
            yield good(subject, SERVING, found)
        else:
            remedy = f"{rule.setting}= in the service, or `echo {rule.enough} > {path}`"
            yield advice(subject, SERVING, found, remedy)


def _limit_files(rule: _GroupLimit) -> Iterator[Path]:
    """Yield the files with a limit of this process's control group, and of those above it."""
    in_version_2, in_version_1 = rule.files
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, place = line.split(":", 2)
        if number == "0":
            yield from _upwards(_CGROUPS, place, in_version_2)
        elif rule.controller in controllers.split(","):
            yield from _upwards(_CGROUPS / rule.controller, place, in_version_1)


def _upwards(top: Path, place: str, name: str) -> Iterator[Path]:
    group = top / place.lstrip("/")
    yield from (each / name for each in (group, *group.parents) if each.is_relative_to(top))


def _limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
