/*
 * The load generator of `appliance bench`: the driver's side of a virtqueue that carries prepared FUSE
 * requests (bench_ring.c), and system calls on a mounted directory (bench_calls.c).
 *
 * This file is the cffi cdef, too, as engine.h is. The caller owns every buffer and descriptor named
 * here. Times are nanoseconds of CLOCK_MONOTONIC.
 */
#ifndef BENCH_H
#define BENCH_H
#include <stddef.h>
#include <stdint.h>

enum {
	BENCH_SUB_BITS = 5,		/* each power of two is divided into 32 buckets, 3 % wide */
	BENCH_BUCKETS = 1920,		/* enough for every 64-bit latency */
	BENCH_REQUEST_MAX = 4096,	/* bytes of one request */
	BENCH_PAGE = 4096,		/* each page of a reply has a descriptor of its own */
	BENCH_SLOT_HEAD = 8192,		/* bytes of a slot beside its table and its reply's body */
};

/* What a run has measured. The caller clears it; several runs may add to one. */
struct bench_figures {
	uint64_t completed;
	uint64_t elapsed_ns;		/* from the first request of the run to the last reply */
	uint64_t body_bytes;
	uint64_t max_ns;
	uint64_t kicks;
	uint64_t waits;			/* how often the generator slept */
	uint64_t odd_lengths;		/* replies whose length in the used ring is not their own */
	uint64_t buckets[1920];		/* of latencies, by bench_bucket() */
};

/* Returns the index of the bucket that a latency belongs to. */
uint32_t bench_bucket(uint64_t latency_ns);

/* Returns the smallest latency that belongs to a bucket. */
uint64_t bench_bucket_start(uint32_t bucket);

/* What the reply to a request must be. */
enum {
	BENCH_ANY,		/* an error or a body of the right size */
	BENCH_DATA,		/* no error, and a body of the right size */
	BENCH_FOUND,		/* the same; the body begins with a nodeid that is not 0 */
	BENCH_ABSENT,		/* ENOENT, or a body that begins with nodeid 0 */
};

/* A prepared request. */
struct bench_request {
	uint32_t at;		/* where it begins in `bytes` of the ring */
	uint32_t size;		/* with its header, at most BENCH_REQUEST_MAX */
	uint32_t room;		/* bytes of descriptors for the reply's body */
	uint32_t body_min;
	uint32_t body_max;	/* at most `room` */
	uint32_t kind;
};

/* Why a run ended early; functions return them negated. */
enum {
	BENCH_EGONE = 1,	/* the back-end closed its connection */
	BENCH_ESTALL,		/* no reply came for `stall_ns` */
	BENCH_EINTR,		/* a signal arrived while the generator slept */
	BENCH_EKICK,		/* the kick descriptor cannot be written; `fault_value` is the errno */
	BENCH_EUSED,		/* `fault_value` in the used ring names no request that is in flight */
	BENCH_EJUMP,		/* the index of the used ring ran ahead, to `fault_value` */
	BENCH_EUNIQUE,		/* the reply names another request: `fault_value`, not `fault_wanted` */
	BENCH_ELEN,		/* the header states `fault_value` bytes; the room is `fault_wanted` */
	BENCH_EERROR,		/* the reply's error is `fault_value`, an errno of either sign */
	BENCH_EBODY,		/* the body has `fault_value` bytes, not `fault_wanted` */
	BENCH_ENODE,		/* the nodeid is `fault_value` */
	BENCH_ECALL,		/* a system call failed; `fault_value` is the errno, 0 for none */
};

struct bench_slot {
	uint64_t unique;	/* of the request in flight, or 0 */
	uint64_t sent_ns;
	uint32_t request;	/* its index */
	uint32_t room;		/* what the table was written for */
	uint32_t size;		/* the same */
};

struct bench_ring {
	/* set once */
	uint8_t *desc, *avail, *used;	/* where the three areas are in this process */
	uint32_t num;
	uint32_t is_event_idx;
	int32_t kick_fd, call_fd;	/* eventfds that do not block */
	int32_t back_end_fd;		/* the connection, on which nothing is due; or -1 */
	uint8_t *memory;		/* a piece of guest memory for the slots, aligned to BENCH_PAGE */
	uint64_t memory_gpa;
	uint32_t slot_size;		/* bytes of it for each; see bench_slot_size() */
	uint32_t slots_num;		/* at most `num` */
	struct bench_slot *slots;	/* zeroed */
	/* kept from call to call */
	uint64_t unique;
	uint32_t in_flight;
	uint16_t avail_idx, used_idx;
	/* set before each call */
	const uint8_t *bytes;
	const struct bench_request *requests;
	uint32_t requests_num;
	uint32_t first;			/* index of the request to start with */
	uint32_t depth;			/* requests in flight, at most `slots_num` */
	uint64_t count;			/* requests to send, 0 for no limit */
	uint64_t duration_ns;		/* no request is sent after it */
	uint64_t stall_ns;
	struct bench_figures *figures;
	/* set by a call that fails */
	uint32_t fault_request;
	int64_t fault_value;
	uint64_t fault_wanted;
};

/* Returns the bytes of memory that each slot takes for replies with bodies of up to `room_max`. */
size_t bench_slot_size(uint32_t room_max);

/* Returns where the reply of a slot is, its header first and its body at the second address. */
const uint8_t *bench_reply(const struct bench_ring *ring, uint32_t slot);
const uint8_t *bench_reply_body(const struct bench_ring *ring, uint32_t slot);

/*
 * Sends requests, one after the other and from the first again, keeps `depth` of them in flight, and
 * returns when the last reply has come: 0, or a negated error, after which the ring is of no more use.
 */
int bench_ring_run(struct bench_ring *ring);

/* A system call on a mounted directory. */
enum {
	BENCH_CALL_STAT,	/* fstatat(2) of a path that is there */
	BENCH_CALL_ABSENT,	/* of one that is not */
	BENCH_CALL_FSTAT,
	BENCH_CALL_LIST,	/* getdents64(2), from the start of the directory to its end */
	BENCH_CALL_READ,	/* pread(2) of exactly `size` bytes */
	BENCH_CALL_READLINK,
};

struct bench_call {
	uint32_t path;		/* where its path begins in `paths` of the calls, which ends with a NUL */
	int32_t fd;
	uint64_t offset;
	uint32_t size;
};

struct bench_calls {
	uint32_t kind;
	const char *paths;
	const struct bench_call *calls;
	uint32_t calls_num;
	uint32_t first;
	uint8_t *buffer;
	uint32_t buffer_size;
	uint64_t duration_ns;
	struct bench_figures *figures;
	/* set by a call that fails */
	uint32_t fault_call;
	int64_t fault_value;
};

/* Makes the calls, one after the other and from the first again; returns 0 or -BENCH_ECALL. */
int bench_calls_run(struct bench_calls *calls);
#endif
