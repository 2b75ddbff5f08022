"""How the worker of a ring gets its dirty log."""

from appliance.dirty_log import DirtyLog
from appliance.errors import RingError
from appliance.protos import control_pb2 as pb


def open_log(log: pb.DirtyLog, fd: int | None = None) -> DirtyLog | None:
    """Return the log that a message describes, in the file `fd` (lent); None if there is no file.

    Raises:
        RingError: it cannot be mapped.
    """
    if fd is None:
        return None
    used_addr = log.used_addr if log.HasField("used_addr") else None
    try:
        return DirtyLog(fd, log.size, log.offset, used_addr)
    except (ValueError, OSError) as exc:
        raise RingError(f"dirty log: {exc}") from exc
