"""The layout of a store: its files, its databases, and the encoding of keys and values.

data.mdb, lock.mdb    the LMDB environment
blobs/ab/abcd...      content of each blob over 64 KiB, named by its digest in hexadecimal; a file
                      without a record in the database `blobs` means nothing
tmp/PID-N/            files that a process is writing; swept once that process has ended
roots/NAME            store paths that garbage collection keeps (appliance/store/root_lists.py)
leases/ID             what a session or import holds on to (appliance/store/leases.py)

database        key                         value
meta            "version"                   u64 LE, VERSION
                "generation"                u64 LE, number of PathInfos ever put
                "id"                        16 random bytes; only copies of a store share them
                "sweeps"                    u64 LE, number of commits that removed something
                "swept_at"                  u64 LE, time of the last of them
blobs           digest                      0, content | 1, size as u64 LE; in a cache also 2, with
                                            what is there of a blob (store/partial_blob.py)
chunks          digest of a blob            its chunks, as `castore/chunking.py` packs them; a blob
                                            without an entry is not cut, or was put by a release
                                            that cut none
chunk_places    digest of a chunk, and of   offset and size of the chunk in the file of that blob,
                a blob that has it          as u64 LE and u32 LE; where it is first, if repeated
directories     digest                      Directory, canonical encoding
images1         digest                      first piece of the image of a Directory, put in the
                                            transaction that makes the Directory visible; 1 is the
                                            version of the layout (appliance/images/layout.py)
                digest, piece as u32 BE     each further piece of a large image; these mean nothing
                                            without the first
path_infos      digest of the store path    PathInfo
path_info_log   generation as u64 BE        digest of the store path put as that generation
nar_infos       digest of a nameless Node   size of the node's NAR as u64 LE, SHA-256 of that NAR
path_times      digest of the store path    u64 LE, when its PathInfo was last put; a path that an
                                            earlier release put has none
recent_puts     time of a commit as u64 BE  digests of the blobs and Directories that the commit put
                                            or found there (appliance/store/recent_puts.py)

Times are CLOCK_REALTIME in nanoseconds.
"""

import struct
from typing import Final

VERSION: Final = 1
INLINE_MAX: Final = 64 * 1024

META: Final = b"meta"
BLOBS: Final = b"blobs"
DIRECTORIES: Final = b"directories"
CHUNKS: Final = b"chunks"
CHUNK_PLACES: Final = b"chunk_places"
IMAGES: Final = b"images1"
PATH_INFOS: Final = b"path_infos"
PATH_INFO_LOG: Final = b"path_info_log"
NAR_INFOS: Final = b"nar_infos"
PATH_TIMES: Final = b"path_times"
RECENT_PUTS: Final = b"recent_puts"
DATABASES: Final = (META, BLOBS, DIRECTORIES, PATH_INFOS, PATH_INFO_LOG, NAR_INFOS)
# A store of an earlier release lacks these until it is opened for writing.
NEWER_DATABASES: Final = (IMAGES, CHUNKS, CHUNK_PLACES, PATH_TIMES, RECENT_PUTS)

VERSION_KEY: Final = b"version"
GENERATION_KEY: Final = b"generation"
ID_KEY: Final = b"id"
SWEEPS_KEY: Final = b"sweeps"
SWEPT_AT_KEY: Final = b"swept_at"
ID_SIZE: Final = 16

INLINE: Final = 0
IN_FILE: Final = 1
PARTIAL: Final = 2

BLOBS_DIRECTORY: Final = "blobs"
TEMP_DIRECTORY: Final = "tmp"
ROOTS_DIRECTORY: Final = "roots"
VIEWS_DIRECTORY: Final = "views"
LEASES_DIRECTORY: Final = "leases"

_NUMBER: Final = struct.Struct("<Q")
_LOG_KEY: Final = struct.Struct(">Q")
_PIECE_KEY: Final = struct.Struct(">I")
_FILE_RECORD: Final = struct.Struct("<BQ")
_NAR_INFO: Final = struct.Struct("<Q32s")
_INLINE_PREFIX: Final = bytes([INLINE])


def pack_number(number: int) -> bytes:
    """Encode a value of `meta`."""
    return _NUMBER.pack(number)


def unpack_number(value: bytes | memoryview | None) -> int:
    """Decode a value of `meta`; an absent one is 0."""
    if value is None:
        return 0
    (number,) = _NUMBER.unpack(value)
    return int(number)


def pack_log_key(generation: int) -> bytes:
    """Encode a key of `path_info_log`; keys sort in the order of their generations."""
    return _LOG_KEY.pack(generation)


def unpack_log_key(key: bytes | memoryview) -> int:
    """Decode a key of `path_info_log`."""
    (generation,) = _LOG_KEY.unpack(key)
    return int(generation)


def image_key(digest: bytes, piece: int) -> bytes:
    """Encode a key of `images1`."""
    return digest + _PIECE_KEY.pack(piece) if piece else digest


def pack_nar_info(size: int, sha256: bytes) -> bytes:
    """Encode a value of `nar_infos`."""
    return _NAR_INFO.pack(size, sha256)


def unpack_nar_info(value: bytes | memoryview) -> tuple[int, bytes]:
    """Decode size and SHA-256 from a value of `nar_infos`."""
    size, sha256 = _NAR_INFO.unpack(value)
    return int(size), bytes(sha256)


def pack_inline(content: bytes | bytearray | memoryview) -> bytes:
    """Encode the record of a blob kept inline."""
    return _INLINE_PREFIX + content


def inline_content(record: bytes | memoryview) -> memoryview:
    """Return the content in the record of a blob kept inline."""
    return memoryview(record)[1:]


def pack_file_record(size: int) -> bytes:
    """Encode the record of a blob kept in a file."""
    return _FILE_RECORD.pack(IN_FILE, size)


def unpack_file_record(value: bytes | memoryview) -> int:
    """Decode the size in the record of a blob kept in a file."""
    _, size = _FILE_RECORD.unpack(value)
    return int(size)
