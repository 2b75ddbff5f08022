"""One vring as the front-end described it, and the checks before it starts.

Messages arrive in any order: addresses before or after the base, call descriptors before there is
memory. Values are therefore kept as they came, and are combined and checked when the ring starts.

Spec: vhost-user: Ring states; A vring state description; A vring address description. VIRTIO 1.3,
2.7 (Split Virtqueues).
"""

from appliance.errors import VhostError
from appliance.vhost._vhost_wire import VringAddr, VringFlag
from appliance.vhost.backend import RingLog, VringConfig
from appliance.vhost.fds import FdHolder
from appliance.vhost.guest_memory import RegionTable

# The largest used ring, which has 32768 entries, still ends within 64 bits.
_LOG_ADDR_MAX = (1 << 64) - (6 + 8 * 32768)


class Vring:
    """The state of one vring. Owns its kick, call and err descriptors.

    A ring is started while it has a kick descriptor. It runs while it is started and enabled, once
    the backend serves it.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.num: int | None = None  # entries
        self.addr: VringAddr | None = None  # user addresses
        self.base = 0  # avail index at which the ring starts next, 16 bits
        self.is_enabled = False
        self.is_running = False
        self.log: RingLog | None = None  # while it runs: where what is written is marked
        # The number of entries of this ring's area in the front-end's inflight buffer, until the
        # ring has started with it.
        self.recover_num: int | None = None
        self.kick = FdHolder()
        self.call = FdHolder()
        self.err = FdHolder()

    @property
    def is_started(self) -> bool:
        """Whether the front-end has started the ring, enabled or not."""
        return self.kick.fd is not None

    def config_untrusted(
        self, features: int, memory: RegionTable, log: RingLog | None
    ) -> VringConfig:
        """Return the configuration with which to run this started ring; its descriptors are lent.

        Args:
            features: the negotiated virtio features.
            memory: guest memory, in which the ring must lie.
            log: where to mark what is written.

        Raises:
            VhostError: the size or the addresses were never set, a part of the ring lies outside
                guest memory, or the inflight buffer has too few entries for the ring.
        """
        if self.num is None or self.addr is None or self.kick.fd is None:
            raise VhostError(f"ring {self.index} was started without size or addresses")
        num, addr = self.num, self.addr
        for name, user_addr, size in (
            ("desc", addr.desc, 16 * num),
            ("avail", addr.avail, 6 + 2 * num),  # with used_event
            ("used", addr.used, 6 + 8 * num),  # with avail_event
        ):
            if not memory.holds_user_range(user_addr, size):
                raise VhostError(
                    f"ring {self.index}: {name} at 0x{user_addr:x}, {size} bytes, is in no region"
                )
        if self.recover_num is not None and self.recover_num < num:
            raise VhostError(
                f"ring {self.index}: the inflight buffer has {self.recover_num} entries, "
                f"expected at least {num}"
            )
        return VringConfig(
            num=num,
            desc=addr.desc,
            used=addr.used,
            avail=addr.avail,
            base=self.base,
            features=features,
            kick_fd=self.kick.fd,
            call_fd=self.call.fd,
            err_fd=self.err.fd,
            fresh=self.recover_num is None,
            log=log,
        )

    def close(self) -> None:
        """Close the descriptors of the ring."""
        self.kick.close()
        self.call.close()
        self.err.close()


def check_addr_untrusted(addr: VringAddr) -> None:
    """Check the alignment of the three parts of a ring, and the range in which it is logged.

    Raises:
        VhostError: a part is not aligned to 16 (descriptor table), 2 (avail) or 4 (used) bytes, or
            the used ring would be logged beyond the address space.

    Spec: VIRTIO 1.3, 2.7 (Split Virtqueues).
    """
    for name, user_addr, alignment in (
        ("desc", addr.desc, 16),
        ("avail", addr.avail, 2),
        ("used", addr.used, 4),
    ):
        if user_addr % alignment:
            raise VhostError(
                f"ring {addr.ring}: {name} at 0x{user_addr:x} is not aligned to {alignment} bytes"
            )
    if addr.flags & VringFlag.LOG and addr.log_guest_addr > _LOG_ADDR_MAX:
        raise VhostError(
            f"ring {addr.ring}: the used ring is to be logged at 0x{addr.log_guest_addr:x}, and "
            "wraps around"
        )
