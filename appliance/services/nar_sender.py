"""NARs from a local store straight into sockets.

The kernel takes what is in LMDB from the map itself, many contents at a time (writev(2)), and what
is in files from the page cache (sendfile(2)). Nothing is copied or kept in this process.

A snapshot of the store is open while a part is passed on, and no longer than `_SNAPSHOT_S`: a peer
that stops reading keeps no pages of LMDB from being used again. What is left of the part is looked
up once more. Nothing can have changed by then but that it is gone: everything goes by digests.

Each content is compared with its digest before its first byte is sent, the first time that it is
sent by its plan. After that, only its presence and its size are checked, and not even those as long
as nothing in the store has changed (`kept_buffers`). What the disk makes of it later, `appliance
verify` finds, and so does the client, by the hash of the NAR. A part of a blob in a file, where a
range begins or ends within it, is sent unchecked.
"""

import os
import select
import time
from typing import Final, NamedTuple, TypeAlias

from blake3 import blake3

from appliance.castore.digest import Digest
from appliance.errors import CorruptBlobError, StoreError
from appliance.services.kept_buffers import CONTENTS_MAX, KeptBuffers, Moment
from appliance.services.nar_plan import NarPlan
from appliance.services.stored_trees import StoredTrees, check_digest, open_whole
from appliance.store.blob_files import BlobFile
from appliance.store.snapshot import Snapshot
from appliance.store.store import Store

Buffer: TypeAlias = "bytes | bytearray | memoryview"

# In bytes. What is gathered for one snapshot, about as much as a socket takes at once; what a call
# of `send` sends, so that other NARs have their turns; and what it hashes of a file.
_GATHERED_SIZE: Final = 1 << 18
_TURN_SIZE: Final = 8 << 20
_HASHED_SIZE: Final = 64 << 20
_READ_SIZE: Final = 1 << 18
# The kernel takes at most this many buffers in one call (UIO_MAXIOV); each content adds up to two.
_BUFFERS_MAX: Final = 1024
# How long to wait for a peer that may be reading just now, before its turn ends.
_WAIT_MS: Final = 2
_SNAPSHOT_S: Final = 0.05


class _OpenFile(NamedTuple):
    """The file of a content, which has that number in the plan."""

    number: int
    fd: int


