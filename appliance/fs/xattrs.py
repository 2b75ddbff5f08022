"""Extended attributes: the castore digest of a file or directory, under two names.

Two implementations of the store protocol show it, each under a name and in a notation of its own;
here both do. The value is text without a NUL. The attributes are not listed.
"""

from base64 import b64encode
from errno import ENODATA, ERANGE
from typing import Final, NamedTuple

from appliance.fuse_proto._wire import GetxattrOut, pack_getxattr_out
from appliance.images.layout import Kind


class _Attribute(NamedTuple):
    name: bytes
    prefix: bytes


_OF_BLOB: Final = (
    _Attribute(b"user.snix.castore.blob.digest", b"blake3-"),
    _Attribute(b"user.tvix.castore.blob.digest", b"b3:"),
)
_OF_DIRECTORY: Final = (
    _Attribute(b"user.snix.castore.directory.digest", b"blake3-"),
    _Attribute(b"user.tvix.castore.directory.digest", b"b3:"),
)
_BY_KIND: Final[dict[int, tuple[_Attribute, ...]]] = {
    Kind.DIRECTORY: _OF_DIRECTORY,
    Kind.FILE: _OF_BLOB,
    Kind.EXECUTABLE: _OF_BLOB,
    Kind.SYMLINK: (),
}


def value_of(kind: int, digest: bytes, name: bytes) -> bytes:
    """Return the value of attribute `name`.

    Raises:
        OSError: ENODATA, there is no such attribute.
    """
    for attribute in _BY_KIND[kind]:
        if attribute.name == name:
            return attribute.prefix + b64encode(digest)
    raise OSError(ENODATA, "no such attribute")


def sized_reply(value: bytes, size: int) -> bytes:
    """Return the reply to GETXATTR and LISTXATTR: `value`, or its size when `size` is 0.

    Raises:
        OSError: ERANGE, the value is longer than `size`.
    """
    if size == 0:
        return pack_getxattr_out(GetxattrOut(len(value)))
    if len(value) > size:
        raise OSError(ERANGE, f"{len(value)} bytes do not fit {size}")
    return value
