"""Guest memory that a front-end adds, removes and replaces, and devices that come back."""

from appliance.bounds import MESSAGE_FDS_MAX
from appliance.vhost._vhost_wire import (
    Inflight,
    ProtocolFeature,
    Region,
    RequestNumber,
    pack_inflight,
)
from appliance.vhost.requests import REQUESTS
from tests.vhost.session_rig import (
    REGION,
    Rig,
    mem_table,
    memory_region,
    word,
)

OTHER = Region(0x200000, 0x100000, 0x7F00_0020_0000, 0x101000)


def test_a_memory_table_replaces_every_region() -> None:
    with Rig() as rig:
        rig.add_memory()
        rig.do(RequestNumber.SET_MEM_TABLE, mem_table([OTHER, REGION], junk=bytes(32)), 2)
        assert list(rig.backend.regions) == [OTHER, REGION]
        rig.do(RequestNumber.SET_MEM_TABLE, mem_table([]))
        assert rig.backend.regions == {}
        rig.do(RequestNumber.SET_MEM_TABLE, mem_table([REGION]), 1)


def test_a_memory_table_that_overlaps_itself_changes_nothing() -> None:
    with Rig() as rig:
        rig.add_memory(OTHER)
        assert not rig.is_acked(
            RequestNumber.SET_MEM_TABLE, mem_table([REGION, REGION._replace(gpa=0x900000)]), 2
        )
        assert list(rig.backend.regions) == [OTHER]


def test_a_memory_table_may_fill_a_message() -> None:
    regions = [
        Region(i << 20, 1 << 20, (1 << 40) + (i << 20), i << 20) for i in range(MESSAGE_FDS_MAX)
    ]
    with Rig() as rig:
        rig.do(RequestNumber.SET_MEM_TABLE, mem_table(regions), MESSAGE_FDS_MAX)
        assert list(rig.backend.regions) == regions
        more = mem_table([*regions, Region(1 << 30, 4096, 1 << 50, 0)])
        assert not rig.is_acked(RequestNumber.SET_MEM_TABLE, more, MESSAGE_FDS_MAX)


def test_regions_come_and_go_one_by_one() -> None:
    with Rig() as rig:
        rig.add_memory(REGION)
        rig.add_memory(OTHER)
        overlapping = OTHER._replace(size=OTHER.size + 1)
        assert not rig.is_acked(RequestNumber.ADD_MEM_REG, memory_region(overlapping), 1)
        rig.do(RequestNumber.REM_MEM_REG, memory_region(REGION._replace(mmap_offset=0)), 1)
        assert not rig.is_acked(RequestNumber.REM_MEM_REG, memory_region(REGION))
        assert list(rig.backend.regions) == [OTHER]
        assert ("remove_region", REGION) in rig.backend.calls


# --- A device that comes back on the same connection ---


def test_the_same_region_again_replaces_the_one_that_was_there() -> None:
    with Rig() as rig:
        rig.negotiate()
        rig.add_memory()
        rig.run_ring(1)
        moved = REGION._replace(mmap_offset=0x200000)
        rig.add_memory(moved)
        assert list(rig.backend.regions) == [moved]
        assert list(rig.backend.running) == [1], "rings in it go on"
        overlapping = REGION._replace(size=REGION.size * 2)
        assert not rig.is_acked(RequestNumber.ADD_MEM_REG, memory_region(overlapping), 1)
        rig.do(RequestNumber.REM_MEM_REG, memory_region(REGION), 0)
        assert rig.backend.regions == {}


def test_a_replacement_that_is_refused_leaves_the_region() -> None:
    with Rig() as rig:
        rig.add_memory()
        rig.backend.refuses = {"add_region"}
        assert not rig.is_acked(RequestNumber.ADD_MEM_REG, memory_region(REGION), 1)
        rig.backend.refuses = set()
        assert rig.is_acked(RequestNumber.REM_MEM_REG, memory_region(REGION))


def test_set_owner_again_begins_a_new_session() -> None:
    with Rig() as rig:
        features = rig.device.protocol_features & ~ProtocolFeature.INFLIGHT_SHMFD
        rig.do(RequestNumber.SET_PROTOCOL_FEATURES, word(features))
        rig.do(RequestNumber.SET_OWNER)
        rig.negotiate()
        for round_ in range(3):
            rig.add_memory()
            assert rig.run_ring(1).base == 0, "it does not go on where the last one stopped"
            rig.do(RequestNumber.SET_VRING_CALL, word(1), 1)
            assert list(rig.backend.running) == [1]
            rig.do(RequestNumber.SET_OWNER)
            assert rig.backend.running == {}
            assert rig.backend.calls.count(("begin_again",)) == round_ + 1
            assert not rig.is_acked(RequestNumber.REM_MEM_REG, memory_region(REGION)), (
                "memory is gone"
            )
            # What QEMU negotiates before SET_OWNER stays.
            wanted = pack_inflight(Inflight(0, 0, 2, 64))
            assert rig.handle(RequestNumber.GET_INFLIGHT_FD, wanted) == (
                RequestNumber.GET_INFLIGHT_FD,
                next(row.failure for row in REQUESTS if row.name == "GET_INFLIGHT_FD"),
                (),
            )
            rig.negotiate()


def test_the_first_set_owner_changes_nothing() -> None:
    with Rig() as rig:
        rig.negotiate()
        rig.add_memory()
        rig.run_ring(1)
        rig.do(RequestNumber.SET_OWNER)
        assert list(rig.backend.running) == [1]
