"""The layout of records is that of the kernel's structures."""

from appliance.fuse_proto import _fuse_wire
from appliance.images import layout


def test_a_record_begins_with_the_structures_of_the_wire() -> None:
    assert (layout.ENTRY_OUT_SIZE, layout.DIRENT_SIZE) == (
        _fuse_wire.ENTRY_OUT_SIZE,
        _fuse_wire.DIRENT_SIZE,
    )
    assert layout.NAME_AT == _fuse_wire.DIRENTPLUS_SIZE