class NarSender:
    """A NAR, or a range of it, on its way into a socket.

    Its methods block only for as long as the disk does, and are called one after another.

    Args:
        store: has the contents.
        plan: the plan of the NAR.
        start: offset in bytes of the first byte to send.
        end: offset of the byte after the last one.
    """

    def __init__(self, store: Store, plan: NarPlan, start: int, end: int) -> None:
        self._store = store
        self._plan = plan
        self._offset = start
        self._start = start
        self._end = end
        self._trees = StoredTrees(0)
        self._file: _OpenFile | None = None
        # Of the open file: its content so far, while it is compared with the digest.
        self._hasher: blake3 | None = None
        self._hashed_size = 0

    @property
    def num_sent(self) -> int:
        """The number of bytes that were sent."""
        return self._offset - self._start

    def check(self) -> None:
        """Read what is sent first, so that errors can be answered.

        Raises:
            StoreError, NarError: content is missing or wrong.
        """
        with self._store.snapshot() as snapshot:
            self._gather(snapshot)

    def send(self, socket_fd: int) -> bool:
        """Send until all is sent, the peer reads no more for now, or the turn is over.

        Args:
            socket_fd: a socket that does not block.

        Returns:
            Whether all was sent. If not, call this again once the socket can be written.

        Raises:
            StoreError, NarError: content is missing or wrong. What was sent until then must not
                pass for the NAR.
            OSError: the peer is gone, or the socket failed.
        """
        end = min(self._offset + _TURN_SIZE, self._end)
        while self._offset < end:
            with self._store.snapshot() as snapshot:
                buffers = self._gather(snapshot)
                is_file = not buffers
                goes_on = is_file or self._write(socket_fd, buffers)
            if is_file:
                goes_on = self._send_file(socket_fd)
            if not goes_on:
                return False
        return self._offset == self._end

    def close(self) -> None:
        """Close the file that is being sent, if any."""
        if self._file is not None:
            os.close(self._file.fd)
            self._file = None

    # --- From LMDB ---

    def _gather(self, snapshot: Snapshot) -> list[Buffer]:
        """Return what comes next, up to a blob in a file; nothing if such a blob is next."""
        kept = self._kept(snapshot)
        if kept is not None:
            end = min(self._offset + _GATHERED_SIZE, self._end)
            return list(kept.between(self._offset, end, _BUFFERS_MAX))
        # Budget: 3 us for each content besides hashing it the first time.
        plan = self._plan
        digests, starts, ends, is_checked = plan.digests, plan.starts, plan.ends, plan.is_checked
        blob = snapshot.blob
        num_contents = plan.num_contents()
        structure = memoryview(plan.structure)
        buffers: list[Buffer] = []
        offset = self._offset
        end = min(offset + _GATHERED_SIZE, self._end)
        index = plan.index_at(offset)
        while offset < end and len(buffers) < _BUFFERS_MAX - 1:
            content_at = ends[index]
            if offset < content_at:
                start = plan.structure_at[index] + offset - starts[index]
                stop = min(content_at, end)
                buffers.append(structure[start : start + stop - offset])
                offset = stop
            if index == num_contents or offset == end:
                break
            content = blob(digests[index])
            size = starts[index + 1] - content_at
            if not isinstance(content, memoryview) or len(content) != size:
                # It is in a file, or this raises an error.
                self._trees.content(snapshot, digests[index], size)
                break
            if not is_checked[index]:
                check_digest("blob", digests[index], blake3(content).digest())
                is_checked[index] = True
            if offset == content_at and size <= end - offset:
                buffers.append(content)
                offset += size
            else:
                part = content[offset - content_at : end - content_at]
                buffers.append(part)
                offset += len(part)
            index += 1
        return buffers

    def _kept(self, snapshot: Snapshot) -> KeptBuffers | None:
        plan = self._plan
        if plan.num_contents() > CONTENTS_MAX or False in plan.is_checked:
            return None
        moment = Moment.of(snapshot, self._store)
        kept = plan.kept
        if kept is None or kept.moment != moment:
            if self._end - self._start < plan.nar_size // 2:
                return None  # to find them all takes longer
            kept = plan.kept = KeptBuffers.find(plan, snapshot, moment)
        return kept

    def _write(self, socket_fd: int, buffers: list[Buffer]) -> bool:
        """Send buffers, and return whether all were sent before the peer stopped reading."""
        deadline_s = time.monotonic() + _SNAPSHOT_S
        while True:
            try:
                num_sent = os.writev(socket_fd, buffers)
            except BlockingIOError:
                num_sent = 0
            self._offset += num_sent
            _drop(buffers, num_sent)
            if not buffers:
                return True
            if time.monotonic() >= deadline_s or not _is_writable(socket_fd):
                return False

    # --- From files ---

    def _send_file(self, socket_fd: int) -> bool:
        """Send of a blob in a file, and return whether to go on at once."""
        plan = self._plan
        index = plan.index_at(self._offset)
        blob = BlobFile(plan.digests[index], plan.content_size(index))
        file_at = plan.ends[index]
        try:
            fd = self._opened(index, blob)
            is_whole = self._start <= file_at and file_at + blob.size <= self._end
            if is_whole and not plan.is_checked[index] and not self._is_checked(index, blob, fd):
                return False
            stop = min(file_at + blob.size, self._end)
        except OSError as exc:
            raise StoreError(f"blob {blob.digest.hex()}: {exc.strerror}") from exc
        while self._offset < stop:
            try:
                num_sent = os.sendfile(
                    socket_fd, fd, self._offset - file_at, min(stop - self._offset, _TURN_SIZE)
                )
            except BlockingIOError:
                if not _is_writable(socket_fd):
                    return False
                continue
            if not num_sent:
                raise CorruptBlobError(f"blob {blob.digest.hex()}: its file is too short")
            self._offset += num_sent
        self.close()
        return True

    def _opened(self, index: int, blob: BlobFile) -> int:
        if self._file is None or self._file.number != index:
            self.close()
            self._hasher = None
            self._file = _OpenFile(index, open_whole(self._store, blob))
        return self._file.fd

    def _is_checked(self, index: int, blob: BlobFile, fd: int) -> bool:
        """Compare a blob with its digest, or begin to; return whether that is done."""
        if self._hasher is None:
            self._hasher = blake3()
            self._hashed_size = 0
        buffer = memoryview(bytearray(_READ_SIZE))
        stop = min(self._hashed_size + _HASHED_SIZE, blob.size)
        while self._hashed_size < stop:
            size = os.preadv(fd, [buffer], self._hashed_size)
            if not size:
                raise CorruptBlobError(f"blob {blob.digest.hex()}: its file is too short")
            self._hasher.update(buffer[:size])
            self._hashed_size += size
        if self._hashed_size < blob.size:
            return False
        check_digest("blob", Digest(blob.digest), self._hasher.digest())
        self._plan.is_checked[index] = True
        return True


def _drop(buffers: list[Buffer], size: int) -> None:
    """Drop the first `size` bytes of `buffers`."""
    index = 0
    while index < len(buffers) and size >= len(buffers[index]):
        size -= len(buffers[index])
        index += 1
    del buffers[:index]
    if size:
        buffers[0] = memoryview(buffers[0])[size:]


def _is_writable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(_WAIT_MS))
