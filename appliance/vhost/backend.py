"""What a vhost-user session asks of the process that serves its rings."""

from typing import NamedTuple, Protocol

from appliance.vhost.guest_memory import Region


class VringConfig(NamedTuple):
    """Everything that a ring needs to run.

    The descriptors are lent: the session closes them when the front-end replaces them, after the
    backend was told (`stop_ring`, `set_call`), or when the session closes.
    """

    num: int
    desc: int  # user address, as used and avail: the front-end's address space
    used: int
    avail: int
    base: int  # free-running index of the first avail entry to take
    features: int  # negotiated virtio features
    kick_fd: int
    call_fd: int | None  # None: the guest polls, or wants no interrupts yet
    err_fd: int | None
    fresh: bool  # False: this ring's area of the front-end's inflight buffer decides over `base`


class Backend(Protocol):
    """The owner of guest memory and workers.

    Every method may raise VhostError to refuse; the session then answers with a failed ack, or lets
    the error end the connection if the front-end asked for no ack. A method that takes ownership of
    a descriptor has it whether it returns or raises. Calls never overlap.
    """

    async def add_region(self, region: Region, fd: int) -> None:
        """Map `region` in every worker before returning. Takes `fd`.

        The size of the file behind `fd` is for the backend to check.
        """

    async def remove_region(self, region: Region) -> None:
        """Unmap `region`, which was added before, in every worker before returning."""

    async def set_regions(self, regions: list[tuple[Region, int]]) -> None:
        """Replace the whole table in every worker before returning. Takes the descriptors."""

    async def start_ring(self, index: int, config: VringConfig) -> None:
        """Serve ring `index`, first without waiting for a kick."""

    async def stop_ring(self, index: int) -> int:
        """Finish what was popped, pop nothing more; return the free-running avail index reached."""

    async def set_call(self, index: int, fd: int | None) -> None:
        """Signal completions of a running ring through `fd`, lent, from now on and once now."""

    async def inflight(self, num_queues: int, queue_size: int) -> tuple[int, int, int]:
        """Return (fd, mmap_size, mmap_offset) of a zeroed inflight buffer; `fd` is lent."""

    async def set_inflight(
        self, fd: int, mmap_size: int, mmap_offset: int, num_queues: int, queue_size: int
    ) -> None:
        """Use the front-end's inflight buffer for rings that start from now on. Takes `fd`."""

    async def reset(self) -> None:
        """Forget the FUSE session; every ring was stopped before."""

    async def close(self) -> None:
        """Stop every ring without draining and let go of guest memory; the front-end is gone."""
