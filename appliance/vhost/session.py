"""One vhost-user session: negotiation, memory and rings; how each request is served and answered.

A request that cannot be served is answered according to the first line that applies:

    own reply with a failure form       that form (such as GET_INFLIGHT_FD: a size of 0)
    own reply without a failure form    the connection ends
    NEED_REPLY is set                   a failed ack
    unknown, or refused by `REQUESTS`   ignored, because nothing later depends on it
    anything else                       the connection ends, because the front-end would rely on
                                        the effect of the request

An ack is sent whenever NEED_REPLY asks for one, even if REPLY_ACK was not negotiated. A front-end
that sent no SET_PROTOCOL_FEATURES on this connection is assumed to have negotiated everything that
is offered, because QEMU does not repeat the negotiation after its socket has reconnected.

A device that comes back: if a VMM removes the device and adds it again on the same connection (QEMU
does, where the character device stays), it starts over with SET_OWNER, does not remove the memory
regions of the first time, and adds the same ones again. So another SET_OWNER ends what was begun:
rings, guest memory, virtio features, inflight buffer and FUSE session are as on a new connection.
Protocol features and the back-end channel stay, because QEMU sets them up before SET_OWNER. A
region that is added again, with the same addresses and size, replaces the one that was there.

Spec: vhost-user: Front-end message types; Protocol features; Memory access; Inflight I/O tracking;
Migration; Migrating back-end state; VHOST_USER_PROTOCOL_F_REPLY_ACK.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import ClassVar, Final

from appliance.bounds import REGIONS_MAX
from appliance.engine import inflight_size
from appliance.errors import VhostError
from appliance.vhost._vhost_wire import (
    CONFIG_SIZE,
    MEM_TABLE_SIZE,
    REGION_SIZE,
    Inflight,
    ProtocolFeature,
    RequestNumber,
    StateDirection,
    StatePhase,
    VirtioFeature,
    VringFd,
    VringState,
    Word,
    pack_inflight,
    pack_vring_state,
    pack_word,
    unpack_config,
    unpack_inflight,
    unpack_log,
    unpack_mem_reg,
    unpack_mem_table,
    unpack_region,
    unpack_state_transfer,
    unpack_vring_addr,
    unpack_vring_state,
    unpack_word,
)
from appliance.vhost.backend import Backend
from appliance.vhost.fds import FdHolder
from appliance.vhost.fs_device import DeviceProperties, is_queue_size
from appliance.vhost.guest_memory import RegionTable
from appliance.vhost.messages import Message, MessageReply, ack
from appliance.vhost.rings import Rings
from appliance.vhost.transport import Connection

_LOG: Final = logging.getLogger(__name__)

_RING_MASK: Final = 0xFF


class Session:
    """The state that one front-end sets up between its connection and its end.

    Messages are handled one at a time. `close` must be called at the end, even after an error.
    Descriptors that come with messages are owned by the session or, where `Backend` says so, by
    the backend.
    """

    def __init__(self, device: DeviceProperties, backend: Backend) -> None:
        self._device = device
        self._backend = backend
        self._rings = Rings(device, backend)
        self._features: int | None = None
        self._protocol_features: int | None = None
        self._has_owner = False
        self._backend_channel = FdHolder()  # kept open, and never used

    async def handle(self, message: Message) -> MessageReply | None:
        """Carry out `message`, close it, and return the reply to send, if any.

        The descriptors of the reply are lent.

        Raises:
            VhostError: the connection must end. The text names the request and was not logged.
        """
        _LOG.debug("received %s", message)
        try:
            self._check_untrusted(message)
            reply = await self._HANDLERS[RequestNumber(message.number)](self, message)
        except VhostError as exc:
            return _refuse(message, VhostError(f"{message.name}: {exc}"))
        finally:
            message.close()
        if reply is None and message.needs_reply:
            return ack(message, is_ok=True)
        return reply

    async def close(self) -> None:
        """Close the backend and every descriptor; the front-end is gone."""
        try:
            await self._backend.close()
        finally:
            self._rings.close()
            self._backend_channel.close()

    def _check_untrusted(self, message: Message) -> None:
        row = message.row
        if row is None:
            raise VhostError("unknown request")
        if row.refused is not None:
            raise VhostError(f"refused, {row.refused}")
        if row.needs is not None and not self._has(ProtocolFeature[row.needs]):
            raise VhostError(f"protocol feature {row.needs} was not negotiated")
        fewest, most = row.fds
        if not fewest <= len(message.fds) <= most:
            raise VhostError(f"{len(message.fds)} descriptors, expected {fewest} to {most}")

    def _has(self, feature: ProtocolFeature) -> bool:
        features = self._protocol_features
        return bool(feature & (self._device.protocol_features if features is None else features))

    # --- Negotiation ---

    async def _get_features(self, message: Message) -> MessageReply:
        return _word(message, self._device.virtio_features)

    async def _set_features(self, message: Message) -> None:
        features = unpack_word(message.payload).value
        _check_subset_untrusted(features, self._device.virtio_features)
        self._features = features
        await self._rings.set_features(features & ~int(VirtioFeature.PROTOCOL_FEATURES))
        if not features & VirtioFeature.PROTOCOL_FEATURES:
            await self._rings.enable_all()

    async def _get_protocol_features(self, message: Message) -> MessageReply:
        return _word(message, self._device.protocol_features)

    async def _set_protocol_features(self, message: Message) -> None:
        features = unpack_word(message.payload).value
        _check_subset_untrusted(features, self._device.protocol_features)
        self._protocol_features = features

    async def _get_queue_num(self, message: Message) -> MessageReply:
        return _word(message, self._device.num_queues)

    async def _set_owner(self, _message: Message) -> None:
        """Begin, or begin again: see "A device that comes back" above."""
        if self._has_owner:
            _LOG.info("another device begins on this connection: SET_OWNER came again")
            await self._rings.begin_again()
            self._features = None
            await self._backend.begin_again()
        self._has_owner = True

    async def _reset_owner(self, _message: Message) -> None:
        await self._rings.disable_all()

    async def _reset_device(self, _message: Message) -> None:
        await self._rings.disable_all()
        await self._backend.reset()

    # --- Configuration space ---

    async def _set_backend_req_fd(self, message: Message) -> None:
        self._backend_channel.replace(message.take_fd(0))

    async def _get_config(self, message: Message) -> MessageReply:
        config = unpack_config(message.payload)
        # The fields before the content are returned as they came, because crosvm sets flags that
        # others leave clear.
        content = self._device.read_config(config.offset, config.size)
        return MessageReply(message.number, message.payload[:CONFIG_SIZE] + content)

    async def _set_config(self, message: Message) -> None:
        config = unpack_config(message.payload)
        raise VhostError(
            f"offset {config.offset}, {config.size} bytes: the configuration space is read-only"
        )

    # --- Memory ---

    async def _get_max_mem_slots(self, message: Message) -> MessageReply:
        return _word(message, REGIONS_MAX)

    async def _set_mem_table(self, message: Message) -> None:
        num_regions = unpack_mem_table(message.payload).num_regions
        if len(message.fds) != num_regions:
            raise VhostError(
                f"{len(message.fds)} descriptors for {num_regions} regions, expected one for each"
            )
        regions = [
            unpack_region(message.payload, MEM_TABLE_SIZE + REGION_SIZE * index)
            for index in range(num_regions)
        ]
        memory = RegionTable()
        for region in regions:
            memory = memory.with_region_untrusted(region)
        await self._backend.set_regions(
            [(region, message.take_fd(index)) for index, region in enumerate(regions)]
        )
        self._rings.memory = memory

    async def _add_mem_reg(self, message: Message) -> None:
        region = unpack_mem_reg(message.payload).region
        memory = self._rings.memory
        replaced = memory.find(region)
        if replaced is not None:
            memory, _replaced = memory.without_region_untrusted(region)
        memory = memory.with_region_untrusted(region)
        await self._backend.add_region(region, message.take_fd(0), replaced)
        self._rings.memory = memory

    async def _rem_mem_reg(self, message: Message) -> None:
        region = unpack_mem_reg(message.payload).region
        memory, known = self._rings.memory.without_region_untrusted(region)
        await self._backend.remove_region(known)
        self._rings.memory = memory

    # --- Rings ---

    async def _set_vring_num(self, message: Message) -> None:
        self._rings.set_num_untrusted(unpack_vring_state(message.payload))

    async def _set_vring_addr(self, message: Message) -> None:
        await self._rings.set_addr_untrusted(unpack_vring_addr(message.payload))

    async def _set_vring_base(self, message: Message) -> None:
        self._rings.set_base_untrusted(unpack_vring_state(message.payload))

    async def _get_vring_base(self, message: Message) -> MessageReply:
        index = unpack_vring_state(message.payload).ring
        base = await self._rings.take_base_untrusted(index)
        return MessageReply(message.number, pack_vring_state(VringState(index, base)))

    async def _set_vring_enable(self, message: Message) -> None:
        if self._features is not None and not self._features & VirtioFeature.PROTOCOL_FEATURES:
            raise VhostError("virtio feature PROTOCOL_FEATURES was not negotiated")
        await self._rings.set_enabled_untrusted(unpack_vring_state(message.payload))

    async def _set_vring_kick(self, message: Message) -> None:
        index, fd = self._take_vring_fd_untrusted(message)
        if fd is None:
            raise VhostError(f"ring {index} without a kick descriptor: polling is not offered")
        await self._rings.set_kick(index, fd)

    async def _set_vring_call(self, message: Message) -> None:
        index, fd = self._take_vring_fd_untrusted(message)
        await self._rings.set_call(index, fd)

    async def _set_vring_err(self, message: Message) -> None:
        index, fd = self._take_vring_fd_untrusted(message)
        await self._rings.set_err(index, fd)

    def _take_vring_fd_untrusted(self, message: Message) -> tuple[int, int | None]:
        value = unpack_word(message.payload).value
        index = value & _RING_MASK
        self._rings.check_index_untrusted(index)
        if value > _RING_MASK | VringFd.NONE:
            raise VhostError(f"ring {index}: unknown bits in 0x{value:x}")
        num_fds = 0 if value & VringFd.NONE else 1
        if len(message.fds) != num_fds:
            raise VhostError(
                f"ring {index}: {len(message.fds)} descriptors with 0x{value:x}, expected {num_fds}"
            )
        return index, message.take_fd(0) if num_fds else None

    # --- Saving and moving ---

    async def _set_log_base(self, message: Message) -> MessageReply:
        log = unpack_log(message.payload)
        await self._rings.set_log_base(message.take_fd(0), log)
        # rust-vmm's front-end wants the request's payload back, and QEMU ignores it.
        return MessageReply(message.number, message.payload)

    async def _set_log_fd(self, message: Message) -> None:
        """Close the descriptor: front-ends look at the log when they want to, and wait for none."""

    async def _set_device_state_fd(self, message: Message) -> MessageReply:
        direction, phase = unpack_state_transfer(message.payload)
        if phase != StatePhase.STOPPED:
            raise VhostError(f"phase {phase}, expected {StatePhase.STOPPED} (stopped)")
        self._check_stopped()
        if direction == StateDirection.SAVE:
            await self._backend.save_state(message.take_fd(0))
        elif direction == StateDirection.LOAD:
            await self._backend.load_state(message.take_fd(0))
        else:
            raise VhostError(f"direction {direction}, expected 0 (save) or 1 (load)")
        return _word(message, VringFd.NONE)

    async def _check_device_state(self, message: Message) -> MessageReply:
        self._check_stopped()
        await self._backend.finish_state()
        return _word(message, 0)

    def _check_stopped(self) -> None:
        if running := self._rings.running():
            raise VhostError(f"rings {running} run, expected all to be stopped")

    # --- Inflight buffer ---

    async def _get_inflight_fd(self, message: Message) -> MessageReply:
        wanted = unpack_inflight(message.payload)
        self._check_inflight_untrusted(wanted)
        fd, size, offset = await self._backend.inflight(wanted.num_queues, wanted.queue_size)
        inflight = wanted._replace(mmap_size=size, mmap_offset=offset)
        return MessageReply(message.number, pack_inflight(inflight), (fd,))

    async def _set_inflight_fd(self, message: Message) -> None:
        inflight = unpack_inflight(message.payload)
        self._check_inflight_untrusted(inflight)
        needed = inflight.num_queues * inflight_size(inflight.queue_size)
        if inflight.mmap_size < needed:
            raise VhostError(
                f"inflight buffer of {inflight.mmap_size} bytes, expected at least {needed}"
            )
        await self._backend.set_inflight(message.take_fd(0), *inflight)
        self._rings.set_inflight(inflight)

    def _check_inflight_untrusted(self, inflight: Inflight) -> None:
        if not 1 <= inflight.num_queues <= self._device.num_queues:
            raise VhostError(
                f"inflight buffer for {inflight.num_queues} queues, expected 1 to "
                f"{self._device.num_queues}"
            )
        if not is_queue_size(inflight.queue_size, self._device.max_queue_size):
            raise VhostError(
                f"inflight buffer for queues of {inflight.queue_size} entries, expected a power of "
                f"two up to {self._device.max_queue_size}"
            )

    _HANDLERS: ClassVar[
        Mapping[RequestNumber, Callable[["Session", Message], Awaitable[MessageReply | None]]]
    ] = {
        RequestNumber.GET_FEATURES: _get_features,
        RequestNumber.SET_FEATURES: _set_features,
        RequestNumber.SET_OWNER: _set_owner,
        RequestNumber.SET_BACKEND_REQ_FD: _set_backend_req_fd,
        RequestNumber.RESET_OWNER: _reset_owner,
        RequestNumber.SET_MEM_TABLE: _set_mem_table,
        RequestNumber.SET_LOG_BASE: _set_log_base,
        RequestNumber.SET_LOG_FD: _set_log_fd,
        RequestNumber.SET_VRING_NUM: _set_vring_num,
        RequestNumber.SET_VRING_ADDR: _set_vring_addr,
        RequestNumber.SET_VRING_BASE: _set_vring_base,
        RequestNumber.GET_VRING_BASE: _get_vring_base,
        RequestNumber.SET_VRING_KICK: _set_vring_kick,
        RequestNumber.SET_VRING_CALL: _set_vring_call,
        RequestNumber.SET_VRING_ERR: _set_vring_err,
        RequestNumber.GET_PROTOCOL_FEATURES: _get_protocol_features,
        RequestNumber.SET_PROTOCOL_FEATURES: _set_protocol_features,
        RequestNumber.GET_QUEUE_NUM: _get_queue_num,
        RequestNumber.SET_VRING_ENABLE: _set_vring_enable,
        RequestNumber.GET_CONFIG: _get_config,
        RequestNumber.SET_CONFIG: _set_config,
        RequestNumber.GET_INFLIGHT_FD: _get_inflight_fd,
        RequestNumber.SET_INFLIGHT_FD: _set_inflight_fd,
        RequestNumber.RESET_DEVICE: _reset_device,
        RequestNumber.GET_MAX_MEM_SLOTS: _get_max_mem_slots,
        RequestNumber.ADD_MEM_REG: _add_mem_reg,
        RequestNumber.REM_MEM_REG: _rem_mem_reg,
        RequestNumber.SET_DEVICE_STATE_FD: _set_device_state_fd,
        RequestNumber.CHECK_DEVICE_STATE: _check_device_state,
    }


def _word(message: Message, value: int) -> MessageReply:
    return MessageReply(message.number, pack_word(Word(value)))


def _check_subset_untrusted(features: int, offered: int) -> None:
    # Converted to int, because the complement of an IntFlag has only bits that have names.
    unknown = features & ~int(offered)
    if unknown:
        raise VhostError(f"features 0x{unknown:x} were not offered")


def _refuse(message: Message, error: VhostError) -> MessageReply | None:
    # Follows the table in the module's docstring.
    row = message.row
    reply = None
    if row is not None and row.failure is not None:
        reply = MessageReply(message.number, row.failure)
    elif row is not None and row.reply != "ack":
        raise error
    elif message.needs_reply:
        reply = ack(message, is_ok=False)
    elif row is not None and row.refused is None:
        raise error
    _LOG.warning("refused: %s", error)
    return reply


# --- One connection ---


async def converse(connection: Connection, session: Session) -> None:
    """Handle requests until the front-end is gone, then close `session` and `connection`.

    Both are closed even after an error. The session is closed first, because a front-end that sees
    the end of its socket may rely on its memory not being accessed any more.

    Raises:
        VhostError: the front-end broke the protocol. The error was not logged.
    """
    try:
        while (message := await connection.receive()) is not None:
            reply = await session.handle(message)
            if reply is not None:
                await connection.send(reply)
    finally:
        try:
            await session.close()
        finally:
            connection.close()
