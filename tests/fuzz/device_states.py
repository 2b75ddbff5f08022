"""States of sessions as a hostile front-end could pass them on: damaged, or whole but wrong."""

import random
import struct
import zlib
from typing import Final

from appliance.protos.device_state_pb2 import DeviceState

BORDERS: Final = (0, 1, 2, 64, 0xFF, 0x100, 4096, 0xFFFF, 1 << 31, (1 << 32) - 1, (1 << 64) - 1)
"""Numbers where something may go wrong."""
_HEADER: Final = struct.Struct("<8sIIQ")  # appliance/session/device_state.py


def damaged_state(state: bytes, rng: random.Random) -> bytes:
    """Return the state of a session with damage; most often, its checksum is right all the same."""
    header, message = state[: _HEADER.size], state[_HEADER.size :]
    if rng.randrange(2):
        message = _other_state(DeviceState.FromString(message), rng)
    else:
        damaged = bytearray(message)
        for _ in range(rng.randrange(4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        if not rng.randrange(4):
            del damaged[rng.randrange(len(damaged)) :]
        message = bytes(damaged)
    if rng.randrange(8):
        magic, version, _checksum, _length = _HEADER.unpack(header)
        header = _HEADER.pack(magic, version, zlib.crc32(message), len(message))
    return header + message


def _other_state(state: DeviceState, rng: random.Random) -> bytes:
    numbers = (*BORDERS, rng.getrandbits(64), state.next_base)
    for _ in range(rng.choice((0, 0, 1, 3, 200))):
        state.grants.append(rng.choice(state.grants))
    for _ in range(rng.randrange(1, 4)):
        grant = rng.choice(state.grants)
        match rng.randrange(8):
            case 0:
                grant.base = rng.choice(numbers)
            case 1:
                grant.span = rng.choice(numbers)
            case 2:
                grant.size = rng.choice(numbers)
            case 3:
                grant.kind = rng.choice((0, *b"dfxl", 1 << 31))
            case 4:
                grant.name = rng.choice((b"", b"/", b"..", b"x" * 255, b"x" * 300_000))
            case 5:
                grant.digest = rng.randbytes(rng.choice((0, 31, 32, 100_000)))
            case 6:
                state.next_base = rng.choice(numbers)
            case _:
                state.generation = rng.choice(numbers) & 0xFFFFFFFF
    return state.SerializeToString()
