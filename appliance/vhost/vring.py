"""One vring as the front-end described it, and what of that a start needs.

Messages arrive in any order (addresses before the base or after it, call descriptors before there
is memory), so values are kept as they came and first put together when the ring starts.

Spec: vhost-user: Ring states; A vring address description. VIRTIO 1.3, 2.7 (Split Virtqueues).
"""

from appliance.errors import VhostError
from appliance.vhost._vhost_wire import VringAddr
from appliance.vhost.backend import VringConfig
from appliance.vhost.fds import FdHolder
from appliance.vhost.guest_memory import RegionTable


class Vring:
    """What is known of one vring; owns its descriptors.

    Started means that there is a kick descriptor. A ring runs when it is started and enabled.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.num: int | None = None
        self.addr: VringAddr | None = None
        self.base = 0
        self.is_enabled = False
        self.is_running = False
        # Entries of this ring's area in the front-end's inflight buffer, until a start has read it.
        self.recover_num: int | None = None
        self.kick = FdHolder()
        self.call = FdHolder()
        self.err = FdHolder()

    @property
    def is_started(self) -> bool:
        """Whether the front-end started the ring, enabled or not."""
        return self.kick.fd is not None

    def config_untrusted(self, features: int, memory: RegionTable) -> VringConfig:
        """Return what to start this started ring with.

        Raises:
            VhostError: something was never set, or the ring does not lie in guest memory.
        """
        if self.num is None or self.addr is None or self.kick.fd is None:
            raise VhostError(f"ring {self.index} started without size or addresses")
        num, addr = self.num, self.addr
        for name, user_addr, size in (
            ("desc", addr.desc, 16 * num),
            ("avail", addr.avail, 6 + 2 * num),  # used_event included
            ("used", addr.used, 6 + 8 * num),  # avail_event included
        ):
            if not memory.holds_user_range(user_addr, size):
                raise VhostError(
                    f"ring {self.index}: {name} 0x{user_addr:x}, {size} bytes, lies in no region"
                )
        if self.recover_num is not None and self.recover_num < num:
            raise VhostError(
                f"ring {self.index}: {num} entries, {self.recover_num} in the inflight buffer"
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
        )

    def close(self) -> None:
        """Close every descriptor."""
        self.kick.close()
        self.call.close()
        self.err.close()


def check_addr_untrusted(addr: VringAddr) -> None:
    """Check the alignment of a ring's three parts.

    Raises:
        VhostError: one of them is not aligned.

    Spec: VIRTIO 1.3, 2.7 (Split Virtqueues).
    """
    for name, user_addr, alignment in (
        ("desc", addr.desc, 16),
        ("avail", addr.avail, 2),
        ("used", addr.used, 4),
    ):
        if user_addr % alignment:
            raise VhostError(
                f"ring {addr.ring}: {name} 0x{user_addr:x} is not aligned to {alignment} bytes"
            )
