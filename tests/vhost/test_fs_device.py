"""The features that the device offers, and its configuration space."""

import pytest

from appliance.errors import ConfigError
from appliance.vhost._vhost_wire import ProtocolFeature
from appliance.vhost.fs_device import DeviceProperties, encode_tag


def test_the_configuration_space_is_tag_and_number_of_request_queues() -> None:
    device = DeviceProperties(num_queues=4, max_queue_size=1024, tag=b"nix")
    config = b"nix".ljust(36, b"\0") + b"\x03\0\0\0"
    assert device.read_config(0, 40) == config
    assert device.read_config(36, 4) == b"\x03\0\0\0"
    assert device.read_config(2, 1) == b"x"
    assert device.read_config(0, 256) == config.ljust(256, b"\0")
    assert device.read_config(38, 8) == bytes(8)
    assert device.read_config(2**32 - 1, 5) == bytes(5)


def test_a_tag_of_36_bytes_fills_its_field() -> None:
    device = DeviceProperties(2, 1024, encode_tag("ü" * 18))
    assert device.read_config(0, 36).decode() == "ü" * 18


@pytest.mark.parametrize("tag", ["", "x" * 37, "ü" * 19, "a\nb", "a\0b", "\udc80"])
def test_a_tag_that_no_guest_could_mount_is_a_config_error(tag: str) -> None:
    with pytest.raises(ConfigError, match="tag"):
        encode_tag(tag)


def test_config_is_offered_only_with_a_tag() -> None:
    assert ProtocolFeature.CONFIG in DeviceProperties(2, 1024, b"t").protocol_features
    assert ProtocolFeature.CONFIG not in DeviceProperties(2, 1024).protocol_features


def test_offered_features_are_the_ones_that_are_served() -> None:
    device = DeviceProperties(2, 1024)
    assert device.virtio_features == 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 26
    assert device.protocol_features == sum(1 << bit for bit in (0, 1, 3, 12, 13, 15, 19))


def test_a_tag_brings_the_configuration_space_and_the_channel_that_uml_needs() -> None:
    device = DeviceProperties(2, 1024, b"t")
    assert device.protocol_features == sum(1 << bit for bit in (0, 1, 3, 5, 9, 12, 13, 15, 19))


@pytest.mark.parametrize(
    ("num_queues", "queue_size"), [(1, 128), (257, 128), (2, 0), (2, 100), (2, 65536)]
)
def test_impossible_queues_are_a_config_error(num_queues: int, queue_size: int) -> None:
    with pytest.raises(ConfigError):
        DeviceProperties(num_queues, queue_size)
