/*
 * The engine: guest memory, one split virtqueue, and copies between the two and files.
 *
 * This file is the cffi cdef, too: build_modules.py drops the lines that start with '#'. So it holds
 * declarations only: no macros with arguments, attributes or inline functions.
 *
 * The caller owns every object and buffer named here; the engine allocates nothing but mappings.
 * Functions return 0 (or a count) or a negated ENG_E* code, unless their comment says otherwise.
 */
#ifndef ENGINE_H
#define ENGINE_H
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>
#include <linux/virtio_ring.h>

struct iovec;
struct vring_desc;
struct vring_avail;
struct vring_used;

enum {
	ENG_REGIONS_MAX = 509,
	ENG_NUM_MAX = 32768,		/* VIRTIO 1.3, 2.7: largest split queue */
	ENG_SLOTS_MAX = 64,
	ENG_REQUEST_MAX = 8192,		/* bytes of a request that are copied out */
	ENG_SCRATCH_SIZE = 262144,
	ENG_CHAIN_IOV_MAX = 33792,	/* longest chain, and splits at region borders */
	ENG_IOV_NUM = 67584,
	ENG_IOV_SIZE = 1081344,		/* bytes of ENG_IOV_NUM struct iovec */
};

enum eng_error {
	/* the guest, or whoever described the ring, broke a rule: the ring is broken */
	ENG_ENUM = 1, ENG_EDESC_AREA, ENG_EAVAIL_AREA, ENG_EUSED_AREA, ENG_EINFLIGHT, ENG_EUSED_IDX,
	ENG_EAVAIL_JUMP, ENG_EHEAD, ENG_ENEXT, ENG_ELOOP, ENG_EINDIRECT_FEATURE, ENG_EINDIRECT_NEXT,
	ENG_EINDIRECT_NESTED, ENG_EINDIRECT_LEN, ENG_EADDR_OVERFLOW, ENG_EADDR, ENG_EORDER,
	ENG_ETOTAL, ENG_EFRAGMENTS, ENG_EKICK, ENG_EBROKEN,
	/* the caller broke a rule */
	ENG_ESTALE, ENG_ESLOT, ENG_EBOUNDS, ENG_EIDLE,
};

/* How a descriptor is written to without waiting. */
enum eng_signal_kind { ENG_SIGNAL_POLLED, ENG_SIGNAL_SOCKET, ENG_SIGNAL_NONBLOCKING };

/* A piece of guest memory, mapped. */
struct eng_region {
	uint64_t gpa, size, user_addr;
	uint8_t *host;			/* of the region's first byte */
	uint8_t *base;			/* of the mapping, which may begin before the region */
	uint64_t base_size;
};

/* All of guest memory, sorted by gpa. */
struct eng_map {
	uint32_t num;
	uint32_t hit;			/* where the last lookup by gpa succeeded */
	uint32_t generation;		/* counts removals: host pointers from before are dead */
	struct eng_region region[ENG_REGIONS_MAX];
};

/* vhost-user: inflight I/O tracking, split virtqueue. In memory that outlives this process. */
struct eng_inflight_desc {
	uint8_t inflight;
	uint8_t padding[5];
	uint16_t next;
	uint64_t counter;
};

struct eng_inflight {
	uint64_t features;
	uint16_t version, desc_num, last_batch_head, used_idx;
	struct eng_inflight_desc desc[];
};

/* A chain that an earlier process popped and did not return, as its record was read. */
struct eng_recovered {
	uint64_t counter;		/* when it was popped, as a number that only grows */
	uint32_t head, padding;
};

