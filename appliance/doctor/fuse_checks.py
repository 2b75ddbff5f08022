"""Whether this host can mount: by mounting something, as `appliance mount` does."""

import os
import select
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from appliance.doctor.findings import Finding, Use, advice, good, lacking
from appliance.doctor.trial import attempt
from appliance.fuse_proto._fuse_wire import (
    IN_HEADER_SIZE,
    INIT_IN_SIZE,
    InitFlag,
    unpack_init_in,
)
from appliance.supervisor.mountpoint import MountFlags, Mountpoint

_DEVICE: Final = Path("/dev/fuse")
_FUSERMOUNT: Final = "fusermount3"
_FUSE_CONF: Final = Path("/etc/fuse.conf")
_MOUNT: Final = frozenset({Use.MOUNT})
_INIT_WAIT_MS: Final = 5000
_REQUEST_BYTES: Final = 1 << 20
# Linux 6.9: requests that a dead worker had read can be sent again.
_MINOR_WITH_RESEND: Final = 40


def fuse_checks() -> Iterator[Finding]:
    """Yield whether mounts work here, and what the kernel's FUSE offers."""
    yield _device()
    yield _helper()
    yield _allow_other()
    yield from _trial_mount()


def _device() -> Finding:
    subject = str(_DEVICE)
    try:
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        remedy = "modprobe fuse   (a container needs --device /dev/fuse)"
        return lacking(subject, _MOUNT, "not there", remedy)
    except OSError as exc:
        remedy = f"chmod 666 {_DEVICE}   (a container needs --device /dev/fuse)"
        return lacking(subject, _MOUNT, f"cannot be opened: {exc.strerror}", remedy)
    return good(subject, _MOUNT, "can be opened")


def _helper() -> Finding:
    path = shutil.which(_FUSERMOUNT)
    if path is None:
        found, remedy = "not installed", "apt-get install fuse3"
        if os.geteuid() == 0:
            return advice(_FUSERMOUNT, _MOUNT, f"{found}; only root can mount", remedy)
        return lacking(_FUSERMOUNT, _MOUNT, found, remedy)
    mode = Path(path).stat()
    if mode.st_mode & stat.S_ISUID and mode.st_uid == 0:
        return good(_FUSERMOUNT, _MOUNT, f"{path}, set-uid root")
    found = f"{path} is not set-uid root, so only root can mount"
    remedy = f"chown root: {path} && chmod u+s {path}"
    if os.geteuid() == 0:
        return advice(_FUSERMOUNT, _MOUNT, found, remedy)
    return lacking(_FUSERMOUNT, _MOUNT, found, remedy)


def _allow_other() -> Finding:
    subject = "--allow-other"
    if os.geteuid() == 0:
        return good(subject, _MOUNT, "root may use it")
    with suppress(OSError):
        if "user_allow_other" in map(str.strip, _FUSE_CONF.read_text().splitlines()):
            return good(subject, _MOUNT, f"allowed by {_FUSE_CONF}")
    remedy = f"echo user_allow_other >> {_FUSE_CONF}"
    return advice(subject, _MOUNT, f"not allowed by {_FUSE_CONF}", remedy)


def _trial_mount() -> Iterator[Finding]:
    subject = "a mount"
    with tempfile.TemporaryDirectory(prefix="appliance-doctor-") as directory:
        trial = attempt(lambda: _mount_once(Path(directory)))
    if not trial.is_success:
        remedy = "see the findings above   (a container needs --cap-add SYS_ADMIN)"
        yield lacking(subject, _MOUNT, trial.text.replace(directory, "DIR"), remedy)
        return
    minor, flags = map(int, trial.text.split())
    yield good(subject, _MOUNT, f"FUSE 7.{minor}, and its device can be cloned")
    subject = "requests survive a dead worker"
    if minor >= _MINOR_WITH_RESEND:
        yield good(subject, _MOUNT, "the kernel sends them again")
    else:
        found = "requests that a killed worker had read fail with an error"
        yield advice(subject, _MOUNT, found, "boot Linux 6.9 or newer")
    subject = "--passthrough"
    if flags & InitFlag.PASSTHROUGH:
        yield good(subject, _MOUNT, "the kernel offers it")
    else:
        remedy = "boot Linux 6.9 or newer with CONFIG_FUSE_PASSTHROUGH"
        yield advice(subject, _MOUNT, "the kernel does not offer it", remedy)


def _mount_once(directory: Path) -> str:
    """Mount on `directory`, read INIT, clone the device, unmount.

    Returns:
        The minor version of the kernel's protocol, and the flags that it offers.
    """
    flags = MountFlags("appliance-doctor", allows_other=False, is_noexec=True)
    mountpoint = Mountpoint(directory, flags)
    mountpoint.mount()
    try:
        poll = select.poll()
        poll.register(mountpoint.fd, select.POLLIN)
        if not poll.poll(_INIT_WAIT_MS):
            raise OSError("the kernel sent no INIT")
        request = os.read(mountpoint.fd, _REQUEST_BYTES)
        os.close(mountpoint.clone())
    finally:
        mountpoint.unmount()
        mountpoint.close()
    # Kernels before 7.36 send a shorter one, without further flags.
    init = unpack_init_in(request[IN_HEADER_SIZE:].ljust(INIT_IN_SIZE, b"\0"))
    return f"{init.minor} {init.flags | init.flags2 << 32}"
