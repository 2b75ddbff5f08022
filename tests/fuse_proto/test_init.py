from errno import EPROTO
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.fuse_proto._fuse_wire import InitFlag, InitIn
from appliance.fuse_proto.init import (
    DEVICE_FLAGS,
    MAX_PAGES,
    PASSTHROUGH_FLAGS,
    WANTED_FLAGS,
    negotiate,
)

ALWAYS = WANTED_FLAGS & ~InitFlag.INIT_EXT
WITHOUT_HANDLES = WANTED_FLAGS & ~InitFlag.EXPORT_SUPPORT


class Offer(NamedTuple):
    """Return what a kernel sends; if not recorded, all flags of its minor version except DAX."""

    kernel: str
    offer: InitIn
    agreed: InitFlag


OFFERS = [
    Offer("5.10 virtiofs", InitIn(7, 32, 131072, 0x0BFFFFFB, 0), ALWAYS),
    Offer("5.15 virtiofs", InitIn(7, 34, 131072, 0x3BFFFFFB, 0), ALWAYS),
    Offer("6.1.176 virtiofs, recorded", InitIn(7, 38, 131072, 0x7BFFFFFB, 0xB), WANTED_FLAGS),
    Offer("6.1.176 UML, recorded", InitIn(7, 38, 131072, 0x7BFFFFFB, 0x9), WANTED_FLAGS),
    Offer("6.12 virtiofs, recorded", InitIn(7, 41, 131072, 0x7BFFFFFB, 0x1FF), WANTED_FLAGS),
    Offer("6.18 /dev/fuse, recorded", InitIn(7, 45, 131072, 0x73FFFFFB, 0x5FD), WITHOUT_HANDLES),
]


@pytest.mark.parametrize("case", OFFERS, ids=lambda case: case.kernel)
def test_known_kernels_get_what_is_wanted(case: Offer) -> None:
    agreement = negotiate(case.offer)
    assert agreement.is_final
    assert agreement.flags == case.agreed
    reply = agreement.reply
    assert (reply.major, reply.minor) == (7, case.offer.minor) == (7, agreement.minor)
    assert reply.flags | reply.flags2 << 32 == case.agreed
    assert reply.max_pages == 256
    assert reply.max_write == 4096
    assert reply.time_gran == 1
    assert reply.max_readahead >= case.offer.max_readahead
    assert reply.congestion_threshold < reply.max_background
    assert reply.map_alignment == reply.max_stack_depth == reply.request_timeout == 0


def test_nothing_that_revalidates_is_agreed() -> None:
    unwanted = InitFlag.AUTO_INVAL_DATA | InitFlag.READDIRPLUS_AUTO | InitFlag.WRITEBACK_CACHE
    unwanted |= InitFlag.SUBMOUNTS | InitFlag.HAS_INODE_DAX | InitFlag.SETXATTR_EXT
    agreement = negotiate(InitIn(7, 45, 131072, 0x7FFFFFFF, 0xFFFFFFFF))
    assert not agreement.flags & unwanted


def test_newer_minor_is_answered_with_ours() -> None:
    agreement = negotiate(InitIn(7, 99, 131072, 0x7BFFFFFB, 0x1FF))
    assert agreement.minor == agreement.reply.minor == 45


def test_newer_major_is_answered_with_ours_alone() -> None:
    agreement = negotiate(InitIn(8, 0, 131072, 0x7BFFFFFB, 0))
    assert not agreement.is_final
    assert agreement.reply[0] == 7
    assert not any(agreement.reply[1:])


@pytest.mark.parametrize(("major", "minor"), [(7, 27), (7, 0), (6, 99), (0, 45)])
def test_older_protocols_are_refused(major: int, minor: int) -> None:
    with pytest.raises(OSError, match="older") as caught:
        negotiate(InitIn(major, minor, 131072, 0x7BFFFFFB, 0))
    assert caught.value.errno == EPROTO


def test_oldest_minor_is_served() -> None:
    assert negotiate(InitIn(7, 28, 131072, 0x00FFFFFB, 0)).minor == 28


def test_max_pages_is_sent_only_with_its_flag() -> None:
    offer = InitIn(7, 45, 131072, 0x7BFFFFFB & ~InitFlag.MAX_PAGES, 0)
    assert negotiate(offer).reply.max_pages == 0
    assert negotiate(offer._replace(flags=InitFlag.MAX_PAGES)).reply.max_pages == MAX_PAGES


word = st.integers(0, 2**32 - 1)


@given(st.builds(InitIn, st.just(7), st.integers(28, 2**32 - 1), word, word, word))
def test_reply_is_a_subset_of_any_offer(offer: InitIn) -> None:
    agreement = negotiate(offer)
    reply = agreement.reply
    assert reply.flags & ~offer.flags == 0
    assert reply.flags2 == 0 or (
        reply.flags & InitFlag.INIT_EXT and not reply.flags2 & ~offer.flags2
    )
    assert reply.minor <= offer.minor
    assert bool(reply.max_pages) == bool(reply.flags & InitFlag.MAX_PAGES)


def test_on_dev_fuse_requests_can_be_sent_again() -> None:
    offer = offered(DEVICE_FLAGS | InitFlag.PASSTHROUGH)
    assert negotiate(offer, DEVICE_FLAGS).flags == DEVICE_FLAGS & ~InitFlag.EXPORT_SUPPORT
    assert not negotiate(offer).flags & InitFlag.HAS_RESEND


@pytest.mark.parametrize(("minor", "is_offered"), [(43, True), (44, False), (46, False)])
def test_no_handles_are_offered_to_kernels_that_take_them_for_outdated(
    minor: int, *, is_offered: bool
) -> None:
    agreement = negotiate(offered(WANTED_FLAGS)._replace(minor=minor))
    assert bool(agreement.flags & InitFlag.EXPORT_SUPPORT) == is_offered


def test_passthrough_excludes_no_open_and_states_a_stack_depth() -> None:
    agreement = negotiate(offered(DEVICE_FLAGS | InitFlag.PASSTHROUGH), PASSTHROUGH_FLAGS)
    assert agreement.flags & InitFlag.PASSTHROUGH
    assert not agreement.flags & InitFlag.NO_OPEN_SUPPORT
    assert agreement.reply.max_stack_depth == 1


def test_a_kernel_without_passthrough_is_told_of_no_stack() -> None:
    agreement = negotiate(offered(DEVICE_FLAGS), PASSTHROUGH_FLAGS)
    assert not agreement.flags & InitFlag.PASSTHROUGH
    assert agreement.reply.max_stack_depth == 0


def offered(flags: InitFlag) -> InitIn:
    return InitIn(7, 45, 131072, flags & 0xFFFFFFFF, flags >> 32)
