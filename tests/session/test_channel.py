import os
import socket

import pytest

from appliance.bounds import CHANNEL_FDS_MAX
from appliance.protos.control_pb2 import Done, Envelope, SetMemory
from appliance.session import channel


def test_a_message_arrives_whole_with_its_fds() -> None:
    ours, theirs = channel.channel_pair()
    read_fd, write_fd = os.pipe()
    with ours, theirs:
        channel.send(ours, Envelope(id=7, done=Done(error="why")), [write_fd])
        os.close(write_fd)
        received = channel.receive(theirs)
        assert received is not None
        envelope, (fd,) = received
        assert envelope == Envelope(id=7, done=Done(error="why"))
        os.write(fd, b"x")
        os.close(fd)
        assert os.read(read_fd, 2) == b"x"
    os.close(read_fd)


def test_received_fds_do_not_survive_an_exec() -> None:
    ours, theirs = channel.channel_pair()
    with ours, theirs:
        channel.send(ours, Envelope(id=1), [0])
        received = channel.receive(theirs)
        assert received is not None
        (fd,) = received[1]
        assert not os.get_inheritable(fd)
        os.close(fd)


def test_as_many_fds_as_promised_fit_one_message() -> None:
    ours, theirs = channel.channel_pair()
    with ours, theirs:
        channel.send(ours, Envelope(set_memory=SetMemory(last=True)), [0] * CHANNEL_FDS_MAX)
        received = channel.receive(theirs)
        assert received is not None
        assert len(received[1]) == CHANNEL_FDS_MAX
        for fd in received[1]:
            os.close(fd)


def test_the_end_of_the_peer_is_none() -> None:
    ours, theirs = channel.channel_pair()
    with ours:
        theirs.close()
        assert channel.receive(ours) is None
        with pytest.raises(BrokenPipeError):
            channel.send(ours, Envelope(id=1))


def test_a_nonblocking_end_without_a_message_says_so() -> None:
    ours, theirs = channel.channel_pair()
    with ours, theirs:
        ours.settimeout(0)
        with pytest.raises(BlockingIOError):
            channel.receive(ours)


def test_messages_keep_their_borders() -> None:
    ours, theirs = channel.channel_pair()
    with ours, theirs:
        assert ours.type == socket.SOCK_SEQPACKET
        for number in range(3):
            channel.send(ours, Envelope(id=number + 1))
        ids = []
        for _ in range(3):
            received = channel.receive(theirs)
            assert received is not None
            ids.append(received[0].id)
        assert ids == [1, 2, 3]
