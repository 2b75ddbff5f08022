"""A relay of vhost-user messages that lets user-mode Linux use the virtiofsd in Rust.

User-mode Linux up to 6.12 sends SET_MEM_TABLE with room for two regions where there is one (linux
arch/um/drivers/virtio_uml.c: vhost_user_set_mem_table). virtiofsd ends at a table that is longer
than its regions, so the table is cut on the way. Requests and replies of the guest are in shared
memory, and do not come through here.
"""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_HEADER: Final = struct.Struct("=III")
_SET_MEM_TABLE: Final = 5
_TABLE_HEAD_SIZE: Final = 8
_REGION_SIZE: Final = 32
_MAX_FDS: Final = 32
_PIECE: Final = 4096


@contextlib.contextmanager
def relay(socket_path: Path, back_end: Path) -> Iterator[None]:
    """Listen on `socket_path` for one front-end, and connect it with `back_end`."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(socket_path))
        listener.listen(1)
        thread = threading.Thread(target=_serve, args=(listener, back_end))
        thread.start()
        stack.callback(thread.join)
        # Ends a relay that nobody has connected to; a connected one ends with its front-end.
        stack.callback(listener.shutdown, socket.SHUT_RDWR)
        yield


def _serve(listener: socket.socket, back_end: Path) -> None:
    try:
        front, _ = listener.accept()
    except OSError:  # nobody has come
        return
    with front, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as back:
        back.connect(str(back_end))
        answers = threading.Thread(target=_pass_on, args=(back, front))
        answers.start()
        with contextlib.suppress(OSError):  # the back-end has ended
            while _pass_request_on(front, back):
                pass
        for sock in (back, front):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        answers.join()


def _pass_request_on(front: socket.socket, back: socket.socket) -> bool:
    header, fds = _receive(front, _HEADER.size)
    with contextlib.closing(fds):
        if len(header) < _HEADER.size:
            return False
        request, flags, size = _HEADER.unpack(header)
        payload = front.recv(size, socket.MSG_WAITALL) if size else b""
        if request == _SET_MEM_TABLE:
            (num_regions,) = struct.unpack_from("=I", payload)
            payload = payload[: _TABLE_HEAD_SIZE + num_regions * _REGION_SIZE]
        _send(back, _HEADER.pack(request, flags, len(payload)) + payload, fds)
    return True


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):  # one of them has ended
        while True:
            data, fds = _receive(source, _PIECE)
            with contextlib.closing(fds):
                if not data:
                    break
                _send(target, data, fds)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


def _receive(source: socket.socket, size: int) -> tuple[bytes, "_Fds"]:
    data, fds, _flags, _address = socket.recv_fds(source, size, _MAX_FDS)
    return data, _Fds(fds)


def _send(target: socket.socket, data: bytes, fds: "_Fds") -> None:
    sent = socket.send_fds(target, [data], fds.numbers)
    target.sendall(data[sent:])


class _Fds:
    """Descriptors that came with a message; owned."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def close(self) -> None:
        for fd in self.numbers:
            os.close(fd)
