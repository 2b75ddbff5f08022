"""`Backend`: what a vhost-user session requires of the process that has guest memory and workers.

Spec: vhost-user: Ring states; Memory access; Inflight I/O tracking.
"""

from typing import NamedTuple, Protocol

from appliance.vhost._vhost_wire import Region


class RingLog(NamedTuple):
    """Where to mark the pages of guest memory that are written for a ring.

    Spec: vhost-user: Migration.
    """

    fd: int
    """The file of the bitmap (lent); at least `offset` + `size` bytes long when it came."""
    size: int
    """The size of the bitmap in bytes."""
    offset: int
    """Where it begins in the file, in bytes; a multiple of a page."""
    used_addr: int | None
    """The guest address of the used ring; None if writes to that are not to be marked."""


class VringConfig(NamedTuple):
    """Everything that is needed to serve a ring.

    The descriptors are lent. The session closes them when the front-end replaces them, after
    `stop_ring` or `set_call` of the backend, or when the session closes.
    """

    num: int
    """The number of entries of the ring."""
    desc: int
    """The user address of the descriptor table."""
    used: int
    """The user address of the used ring."""
    avail: int
    """The user address of the available ring."""
    base: int
    """The free-running 16-bit index of the first avail entry to take."""
    features: int
    """The negotiated virtio features."""
    kick_fd: int
    call_fd: int | None
    """None if the guest polls, or wants no interrupts yet."""
    err_fd: int | None
    fresh: bool
    """If False, this ring's area of the inflight buffer decides where to start, not `base`."""
    log: RingLog | None = None
    """None if nothing is to be marked."""
    follows_used: bool = False
    """If True, and the inflight buffer has nothing of this ring, its used ring decides where to
    start, not `base`."""


class Backend(Protocol):
    """The owner of guest memory and workers.

    Every method may raise VhostError to refuse a request. The session then answers with a failed
    ack, or lets the error end the connection if the front-end did not ask for an ack. A method
    whose docstring says that it takes a descriptor owns it from the call on, whether it returns or
    raises; all other descriptors are lent. Calls never overlap.
    """

    async def add_region(self, region: Region, fd: int, replaced: Region | None = None) -> None:
        """Map `region` in every worker before returning. Takes `fd`.

        The backend must check that the file behind `fd` is large enough. If `replaced` is not None,
        it was added before and makes room for `region`, in one step for the rings in it.
        """

    async def remove_region(self, region: Region) -> None:
        """Unmap `region`, which was added before, in every worker before returning."""

    async def set_regions(self, regions: list[tuple[Region, int]]) -> None:
        """Replace the whole table in every worker before returning. Takes the descriptors."""

    async def start_ring(self, index: int, config: VringConfig) -> None:
        """Start to serve ring `index`, whose first entries are taken without waiting for a kick."""

    async def stop_ring(self, index: int) -> int:
        """Stop ring `index` once all popped requests are answered; pop no others.

        Returns:
            The free-running 16-bit avail index that was reached.
        """

    async def set_call(self, index: int, fd: int | None) -> None:
        """Signal completions of the running ring `index` through `fd` from now on, and once now.

        `fd` is lent until the next call or the ring's stop; None means that nothing is signalled.
        """

    async def set_log(self, index: int, log: RingLog | None) -> None:
        """Mark what is written for the running ring `index` in another log, or in none.

        When this returns or raises, the former log is not used any more. The new one is lent until
        the next call or the ring's stop; after an error, the ring has none.
        """

    async def inflight(self, num_queues: int, queue_size: int) -> tuple[int, int, int]:
        """Return (fd, mmap_size, mmap_offset) of a new, zeroed inflight buffer.

        `fd` stays the backend's. Size and offset are in bytes.
        """

    async def set_inflight(
        self, fd: int, mmap_size: int, mmap_offset: int, num_queues: int, queue_size: int
    ) -> None:
        """Use the front-end's inflight buffer for rings that start from now on. Takes `fd`.

        Size and offset are in bytes.
        """

    async def save_state(self, fd: int) -> None:
        """Begin to write the session's state to `fd`, and close that at its end. Takes `fd`.

        No ring runs. The state is that of now, and the session goes on.
        """

    async def load_state(self, fd: int) -> None:
        """Begin to read a session's state from `fd`. Takes `fd`."""

    async def finish_state(self) -> None:
        """Return when what `save_state` or `load_state` began is complete.

        A state that was read then takes the place of the session; no ring runs. After an error the
        session is as it was, unless the text says otherwise.
        """

    async def reset(self) -> None:
        """End the FUSE session; every ring was stopped before."""

    async def begin_again(self) -> None:
        """Forget guest memory, the inflight buffer and the FUSE session; every ring was stopped."""

    async def close(self) -> None:
        """Stop every ring without draining and release guest memory; the front-end is gone."""
