"""Landlock: rules by which a process gives up access to files, the network and other processes.

The kernel says which version of the interface it has (its ABI). Each version can take away more
than the one before, and refuses bits that it does not know. Only what is opened after the
restriction is affected; descriptors that are open stay as they are.
"""

import errno
import os
import struct
from typing import Final

from appliance.system import libc

# The numbers are the same on all architectures.
_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
# linux/landlock.h.
_GET_VERSION: Final = 1
_RULE_PATH_BENEATH: Final = 1
_ACCESS_FS_READ_FILE: Final = 1 << 2
# Rights to files that each ABI has added: of the 13 of the first, to link and rename between
# directories, to truncate, and to use ioctl(2) on devices.
_ACCESS_FS: Final = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
# Binding TCP ports and connecting to them.
_ACCESS_NET: Final = {4: 0b11}
# Abstract Unix sockets and signals, beyond this process and its descendants.
_SCOPES: Final = {6: 0b11}
_SCOPE_SIGNAL: Final = 0b10
# struct landlock_ruleset_attr: files, network and scopes, the last two since some ABI.
_RULESET: Final = struct.Struct("=QQQ")
_RULESET_SIZES: Final = {1: 8, 4: 16, 6: 24}
# struct landlock_path_beneath_attr, which is packed.
_PATH_BENEATH: Final = struct.Struct("=Qi")


def abi() -> int:
    """Return the version of the kernel's Landlock interface, or 0 if there is none.

    There is none in an old kernel, in one that was started without Landlock, and where a filter of
    system calls refuses it.
    """
    try:
        return libc.system_call(_CREATE_RULESET, None, 0, _GET_VERSION)
    except OSError as exc:
        if exc.errno in {errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}:
            return 0
        raise


def ruleset(version: int, *, may_signal: bool = False) -> bytes:
    """Return a struct landlock_ruleset_attr that takes away all that ABI `version` can.

    With `may_signal`, signals to other processes are left out of that.
    """
    rights = (_ACCESS_FS, _ACCESS_NET, _SCOPES)
    words = [sum(bits for since, bits in each.items() if since <= version) for each in rights]
    if may_signal:
        words[2] &= ~_SCOPE_SIGNAL
    size = max(size for since, size in _RULESET_SIZES.items() if since <= version)
    return _RULESET.pack(*words)[:size]


def allow_only_reading(version: int, directory_fd: int | None, *, may_signal: bool = False) -> None:
    """From now on, let this process open files below a directory for reading, and nothing else.

    Privileges or `libc.set_no_new_privileges` are needed.

    Args:
        version: what `abi` returned, not 0.
        directory_fd: a descriptor of the directory (lent), which may be an O_PATH descriptor. None:
            no file can be opened.
        may_signal: whether this process may still send signals to others.

    Raises:
        OSError: the kernel refused.
    """
    attributes = ruleset(version, may_signal=may_signal)
    fd = libc.system_call(_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        if directory_fd is not None:
            rule = _PATH_BENEATH.pack(_ACCESS_FS_READ_FILE, directory_fd)
            libc.system_call(_ADD_RULE, fd, _RULE_PATH_BENEATH, rule, 0)
        libc.system_call(_RESTRICT_SELF, fd, 0)
    finally:
        os.close(fd)
