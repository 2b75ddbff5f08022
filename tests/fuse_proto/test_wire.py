import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.fuse_proto import _fuse_wire
from appliance.fuse_proto._fuse_wire import InitFlag, Opcode
from tools import fuse_table, wiregen
from tools.wiregen import Layout

LAYOUTS = wiregen.parse_layouts(fuse_table.STRUCTS)


def values(layout: Layout) -> st.SearchStrategy[object]:
    parts: list[st.SearchStrategy[object]] = []
    for item in layout.fields:
        if item.nested is not None:
            parts.append(values(item.nested))
        elif item.code.isupper():
            parts.append(st.integers(0, (1 << 8 * item.size) - 1))
        else:
            half = 1 << 8 * item.size - 1
            parts.append(st.integers(-half, half - 1))
    return st.builds(getattr(_fuse_wire, layout.row.name), *parts)


@pytest.mark.parametrize("name", sorted(LAYOUTS))
@given(data=st.data())
def test_every_structure_survives_packing(name: str, data: st.DataObject) -> None:
    size, unpack, pack = _fuse_wire.CODECS[name]
    value = data.draw(values(LAYOUTS[name]))
    packed = pack(value)
    assert len(packed) == size
    assert unpack(packed, 0) == value
    assert unpack(memoryview(b"junk" + packed + b"junk"), 4) == value
    for short in range(size):
        with pytest.raises(struct.error):
            unpack(packed[:short], 0)


def test_sizes_are_the_protocols() -> None:
    sizes = {
        "InHeader": 40,
        "OutHeader": 16,
        "Attr": 88,
        "EntryOut": 128,
        "AttrOut": 104,
        "SetattrIn": 88,
        "ReadIn": 40,
        "WriteIn": 40,
        "StatfsOut": 80,
        "InitIn": 64,
        "InitOut": 64,
        "Dirent": 24,
        "Direntplus": 152,
        "CopyFileRangeIn": 56,
        "NotifyRetrieveIn": 40,
        # The installed header does not have these; only this test compares them with the protocol.
        "SxTime": 16,
        "Statx": 256,
        "StatxIn": 24,
        "StatxOut": 288,
        "CopyFileRangeOut": 8,
    }
    assert {name: _fuse_wire.CODECS[name].size for name in sizes} == sizes


def test_statx_fields_lie_where_the_kernel_has_them() -> None:
    offsets = {item.name: item.offset for item in LAYOUTS["Statx"].fields}
    expected = {"mode": 28, "ino": 32, "attributes_mask": 56, "atime": 64, "btime": 80}
    expected |= {"ctime": 96, "mtime": 112, "rdev_major": 128, "dev_minor": 140}
    assert {name: offsets[name] for name in expected} == expected
    assert {item.name: item.offset for item in LAYOUTS["StatxOut"].fields}["stat"] == 32


def test_init_out_fields_lie_where_the_kernel_has_them() -> None:
    offsets = {item.name: item.offset for item in LAYOUTS["InitOut"].fields}
    expected = {"max_write": 20, "max_pages": 28, "flags2": 32}
    expected |= {"max_stack_depth": 36, "request_timeout": 40}
    assert {name: offsets[name] for name in expected} == expected


def test_numbers_newer_than_the_header_are_the_protocols() -> None:
    assert (Opcode.STATX, Opcode.COPY_FILE_RANGE_64) == (52, 53)
    assert InitFlag.PASSTHROUGH == 1 << 37
    assert InitFlag.REQUEST_TIMEOUT == 1 << 42


def test_the_reserved_init_bit_is_nobodys() -> None:
    assert all(flag != 1 << 31 for flag in InitFlag)
