"""The pipe from the tree process to the process that commits."""

import os
from collections.abc import Iterator
from typing import Final

from appliance.importer.records import (
    FRAME,
    OBJECT_RECORD,
    HashRecord,
    ObjectKind,
    ObjectRecord,
)

_RECORDS_MAX: Final = 64
_PAYLOAD_MAX: Final = 1 << 16
_READ_SIZE: Final = 1 << 18


class ObjectWriter:
    """Gathers records, and writes them as frames."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._records: list[bytes] = []
        self._payload: list[bytes] = []
        self._payload_size = 0

    def used(self, hasher: int, record: HashRecord) -> None:
        """Pass on that a record was used, and nothing of it is needed."""
        self._append(ObjectKind.USED, hasher, 0, 0, record.used, 0, 0, b"")

    def blob(self, hasher: int, record: HashRecord) -> None:
        """Pass on a blob in the ring."""
        kind = ObjectKind.BLOB
        _, _, offset, size, used, _, _, digest = record
        self._append(kind, hasher, offset, size, used, 0, 0, digest)

    def file(self, hasher: int, record: HashRecord) -> None:
        """Pass on a blob in a staged file."""
        _, _, _, _, used, file_size, staged, digest = record
        self._append(ObjectKind.FILE, hasher, 0, 0, used, file_size, staged, digest)

    def content(
        self,
        kind: ObjectKind,
        content: bytes,
        digest: bytes = b"",
        *,
        hasher: int = 0,
        used: int = 0,
        number: int = 0,
        num_files: int = 0,
    ) -> None:
        """Pass on a record with `content` as payload."""
        offset = self._payload_size
        self._payload.append(content)
        self._payload_size += len(content)
        self._append(kind, hasher, offset, len(content), used, number, num_files, digest)

    def flush(self) -> None:
        """Write what was gathered."""
        if not self._records:
            return
        frame = [FRAME.pack(len(self._records), self._payload_size), *self._records, *self._payload]
        data = memoryview(b"".join(frame))
        while data:
            data = data[os.write(self._fd, data) :]
        self._records.clear()
        self._payload.clear()
        self._payload_size = 0

    def _append(self, *fields: int | bytes) -> None:
        self._records.append(OBJECT_RECORD.pack(*fields))
        if len(self._records) >= _RECORDS_MAX or self._payload_size >= _PAYLOAD_MAX:
            self.flush()


def read_objects(fd: int) -> Iterator[tuple[ObjectRecord, memoryview]]:
    """Yield each record with its payload, empty where there is none, until the pipe ends."""
    data = b""
    while True:
        while len(data) < FRAME.size:
            more = os.read(fd, _READ_SIZE)
            if not more:
                return
            data += more
        num_records, payload_size = FRAME.unpack_from(data)
        payload_start = FRAME.size + num_records * OBJECT_RECORD.size
        end = payload_start + payload_size
        chunks = [data]
        missing = end - len(data)
        while missing > 0:
            more = os.read(fd, max(missing, _READ_SIZE))
            if not more:
                return
            chunks.append(more)
            missing -= len(more)
        data = b"".join(chunks)
        payload = memoryview(data)[payload_start:end]
        for fields in OBJECT_RECORD.iter_unpack(data[FRAME.size : payload_start]):
            record = ObjectRecord._make(fields)
            if record.kind >= ObjectKind.DIRECTORY:
                yield record, payload[record.offset : record.offset + record.size]
            else:
                yield record, payload[:0]
        data = data[end:]
