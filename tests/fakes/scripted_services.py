"""A real gRPC server for the three services, slow and wrong where a test says so."""

import collections
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from appliance.castore.chunking import BlobChunk, Chunker, unpack
from appliance.castore.digest import Digest
from appliance.protos import bulk_pb2, castore_pb2, castore_rpc_pb2, pathinfo_rpc_pb2
from appliance.store import schema
from appliance.store.batch import Batch
from tests.fs.guest import Model, add_path, basename, node_of

# What to hold for the listing of paths to wait.
LISTING = b"listing"
_THREADS = 200
_PIECE = 256 * 1024
_HELD_MAX_S = 60.0


class ScriptedServices:
    """Serves what `put` is given at `uri`.

    Whatever is in `blobs`, `directories` or `path_infos` is sent as it is, right or wrong. A digest
    in `held` gets no answer until it is released; `reads` counts by digest. A recursive request for
    a directory is answered with the stream in `closures`. Stat lists the `chunks` of a blob, and
    Read sends messages of `piece` bytes; `num_sent` counts the bytes of all blobs. Ranges of blobs
    are sent as well if it `sends_ranges`, as peers of other projects do not; `ranges` counts those.
    """

    def __init__(self, directory: Path) -> None:
        self.uri = f"grpc+unix://{directory}/scripted.sock"
        self.blobs: dict[bytes, bytes] = {}
        self.chunks: dict[bytes, list[BlobChunk]] = {}
        self.piece = _PIECE
        self.num_sent = 0
        self.sends_ranges = False
        self.ranges: collections.Counter[bytes] = collections.Counter()
        self._asked = threading.Condition()
        self.directories: dict[bytes, bytes] = {}
        self.path_infos: dict[bytes, bytes] = {}
        self.closures: dict[bytes, list[bytes]] = {}
        self.reads: collections.Counter[bytes] = collections.Counter()
        self.held: dict[bytes, threading.Event] = {}
        self._spare = directory / "spare"
        self._server = grpc.server(ThreadPoolExecutor(_THREADS))
        castore, store = "tvix.castore.v1", "tvix.store.v1"
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers: dict[str, dict[str, Any]] = {
            f"{castore}.BlobService": {"Stat": unary(self._stat), "Read": stream(self._read)},
            "appliance.castore.v1.BulkService": {"ReadRange": stream(self._read_range)},
            f"{castore}.DirectoryService": {"Get": stream(self._directory)},
            f"{store}.PathInfoService": {
                "Get": unary(self._path_info),
                "List": stream(self._list),
            },
        }
        self._server.add_generic_rpc_handlers(
            tuple(
                grpc.method_handlers_generic_handler(service, methods)
                for service, methods in handlers.items()
            )
        )
        self._server.add_insecure_port(f"unix:{directory}/scripted.sock")
        self._server.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for event in self.held.values():
            event.set()
        self._server.stop(None).wait()

    def put(self, model: Model, name: str = "") -> bytes:
        """Take in `model` as a new store path; return its base name."""
        name = name or f"path-{len(self.path_infos)}"
        batch = Batch()
        add_path(batch, name, node_of(batch, self._spare, b"", model))
        for digest, record in batch.blobs.items():
            self.blobs[digest] = bytes(schema.inline_content(record))
        for digest, file in batch.files.items():
            self.blobs[digest] = Path(file.path).read_bytes()
        self.directories |= batch.directories
        self.path_infos |= batch.path_infos
        batch.discard()
        return basename(name)

    def cut(self, content: bytes) -> list[BlobChunk]:
        """Serve `content` as a blob that is cut into chunks, and return those."""
        chunker = Chunker()
        chunker.update(content)
        chunks = list(unpack(chunker.finish()))
        digest = Digest.of(content)
        self.blobs[digest] = content
        self.chunks[digest] = chunks
        at = 0
        for chunk in chunks:
            self.blobs[chunk.digest] = content[at : at + chunk.size]
            at += chunk.size
        return chunks

    def hold(self, digest: bytes) -> Callable[[], None]:
        """Answer nothing about a blob or directory; returns what releases it."""
        event = self.held[digest] = threading.Event()
        return event.set

    def until_read(self, digest: bytes) -> None:
        """Wait until a blob is asked for."""
        with self._asked:
            assert self._asked.wait_for(lambda: self.reads[digest], _HELD_MAX_S)

    def num_reads(self, content: bytes) -> int:
        return self.reads[Digest.of(content)]

    def _stat(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        asked = castore_rpc_pb2.StatBlobRequest.FromString(request)
        if asked.digest not in self.blobs:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such blob")
        response = castore_rpc_pb2.StatBlobResponse()
        for chunk in self.chunks.get(asked.digest, ()) if asked.send_chunks else ():
            response.chunks.add(digest=chunk.digest, size=chunk.size)
        return response.SerializeToString()

    def _read(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        digest = castore_rpc_pb2.ReadBlobRequest.FromString(request).digest
        with self._asked:
            self.reads[digest] += 1
            self._asked.notify_all()
        self._wait(digest)
        content = self.blobs.get(digest)
        if content is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such blob")
        yield from self._pieces(content)

    def _read_range(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        if not self.sends_ranges:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such method")
        asked = bulk_pb2.ReadRangeRequest.FromString(request)
        with self._asked:
            self.ranges[asked.digest] += 1
        yield from self._pieces(self.blobs[asked.digest][asked.start : asked.start + asked.size])

    def _pieces(self, content: bytes) -> Iterator[bytes]:
        for start in range(0, len(content), self.piece):
            piece = content[start : start + self.piece]
            with self._asked:
                self.num_sent += len(piece)
            yield castore_rpc_pb2.BlobChunk(data=piece).SerializeToString()

    def _directory(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        message = castore_rpc_pb2.GetDirectoryRequest.FromString(request)
        digest = message.digest
        if message.recursive:
            if digest in self.closures:
                yield from self.closures[digest]
            else:
                yield from self._closure(digest, context)
            return
        self.reads[digest] += 1
        self._wait(digest)
        encoded = self.directories.get(digest)
        if encoded is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such directory")
        yield encoded

    def _closure(self, root: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        waiting, sent = [root], set()
        for digest in waiting:
            if digest in sent:
                continue
            sent.add(digest)
            self.reads[digest] += 1
            self._wait(digest)
            encoded = self.directories.get(digest)
            if encoded is None:
                context.abort(grpc.StatusCode.NOT_FOUND, "no such directory")
            yield encoded
            waiting += [
                node.digest for node in castore_pb2.Directory.FromString(encoded).directories
            ]

    def _path_info(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        digest = pathinfo_rpc_pb2.GetPathInfoRequest.FromString(request).by_output_hash
        self.reads[digest] += 1
        encoded = self.path_infos.get(digest)
        if encoded is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such path")
        return encoded

    def _list(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        del request, context
        self._wait(LISTING)
        yield from list(self.path_infos.values())

    def _wait(self, digest: bytes) -> None:
        event = self.held.get(digest)
        if event is not None:
            event.wait(_HELD_MAX_S)
