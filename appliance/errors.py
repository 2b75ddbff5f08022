"""The error hierarchy: what failed, and what the catcher must do about it.

There is one class per way of catching. Where only the broken rule differs, errors share a class
and carry the rule as a short stable slug in `rule`.

Answers to a guest are plain `OSError(errno, ...)`; absence in the store is `None`; any other
exception is a bug. Errors are translated in one place per edge: `fuse_proto.dispatch` (errno),
`cli` (exit status), `services.grpc_status` (gRPC status).
"""

import errno
import os
from typing import Final

FULL_ERRNOS: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class ApplianceError(Exception):
    """Base of every error this package raises on purpose; its text is meant for a person.

    `rule` names the broken rule, for instance `"missing-dash"`; it is empty where the class and
    the text say enough.
    """

    def __init__(self, text: str = "", *, rule: str = "") -> None:
        super().__init__(text)
        self.rule = rule


class ConfigError(ApplianceError):
    """A value from the command line or environment is unusable; the text names it and the rule."""


class ProtocolError(ApplianceError):
    """A peer (guest, front-end, stored bytes) broke a rule of a format; never for our own bugs."""


class VhostError(ProtocolError):
    """A vhost-user request cannot be served: refuse it, or close its connection."""


class RingError(ProtocolError):
    """A guest broke its virtqueue: stop that vring and signal its err fd, nothing else."""


class FuseDecodeError(ProtocolError):
    """A FUSE request cannot be decoded: answer it with EIO and count it."""


class NarError(ProtocolError):
    """A NAR is malformed, or its content is not what its node states."""


class DirectoryError(ProtocolError):
    """A castore object (Directory, node, name, digest, closure) breaks a rule: reject it."""


class PathInfoError(ProtocolError):
    """Nix metadata (PathInfo, narinfo, store path, hash, key) breaks a rule: reject it."""


class InvalidRequestError(ProtocolError):
    """A service refuses a request because of a rule of its own; the text names the rule."""


class StoreError(ApplianceError):
    """A store cannot do what was asked."""


class ContentMissingError(StoreError):
    """A blob or directory that something else refers to is not in the store."""


class ServiceUnavailableError(StoreError):
    """A remote service cannot be reached, or does not answer in time: a retry may help.

    `is_final` is set once it has been retried for as long as a request may take.
    """

    is_final = False


class ServiceLimitError(StoreError):
    """A remote service, or the connection to it, refuses a message size or a number of calls."""


class CorruptBlobError(StoreError):
    """Stored content does not have the digest it is stored under."""


class WrongDigestError(CorruptBlobError):
    """Stored content has another digest, `actual`, than the one it is stored under."""

    def __init__(self, what: str, expected: object, actual: object) -> None:
        super().__init__(f"{what} {expected}: the content has the digest {actual}")
        self.actual = actual


class AlreadyExistsError(StoreError):
    """A store path already has other content, which it keeps."""


class ReadOnlyStoreError(StoreError):
    """A write was asked of a store that this process may only read."""


class PidInUseError(StoreError):
    """A process of another PID namespace has the same id, so LMDB cannot tell the two apart."""

    def __init__(self, lock_path: str, pid: int) -> None:
        super().__init__(
            f"{lock_path}: process id {pid} is in use there by a process of another PID namespace"
        )
        self.lock_path = lock_path


class SnapshotLostError(StoreError):
    """Data read without a lock was overwritten meanwhile: a second read helps."""


class StoreFullError(StoreError):
    """The disk that holds the store is full."""


class SchemaVersionError(StoreError):
    """The store or index on disk was written by an incompatible version."""


class ImportTreeError(ApplianceError):
    """A path cannot be imported; the text names it and the rule. The store keeps none of it."""


class MountError(ApplianceError):
    """A mount point cannot be used; the text names it and why."""


class BenchError(ApplianceError):
    """A measurement cannot be made: the back-end is gone, silent or wrong; the text says how."""


def disk_error(exc: OSError, path: str | os.PathLike[str]) -> StoreError:
    """Return the store error for `exc`; its text names the file of `exc`, or else `path`."""
    kind = StoreFullError if exc.errno in FULL_ERRNOS else StoreError
    return kind(f"{exc.filename or path}: {exc.strerror}")
