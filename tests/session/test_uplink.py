"""The channel through which no descriptor goes up."""

import contextlib
import os
import socket

import pytest

from appliance.bounds import UPLINK_MESSAGE_MAX
from appliance.protos.control_pb2 import Done, Envelope, NewPeer
from appliance.session.fork_client import lower_end_of
from appliance.session.uplink import uplink_pair


def test_messages_go_both_ways_and_descriptors_only_down() -> None:
    pair = uplink_pair()
    upper, lower = pair.upper, lower_end_of(list(pair.lower))
    with contextlib.closing(upper), contextlib.closing(lower):
        down, up = Envelope(new_peer=NewPeer()), Envelope(id=1, done=Done())
        upper.send(down, [0])
        received = lower.receive()
        assert received is not None
        envelope, (fd,) = received
        os.close(fd)
        assert envelope == down
        for number in (1, 2):
            lower.send(Envelope(id=number, done=Done()))
        assert upper.receive() == (up, [])
        assert upper.receive() == (Envelope(id=2, done=Done()), [])
        with pytest.raises(BlockingIOError):
            upper.receive()
        with pytest.raises(ValueError, match="1 descriptors"):
            lower.send(up, [0])


def test_whoever_has_the_lower_end_cannot_send_through_the_socket() -> None:
    pair = uplink_pair()
    with contextlib.closing(pair.upper):
        sock_fd, pipe_fd = pair.lower
        with socket.socket(fileno=sock_fd) as sock, pytest.raises(BrokenPipeError):
            socket.send_fds(sock, [b"x"], [0])
        os.close(pipe_fd)
        assert pair.upper.receive() is None


def test_what_is_too_long_or_no_message_is_an_error() -> None:
    pair = uplink_pair()
    lower = lower_end_of(list(pair.lower))
    with contextlib.closing(pair.upper), contextlib.closing(lower):
        with pytest.raises(ValueError, match=f"expected at most {UPLINK_MESSAGE_MAX}"):
            lower.send(Envelope(done=Done(error="x" * UPLINK_MESSAGE_MAX)))
        os.write(lower.sending_fd, bytes([255] * 100))
        with pytest.raises(OSError, match="parsing"):
            pair.upper.receive()
