"""The error hierarchy: who broke a rule, and what the catcher must do about it.

Answers to a guest are plain `OSError(errno, ...)`; absence in the store is `None`; a bug is any
other exception. Errors are translated in one place per edge: `fuse_proto.dispatch` (errno), `cli`
(exit status), `rpc.status` (gRPC status).
"""

import errno
import os
from typing import Final

FULL_ERRNOS: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class ApplianceError(Exception):
    """Base of every error this package raises on purpose; its text is meant for a person."""


class ConfigError(ApplianceError):
    """A value from the command line or environment is unusable; the text names it and the rule."""


class ProtocolError(ApplianceError):
    """A peer (guest, front-end, stored bytes) broke a rule of a format; never for our own bugs."""


class VhostError(ProtocolError):
    """A vhost-user request cannot be served: it is refused, or its connection is closed."""


class RingError(ProtocolError):
    """A guest broke its virtqueue: that vring stops and its err fd is signalled, nothing else."""


class FuseDecodeError(ProtocolError):
    """A FUSE request cannot be decoded: it is answered with EIO and counted."""


class NarError(ProtocolError):
    """A NAR is malformed, or its content is not what was stated."""


class DirectoryError(ProtocolError):
    """A castore Directory (or a node of it) breaks a rule; the object is rejected."""


class PathInfoError(ProtocolError):
    """A PathInfo or a store path breaks a rule; the object is rejected."""


class InvalidRequestError(ProtocolError):
    """A service refuses a request for a rule of the service; the text names it."""


class StoreError(ApplianceError):
    """A store cannot do what was asked."""


class ContentMissingError(StoreError):
    """A blob or directory that something else refers to is not in the store."""


class ServiceUnavailableError(StoreError):
    """A remote service cannot be reached, or does not answer in time; asking again may help."""


class ServiceLimitError(StoreError):
    """A remote service, or the way to it, refuses for a limit of its own: of size, of calls."""


class CorruptBlobError(StoreError):
    """Stored content does not have the digest it is stored under."""


class WrongDigestError(CorruptBlobError):
    """As its base says; both digests, as they are shown, are known."""

    def __init__(self, what: str, expected: object, actual: object) -> None:
        super().__init__(f"{what} {expected}: the content has the digest {actual}")
        self.expected = expected
        self.actual = actual


class AlreadyExistsError(StoreError):
    """A store path has other content already, and keeps it."""


class ReadOnlyStoreError(StoreError):
    """A store that this process may only read was asked to keep something."""


class PidInUseError(StoreError):
    """LMDB takes this process for another one, of another PID namespace: they share an id."""

    def __init__(self, lock_path: str, pid: int) -> None:
        super().__init__(
            f"{lock_path}: process id {pid} is in use there by a process of another PID namespace"
        )
        self.lock_path = lock_path


class SnapshotLostError(StoreError):
    """What was read without a lock was written meanwhile; reading again helps."""


class StoreFullError(StoreError):
    """The disk under the store is full."""


class SchemaVersionError(StoreError):
    """The store or index on disk was written by an incompatible version."""


class ImportTreeError(ApplianceError):
    """A path cannot be imported; the text names it and the rule. The store keeps none of it."""


class MountError(ApplianceError):
    """A mount point cannot be used; the text names it and why."""


class BenchError(ApplianceError):
    """A measurement cannot be made: the back-end is gone, silent or wrong; the text says how."""


def disk_error(exc: OSError, path: str | os.PathLike[str]) -> StoreError:
    """Return the error of the store for `exc`, which names `path` unless it names a file itself."""
    kind = StoreFullError if exc.errno in FULL_ERRNOS else StoreError
    return kind(f"{exc.filename or path}: {exc.strerror}")
