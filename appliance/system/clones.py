"""Files that share their blocks with others, where the file system can (ioctl_ficlone(2))."""

import errno
import fcntl
from typing import Final

# linux/fs.h: _IOW(0x94, 9, int).
_FICLONE: Final = 0x40049409
# What it fails with where two files cannot share blocks: on other file systems, on two of them, or
# for files of a special kind.
_NOT_CLONEABLE: Final = frozenset(
    {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM}
)


def clone_file(source_fd: int, target_fd: int) -> bool:
    """Make the empty file `target_fd` share all blocks of `source_fd`.

    Later writes to either file do not change the other one.

    Returns:
        Whether it does; without, the file system cannot do that, and nothing has changed.
    """
    try:
        fcntl.ioctl(target_fd, _FICLONE, source_fd)
    except OSError as exc:
        if exc.errno in _NOT_CLONEABLE:
            return False
        raise
    return True
