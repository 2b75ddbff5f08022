"""The one word of guest memory that a session process looks at: how far a guest has filled a ring.

It is read from the file that the front-end gave for the memory. Mapping that is for workers, as the
front-end may shrink it under a mapping.
"""

import contextlib
import os
from collections.abc import Mapping
from typing import Final

from appliance.vhost._vhost_wire import Region
from appliance.vhost.backend import VringConfig

# struct virtq_avail has a le16 of flags before its le16 idx (VIRTIO 1.3, 2.7.6).
_OFFSET: Final = 2
_SIZE: Final = 2


def avail_index(config: VringConfig, regions: Mapping[Region, int]) -> int | None:
    """Return the free-running 16-bit index of the entry that the guest will fill next.

    Args:
        config: the ring.
        regions: guest memory, each region with its descriptor (lent).

    Returns:
        The index, or None if it cannot be read.
    """
    address = config.avail + _OFFSET
    for region, fd in regions.items():
        at = address - region.user_addr
        if 0 <= at < region.size:
            with contextlib.suppress(OSError):
                data = os.pread(fd, _SIZE, region.mmap_offset + at)
                if len(data) == _SIZE:
                    return int.from_bytes(data, "little")
    return None
