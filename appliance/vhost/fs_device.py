"""The virtio-fs device as a front-end sees it: queues, features, configuration space.

Queue 0 is the hiprio queue, and the queues from 1 on are request queues. There is no notification
queue, because its feature bit, which would shift the request queues, is never offered.

Spec: VIRTIO 1.3, 5.11 (File System Device). vhost-user: Multiple queue support; Protocol features;
Virtio device config space.
"""

from dataclasses import dataclass
from typing import Final

from appliance.bounds import QUEUE_SIZE_MAX, REQUEST_QUEUES_MAX
from appliance.errors import ConfigError
from appliance.vhost._vhost_wire import FsConfig, ProtocolFeature, VirtioFeature, pack_fs_config

TAG_MAX_BYTES: Final = 36


@dataclass(frozen=True, slots=True)
class DeviceProperties:
    """The properties that the operator chose.

    Args:
        num_queues: one hiprio and at least one request queue, at most 256 in all.
        max_queue_size: the largest number of entries of a ring, a power of two up to 32768.
        tag: from `encode_tag`. None leaves the configuration space to the front-end, as QEMU
            requires: QEMU 7.1 to 8.0 without its stable fixes crashes when CONFIG is offered.

    Raises:
        ConfigError: a number is out of range.
    """

    num_queues: int
    max_queue_size: int
    tag: bytes | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_queues - 1 <= REQUEST_QUEUES_MAX:
            raise ConfigError(
                f"{self.num_queues - 1} request queues: expected 1 to {REQUEST_QUEUES_MAX}"
            )
        if not is_queue_size(self.max_queue_size, QUEUE_SIZE_MAX):
            raise ConfigError(
                f"queue size {self.max_queue_size}: expected a power of two up to {QUEUE_SIZE_MAX}"
            )

    @property
    def virtio_features(self) -> VirtioFeature:
        """The reply to GET_FEATURES; no feature that changes the layout or order of rings."""
        return (
            VirtioFeature.VERSION_1
            | VirtioFeature.LOG_ALL
            | VirtioFeature.EVENT_IDX
            | VirtioFeature.INDIRECT_DESC
            | VirtioFeature.PROTOCOL_FEATURES
        )

    @property
    def protocol_features(self) -> ProtocolFeature:
        """The reply to GET_PROTOCOL_FEATURES.

        STATUS is not offered, because QEMU never reports DRIVER_OK for this device.
        INBAND_NOTIFICATIONS is not offered, because UML would use it and send no kick and call
        descriptors. BACKEND_REQ is offered together with CONFIG for UML, which up to 6.12 has an
        interrupt for its queues only if it has that channel (linux arch/um/drivers/virtio_uml.c:
        vhost_user_init). Nothing is ever sent on that channel.
        """
        features = (
            ProtocolFeature.MQ
            | ProtocolFeature.REPLY_ACK
            | ProtocolFeature.CONFIGURE_MEM_SLOTS
            | ProtocolFeature.RESET_DEVICE
            | ProtocolFeature.INFLIGHT_SHMFD
            | ProtocolFeature.LOG_SHMFD
            | ProtocolFeature.DEVICE_STATE
        )
        if self.tag is None:
            return features
        return features | ProtocolFeature.CONFIG | ProtocolFeature.BACKEND_REQ

    def read_config(self, offset: int, size: int) -> bytes:
        """Return `size` bytes of virtio_fs_config from byte `offset`, with zeros past its end.

        Spec: VIRTIO 1.3, 5.11.4 (Device configuration layout).
        """
        config = pack_fs_config(FsConfig(self.tag or b"", self.num_queues - 1))
        return config[offset : offset + size].ljust(size, b"\0")


def encode_tag(tag: str) -> bytes:
    """Return `tag` as the configuration space holds it, without padding.

    Raises:
        ConfigError: no guest could mount a file system with that tag.
    """
    try:
        encoded = tag.encode()
    except UnicodeEncodeError as exc:
        raise ConfigError(f"--tag {tag!r}: is not UTF-8") from exc
    if not 1 <= len(encoded) <= TAG_MAX_BYTES:
        raise ConfigError(f"--tag {tag!r}: has {len(encoded)} bytes, expected 1 to {TAG_MAX_BYTES}")
    if "\n" in tag or "\0" in tag:
        raise ConfigError(f"--tag {tag!r}: contains a newline or a NUL")
    return encoded


def is_queue_size(num: int, largest: int) -> bool:
    """Return whether a ring may have `num` entries: a power of two from 1 to `largest`."""
    return 1 <= num <= largest and num & (num - 1) == 0
