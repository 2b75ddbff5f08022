"""What a guest, a front-end or an operator can make the processes of a session hold: every bound.

docs/bounds.md has the same table, with what happens at each bound and the test that reaches it.
Other modules take the numbers from here; those that C needs, too, are in `cffi_build/engine.h`, and
`tests/test_bounds.py` compares them. All sizes are in bytes.
"""

from typing import Final

# --- A front-end ---

# Descriptors in one message: those of the regions of a SET_MEM_TABLE.
MESSAGE_FDS_MAX: Final = 32
# Payload of one message. The largest legal one, a SET_MEM_TABLE of 32 regions, has 1,032.
PAYLOAD_MAX: Final = 4096
# Regions of guest memory, each with a descriptor: as many as KVM has memory slots. It must never
# shrink from one connection to the next.
REGIONS_MAX: Final = 509
# SET_VRING_KICK has 8 bits for a queue, and one of 256 is hiprio. Each queue has up to three
# descriptors, and an inflight buffer that may be another one than that of the other queues.
REQUEST_QUEUES_MAX: Final = 255
# Descriptors of a queue, and so requests of it that wait for an answer (VIRTIO 1.3, 2.7).
QUEUE_SIZE_MAX: Final = 32768
# Bytes of one request that are copied out of guest memory.
REQUEST_COPY_MAX: Final = 8192

# --- A session ---

# Worker processes: each of 256 queues has one, and the one before it that has not ended yet.
WORKERS_MAX: Final = 512
# Wants of one session that its supervisor is asked for at a time.
WANTS_MAX: Final = 1024
# Names in the root that are looked up at a time for one session.
ROOT_NAMES_MAX: Final = 8
# Store paths that a session may see.
GRANTS_MAX: Final = 1 << 20
# What a recording of a session has: Directories, and segments of blobs.
RECORDED_MAX: Final = 1 << 16
# The content that it covers.
RECORDED_BYTES_MAX: Final = 4 << 30
# Files of blobs that a worker holds open.
OPEN_FILES_MAX: Final = 64

# --- Channels between processes ---

# Messages that wait for a peer that does not read.
UNSENT_MAX: Final = 2048
# One message through a channel, and the descriptors with it. The kernel's limit for those is 253
# (SCM_MAX_FD in linux include/net/scm.h).
CHANNEL_MESSAGE_MAX: Final = 64 << 10
CHANNEL_FDS_MAX: Final = 200
# One message through an uplink: PIPE_BUF on Linux. Longer writes are split into packets (pipe(2)).
UPLINK_MESSAGE_MAX: Final = 4096

# --- The log ---

# Lines of one kind in a minute.
LOG_LINES_MAX: Final = 10
# Kinds of lines that are counted apart.
LOG_KINDS_MAX: Final = 1024

# --- A supervisor ---

# What --max-front-ends may be: front-ends that are served at a time on one socket. One more is
# accepted and waits; others are in the backlog of the socket.
FRONT_ENDS_MAX: Final = 256
# Names that are attached; each has a listening socket.
ATTACHED_MAX: Final = 4096
# A request of `appliance attach`, which has a name, a path and the name of a view.
CONTROL_REQUEST_MAX: Final = 16384