/* One split virtqueue, device side. The caller fills the first part before eng_ring_start(). */
struct eng_ring {
	struct eng_map *map;
	struct eng_inflight *inflight;
	struct eng_recovered *recovered;	/* `num` entries, used by eng_ring_start() alone */
	uint8_t *scratch;		/* ENG_SCRATCH_SIZE bytes: request copies, packed */
	struct iovec *iov;		/* ENG_IOV_NUM entries: writable parts, packed */
	uint64_t desc_addr, avail_addr, used_addr;	/* user addresses */
	uint32_t num;
	int32_t is_event_idx, is_indirect;		/* what was negotiated */
	int32_t call_fd;		/* -1: none */
	uint32_t call_kind;		/* an eng_signal_kind */

	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	uint64_t counter;		/* of the next popped chain */
	uint32_t generation;		/* of the map that the pointers above belong to */
	uint32_t in_flight;		/* popped, not returned; no index a guest can write */
	uint16_t last_avail, used_idx;
	uint16_t signalled_idx;		/* used_idx at the last eng_ring_signal() */
	uint16_t is_signalled_idx_valid;
	int32_t is_quiet;		/* the guest was told not to kick */

	uint32_t fault, fault_head;	/* an ENG_E* code once the ring is broken */
	uint64_t fault_value;		/* an address, or the number that broke the rule */

	uint32_t slots_num, scratch_used, iov_used;
	uint32_t is_done[ENG_SLOTS_MAX], head[ENG_SLOTS_MAX];
	uint32_t request_start[ENG_SLOTS_MAX], request_end[ENG_SLOTS_MAX];
	uint32_t iov_start[ENG_SLOTS_MAX], iov_num[ENG_SLOTS_MAX];
	uint64_t readable_len[ENG_SLOTS_MAX], writable_len[ENG_SLOTS_MAX];
};

/* map.c. Both return a negated errno. The caller has checked values and overlaps. */
int eng_map_add(struct eng_map *map, int fd, uint64_t gpa, uint64_t size, uint64_t user_addr,
		uint64_t offset);
int eng_map_remove(struct eng_map *map, uint64_t gpa);
void eng_map_deinit(struct eng_map *map);
/* The host address of a guest address, or NULL; `ret` is the number of bytes usable from there. */
uint8_t *eng_map_gpa(struct eng_map *map, uint64_t gpa, uint64_t *ret);
/* The host address of `size` bytes at a user address, all in one region, or NULL. */
uint8_t *eng_map_user(const struct eng_map *map, uint64_t user_addr, uint64_t size);
/* Copies out of guest memory, across regions; 0, or -1 and in `ret` the address not in memory. */
int eng_map_read(struct eng_map *map, uint64_t gpa, void *data, uint64_t size, uint64_t *ret);

/* chain.c */
int eng_ring_break(struct eng_ring *ring, int code, uint32_t head, uint64_t value);
int eng_ring_usable(const struct eng_ring *ring);
int eng_chain_walk(struct eng_ring *ring, uint32_t slot, uint16_t head);
int eng_slot_write(struct eng_ring *ring, uint32_t slot, uint64_t offset, const void *data,
		   uint64_t size);
/* Returns the bytes read, fewer than `size` only at end of file, or a negated errno. */
int64_t eng_slot_read_file(struct eng_ring *ring, uint32_t slot, uint64_t offset, int fd,
			   int64_t file_offset, uint64_t size);

/* ring.c. After eng_ring_start(), `in_flight` entries of `recovered` are filled, by head. */
int eng_ring_start(struct eng_ring *ring, uint16_t base);
int eng_ring_translate(struct eng_ring *ring);
int eng_ring_pop(struct eng_ring *ring, uint32_t limit);
int eng_ring_load(struct eng_ring *ring, uint16_t head);
int eng_ring_complete(struct eng_ring *ring, uint32_t slot, uint32_t length);
/* 1: chains arrived meanwhile, do not sleep. */
int eng_ring_arm(struct eng_ring *ring);
/* Whether eng_ring_pop() has something to take, or an error to report at its next call. */
int eng_ring_has_chains(const struct eng_ring *ring);
/*
 * Signals once if the guest asks for it at any completion since the last call, even if the ring broke
 * after that. The caller holds nothing that others wait for, such as a snapshot of a store.
 */
void eng_ring_signal(struct eng_ring *ring);
/*
 * Never waits, unless the front-end fills `fd` between our look at it and our write, or makes one
 * that was non-blocking block.
 */
void eng_signal(int fd, uint32_t kind);

#endif
