"""A guest without a kernel, inside the Debian of ../debian_system.py, which reads on and on.

`reading_guest.py SOCKET NAME` prints `ready` once it has read the file of a store path. Then it
takes lines from stdin, and reads the file of each path that they name while it goes on with the
first; `end` ends it. It stops at the first wrong answer.
"""

import os
import select
import socket
import sys

from tests.fakes import fuse_client
from tests.fakes.appliance_process import FakeGuest
from tests.fakes.frontend import FrontEnd

CONTENT = b"hello\n"


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def find(guest: FakeGuest, name: str) -> int:
    return guest.lookup(guest.lookup(fuse_client.ROOT, os.fsencode(name)), b"file")


def read(guest: FakeGuest, file: int) -> bytes:
    answer = guest.ask(fuse_client.read(file, 0, 4096))
    assert answer.error == 0, answer
    return bytes(answer.body)


def main() -> None:
    path, name = sys.argv[1:]
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(path)
    num_reads = 0
    poller = select.poll()
    poller.register(0, select.POLLIN)
    with FakeGuest(FrontEnd(sock)) as guest:
        guest.mount()
        file = find(guest, name)
        while True:
            assert read(guest, file) == CONTENT
            num_reads += 1
            if num_reads == 1:
                say("ready")
            if not poller.poll(10):
                continue
            asked = sys.stdin.readline().strip()
            if asked in {"end", ""}:
                break
            say(f"new path: {read(guest, find(guest, asked)).decode().strip()}")
    assert num_reads > 10
    say("reads went on")


main()
