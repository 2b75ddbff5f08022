"""The virtio-fs device as a front-end sees it: queues, features, configuration space.

Queue 0 is hiprio, queues from 1 are request queues; there is no notification queue, because its
feature bit, which would shift the others, is never offered.

Spec: VIRTIO 1.3, 5.11 (File System Device).
"""

from dataclasses import dataclass
from typing import Final

from appliance.errors import ConfigError
from appliance.vhost._vhost_wire import FsConfig, ProtocolFeature, VirtioFeature, pack_fs_config

TAG_MAX_BYTES: Final = 36
MAX_REQUEST_QUEUES: Final = 255  # SET_VRING_KICK has 8 bits for the ring; one is hiprio
_MAX_QUEUE_SIZE: Final = 32768


@dataclass(frozen=True, slots=True)
class DeviceProperties:
    """What the operator chose.

    Args:
        num_queues: one hiprio and at least one request queue, at most 256 together.
        max_queue_size: largest ring to accept, a power of two up to 32768.
        tag: from `encode_tag`; None leaves the configuration space to the front-end, as QEMU needs:
            a QEMU 7.1 to 8.0 without its stable fixes dies when CONFIG is offered.
    """

    num_queues: int
    max_queue_size: int
    tag: bytes | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_queues - 1 <= MAX_REQUEST_QUEUES:
            raise ConfigError(
                f"{self.num_queues - 1} request queues: must be 1 to {MAX_REQUEST_QUEUES}"
            )
        if not is_queue_size(self.max_queue_size, _MAX_QUEUE_SIZE):
            raise ConfigError(
                f"queue size {self.max_queue_size}: must be a power of two up to {_MAX_QUEUE_SIZE}"
            )

    @property
    def virtio_features(self) -> VirtioFeature:
        """Features of GET_FEATURES. None of those that change the ring's layout or order."""
        return (
            VirtioFeature.VERSION_1
            | VirtioFeature.EVENT_IDX
            | VirtioFeature.INDIRECT_DESC
            | VirtioFeature.PROTOCOL_FEATURES
        )

    @property
    def protocol_features(self) -> ProtocolFeature:
        """Features of GET_PROTOCOL_FEATURES.

        Not STATUS: QEMU never reports DRIVER_OK for this device. Not INBAND_NOTIFICATIONS: UML
        would take it and send no kick and call descriptors. BACKEND_REQ goes with CONFIG, for UML:
        up to 6.12 it has an interrupt for its queues only if it has that channel (linux
        arch/um/drivers/virtio_uml.c: vhost_user_init). Nothing is ever sent on it.
        """
        features = (
            ProtocolFeature.MQ
            | ProtocolFeature.REPLY_ACK
            | ProtocolFeature.CONFIGURE_MEM_SLOTS
            | ProtocolFeature.RESET_DEVICE
            | ProtocolFeature.INFLIGHT_SHMFD
        )
        if self.tag is None:
            return features
        return features | ProtocolFeature.CONFIG | ProtocolFeature.BACKEND_REQ

    def read_config(self, offset: int, size: int) -> bytes:
        """Return `size` bytes of virtio_fs_config from `offset`; zeros past its end."""
        config = pack_fs_config(FsConfig(self.tag or b"", self.num_queues - 1))
        return config[offset : offset + size].ljust(size, b"\0")


def encode_tag(tag: str) -> bytes:
    """Return `tag` as the configuration space holds it, without padding.

    Raises:
        ConfigError: no guest could mount that tag.
    """
    try:
        encoded = tag.encode()
    except UnicodeEncodeError as exc:
        raise ConfigError(f"--tag {tag!r}: must be UTF-8") from exc
    if not 1 <= len(encoded) <= TAG_MAX_BYTES:
        raise ConfigError(f"--tag {tag!r}: must be 1 to {TAG_MAX_BYTES} bytes")
    if "\n" in tag or "\0" in tag:
        raise ConfigError(f"--tag {tag!r}: must not contain a newline or a NUL")
    return encoded


def is_queue_size(num: int, largest: int) -> bool:
    """Return whether a ring may have `num` entries: a power of two, 1..`largest`."""
    return 1 <= num <= largest and num & (num - 1) == 0
