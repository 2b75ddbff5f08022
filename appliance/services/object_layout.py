"""Where objects are in an object store, and how their content is encoded.

blobs/b3/HHHH/DIGEST    the list of a blob's chunks, a StatBlobResponse; empty (no bytes) if the
                        blob is one chunk
chunks/b3/HHHH/DIGEST   a chunk, compressed with zstd
dirs/b3/HHHH/DIGEST     a closure of Directories by the digest of its root, compressed with zstd:
                        each one behind its length (u32, big-endian), parents before children
pathinfos/HH/DIGEST     a PathInfo, by the digest of its store path in the base 32 of Nix

DIGEST is in lower-case hexadecimal, and HHHH its first four digits; of a store path's digest, HH is
the first two characters. The first three are those of Tvix and Snix; a blob is cut as they cut it,
however small it is. The last one is ours.

Who writes puts chunks first, then the list, then the closure, and then the PathInfo, so that
whatever is visible is whole. A blob exists if its list does.
"""

import io
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import zstandard
from google.protobuf.message import DecodeError

from appliance.castore.chunking import BlobChunk
from appliance.castore.digest import Digest
from appliance.castore.directory_encoder import ENCODED_MAX
from appliance.errors import CorruptBlobError, DirectoryError
from appliance.nix.store_path import encode_base32
from appliance.protos import castore_rpc_pb2 as pb

PATH_INFOS: Final = "pathinfos"
# Bytes of a compressed chunk, of a list, and of a compressed closure, at most.
CHUNK_OBJECT_MAX: Final = 16 << 20
LIST_OBJECT_MAX: Final = 64 << 20
CLOSURE_OBJECT_MAX: Final = 256 << 20
PATH_INFO_OBJECT_MAX: Final = 4 << 20
# Bytes of a chunk that is not a part of anything larger.
_CHUNK_MAX: Final = 64 << 20
_LENGTH: Final = struct.Struct(">I")
# Of zstd: the default of its own tools, and of Snix.
_LEVEL: Final = 3


def list_key(digest: Digest) -> str:
    """Return the name of the list of a blob's chunks."""
    return _key("blobs", digest)


def chunk_key(digest: Digest) -> str:
    """Return the name of a chunk."""
    return _key("chunks", digest)


def closure_key(digest: Digest) -> str:
    """Return the name of a closure of Directories, by the digest of its root."""
    return _key("dirs", digest)


def path_info_key(path_digest: bytes) -> str:
    """Return the name of a PathInfo, by the digest of its store path."""
    text = encode_base32(path_digest)
    return f"{PATH_INFOS}/{text[:2]}/{text}"


def _key(kind: str, digest: Digest) -> str:
    text = digest.hex()
    return f"{kind}/b3/{text[:4]}/{text}"


# --- Lists of chunks ---


def encode_list(chunks: Sequence[BlobChunk]) -> bytes:
    """Encode the list of a blob's chunks, which is empty if there is only one."""
    response = pb.StatBlobResponse()
    if len(chunks) > 1:
        for chunk in chunks:
            response.chunks.add(digest=chunk.digest, size=chunk.size)
    return response.SerializeToString()


def decode_list_untrusted(encoded: bytes) -> list[BlobChunk]:
    """Decode a list of chunks.

    Raises:
        CorruptBlobError: it is none.
    """
    try:
        response = pb.StatBlobResponse.FromString(encoded)
        return [BlobChunk(Digest(chunk.digest), chunk.size) for chunk in response.chunks]
    except (DecodeError, DirectoryError) as exc:
        raise CorruptBlobError(f"the list of chunks is malformed: {exc}") from exc


# --- Chunks ---


def compress_chunks(contents: Sequence[bytes | bytearray | memoryview]) -> list[bytes]:
    """Compress chunks, each by itself; other threads run meanwhile."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    return [compressor.compress(content) for content in contents]


def decompress_chunk_untrusted(compressed: bytes, bytes_max: int = _CHUNK_MAX) -> bytes:
    """Decompress a chunk, or its first `bytes_max` + 1 bytes.

    Raises:
        CorruptBlobError: it is not compressed with zstd, or was cut off.
    """
    parts = []
    left = bytes_max + 1
    try:
        size = zstandard.frame_content_size(compressed)
        if 0 <= size <= bytes_max:
            return zstandard.ZstdDecompressor().decompress(compressed)
        # Its writer did not know the size, as Snix's does not, or there is more than is wanted.
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(compressed)) as reader:
            while left and (part := reader.read(min(left, 1 << 20))):
                parts.append(part)
                left -= len(part)
    except zstandard.ZstdError as exc:
        raise CorruptBlobError(f"not compressed with zstd: {exc}") from exc
    return parts[0] if len(parts) == 1 else b"".join(parts)


# --- Closures ---


def compress_closure(encoded: Iterable[bytes]) -> bytes:
    """Compress the encoded Directories of a closure, which come parents first."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL).compressobj()
    parts = []
    for directory in encoded:
        parts += [
            compressor.compress(_LENGTH.pack(len(directory))),
            compressor.compress(directory),
        ]
    parts.append(compressor.flush())
    return b"".join(parts)


def directories_untrusted(compressed: bytes) -> Iterator[bytes]:
    """Yield the encoded Directories of a closure, in order, each of at most 16 MiB.

    Raises:
        CorruptBlobError: the closure is damaged or cut off.
    """
    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(compressed)) as reader:
            while header := _read_up_to(reader, _LENGTH.size):
                size = int.from_bytes(header, "big")
                if size > ENCODED_MAX:
                    raise CorruptBlobError(f"a directory has {size} bytes, at most {ENCODED_MAX}")
                encoded = _read_up_to(reader, size)
                if len(header) < _LENGTH.size or len(encoded) < size:
                    raise CorruptBlobError("the closure ends early")
                yield encoded
    except zstandard.ZstdError as exc:
        raise CorruptBlobError(f"not compressed with zstd: {exc}") from exc


def _read_up_to(reader: zstandard.ZstdDecompressionReader, size: int) -> bytes:
    parts = []
    left = size
    while left and (part := reader.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
