/* Descriptor chains: the walk to a request copy and an iovec array, and the copies back. */
#define _GNU_SOURCE
#include "barrier.h"
#include "engine.h"

#include <errno.h>
#include <limits.h>
#include <string.h>
#include <unistd.h>

_Static_assert(sizeof(struct iovec) * ENG_IOV_NUM == ENG_IOV_SIZE, "size of the iovec arena");

#define CHAIN_BYTES_MAX ((uint64_t)1 << 32)
#define DESC_SIZE ((uint32_t)sizeof(struct vring_desc))

/* --- Whether the ring may be used --- */

int eng_ring_break(struct eng_ring *ring, int code, uint32_t head, uint64_t value)
{
	ring->fault = (uint32_t)code;
	ring->fault_head = head;
	ring->fault_value = value;
	return -code;
}

/* Whether the ring may be touched: not broken, and its pointers belong to what is mapped now. */
int eng_ring_usable(const struct eng_ring *ring)
{
	if (ring->fault)
		return -ENG_EBROKEN;
	if (ring->generation != ring->map->generation)
		return -ENG_ESTALE;
	return 0;
}

/* --- The walk --- */

struct walk {
	struct eng_ring *ring;
	const uint8_t *table;	/* NULL: an indirect table that lies in several regions */
	uint64_t table_addr;	/* of an indirect table */
	uint32_t table_num;
	uint32_t slot;
	uint32_t head;
	int is_indirect;
	int is_writable;	/* a writable descriptor was seen */
	uint64_t total;
};

static int walk_break(const struct walk *walk, int code, uint64_t value)
{
	return eng_ring_break(walk->ring, code, walk->head, value);
}

static int walk_add_writable(struct walk *walk, uint8_t *host, uint64_t size)
{
	struct eng_ring *ring = walk->ring;
	uint32_t *num = &ring->iov_num[walk->slot];
	struct iovec *iov = ring->iov + ring->iov_start[walk->slot];

	ring->writable_len[walk->slot] += size;
	/* Neighbouring pages become one iovec: fewer for preadv(2) to walk. */
	if (*num && (uint8_t *)iov[*num - 1].iov_base + iov[*num - 1].iov_len == host) {
		iov[*num - 1].iov_len += size;
		return 0;
	}
	if (*num == ENG_CHAIN_IOV_MAX)
		return walk_break(walk, ENG_EFRAGMENTS, *num);
	iov[*num] = (struct iovec){ .iov_base = host, .iov_len = size };
	*num += 1;
	return 0;
}

static int walk_add_readable(const struct walk *walk, const uint8_t *host, uint64_t size)
{
	struct eng_ring *ring = walk->ring;
	uint32_t *end = &ring->request_end[walk->slot];
	uint64_t room = ENG_REQUEST_MAX - (*end - ring->request_start[walk->slot]);

	ring->readable_len[walk->slot] += size;
	if (size > room)
		size = room;
	memcpy(ring->scratch + *end, host, size);
	*end += (uint32_t)size;
	return 0;
}

/* VIRTIO 1.3, 2.7.4.2: readable buffers come first. 2.7.5: the total stays within 2^32 bytes. */
static int walk_add(struct walk *walk, const struct vring_desc *desc)
{
	uint64_t gpa = desc->addr;
	uint64_t left = desc->len;

	if (desc->flags & VRING_DESC_F_WRITE)
		walk->is_writable = 1;
	else if (walk->is_writable)
		return walk_break(walk, ENG_EORDER, gpa);
	if (left > UINT64_MAX - gpa)
		return walk_break(walk, ENG_EADDR_OVERFLOW, gpa);
	if (left > CHAIN_BYTES_MAX - walk->total)
		return walk_break(walk, ENG_ETOTAL, gpa);
	walk->total += left;
	while (left) {
		uint64_t step;
		uint8_t *host = eng_map_gpa(walk->ring->map, gpa, &step);
		int status;

		if (!host)
			return walk_break(walk, ENG_EADDR, gpa);
		if (step > left)
			step = left;
		status = walk->is_writable ? walk_add_writable(walk, host, step) :
					     walk_add_readable(walk, host, step);
		if (status)
			return status;
		gpa += step;
		left -= step;
	}
	return 0;
}

static int walk_table(struct walk *walk, uint32_t index);

/* VIRTIO 1.3, 2.7.5.3.1: what an indirect descriptor may be; its WRITE flag means nothing. */
static int walk_indirect(struct walk *walk, const struct vring_desc *desc)
{
	uint64_t usable = 0;

	if (walk->is_indirect)
		return walk_break(walk, ENG_EINDIRECT_NESTED, desc->addr);
	if (!walk->ring->is_indirect)
		return walk_break(walk, ENG_EINDIRECT_FEATURE, desc->addr);
	if (desc->flags & VRING_DESC_F_NEXT)
		return walk_break(walk, ENG_EINDIRECT_NEXT, desc->addr);
	if (!desc->len || desc->len % DESC_SIZE || desc->len / DESC_SIZE > ENG_NUM_MAX)
		return walk_break(walk, ENG_EINDIRECT_LEN, desc->len);
	if (desc->len > UINT64_MAX - desc->addr)
		return walk_break(walk, ENG_EADDR_OVERFLOW, desc->addr);
	walk->is_indirect = 1;
	walk->table_addr = desc->addr;
	walk->table_num = desc->len / DESC_SIZE;
	walk->table = eng_map_gpa(walk->ring->map, desc->addr, &usable);
	if (usable < desc->len)
		walk->table = NULL;
	return walk_table(walk, 0);
}

static int walk_read(const struct walk *walk, uint32_t index, struct vring_desc *ret)
{
	uint64_t at = (uint64_t)index * DESC_SIZE;
	uint64_t hole = 0;

	if (walk->table)
		memcpy(ret, walk->table + at, sizeof(*ret));
	else if (eng_map_read(walk->ring->map, walk->table_addr + at, ret, sizeof(*ret), &hole))
		return walk_break(walk, ENG_EADDR, hole);
	eng_desc_settle(ret);
	return 0;
}

/*
 * VIRTIO 1.3, 2.7.5: a chain is no longer than its table. 2.7.5.3.2: direct descriptors may stand
 * before an indirect one, which ends the chain; so this calls itself once at most.
 */
static int walk_table(struct walk *walk, uint32_t index)
{
	uint32_t hops;

	for (hops = 0; hops < walk->table_num; hops++) {
		struct vring_desc desc;
		int status = walk_read(walk, index, &desc);

		if (status)
			return status;
		if (desc.flags & VRING_DESC_F_INDIRECT)
			return walk_indirect(walk, &desc);
		status = walk_add(walk, &desc);
		if (status || !(desc.flags & VRING_DESC_F_NEXT))
			return status;
		index = desc.next;
		if (index >= walk->table_num)
			return walk_break(walk, ENG_ENEXT, index);
	}
	return walk_break(walk, ENG_ELOOP, hops);
}

/* Walks the chain at `head` into a slot, behind what scratch and arena already hold. */
int eng_chain_walk(struct eng_ring *ring, uint32_t slot, uint16_t head)
{
	struct walk walk = {
		.ring = ring, .slot = slot, .head = head,
		.table = (const uint8_t *)ring->desc, .table_num = ring->num,
	};
	int status;

	ring->is_done[slot] = 0;
	ring->head[slot] = head;
	ring->request_start[slot] = ring->scratch_used;
	ring->request_end[slot] = ring->scratch_used;
	ring->iov_start[slot] = ring->iov_used;
	ring->iov_num[slot] = 0;
	ring->readable_len[slot] = 0;
	ring->writable_len[slot] = 0;
	status = walk_table(&walk, head);
	ring->scratch_used = ring->request_end[slot];
	ring->iov_used += ring->iov_num[slot];
	return status;
}

/* A place in a slot's writable part. */
struct cursor {
	const struct iovec *iov;
	uint32_t left;		/* iovecs, this one included */
	uint64_t skip;		/* bytes of this one already behind us */
};

static void cursor_advance(struct cursor *cursor, uint64_t size)
{
	cursor->skip += size;
	while (cursor->left && cursor->skip >= cursor->iov->iov_len) {
		cursor->skip -= cursor->iov->iov_len;
		cursor->iov++;
		cursor->left--;
	}
}

static int cursor_init(struct cursor *cursor, const struct eng_ring *ring, uint32_t slot,
		       uint64_t offset, uint64_t size)
{
	int status = eng_ring_usable(ring);

	if (status)
		return status;
	if (slot >= ring->slots_num || ring->is_done[slot])
		return -ENG_ESLOT;
	if (offset > ring->writable_len[slot] || size > ring->writable_len[slot] - offset)
		return -ENG_EBOUNDS;
	cursor->iov = ring->iov + ring->iov_start[slot];
	cursor->left = ring->iov_num[slot];
	cursor->skip = 0;
	cursor_advance(cursor, offset);
	return 0;
}

int eng_slot_write(struct eng_ring *ring, uint32_t slot, uint64_t offset, const void *data,
		   uint64_t size)
{
	const uint8_t *from = data;
	struct cursor cursor;
	int status = cursor_init(&cursor, ring, slot, offset, size);

	if (status)
		return status;
	while (size && cursor.left) {
		uint64_t step = cursor.iov->iov_len - cursor.skip;

		if (step > size)
			step = size;
		memcpy((uint8_t *)cursor.iov->iov_base + cursor.skip, from, step);
		cursor_advance(&cursor, step);
		from += step;
		size -= step;
	}
	return 0;
}

/* Fills iov[IOV_MAX] with up to `size` bytes from the cursor on; returns the number of entries. */
static int cursor_slice(const struct cursor *cursor, uint64_t size, struct iovec *iov)
{
	uint64_t skip = cursor->skip;
	uint32_t num = 0;

	while (size && num < IOV_MAX && num < cursor->left) {
		uint64_t step = cursor->iov[num].iov_len - skip;

		if (step > size)
			step = size;
		iov[num].iov_base = (uint8_t *)cursor->iov[num].iov_base + skip;
		iov[num].iov_len = step;
		size -= step;
		skip = 0;
		num++;
	}
	return (int)num;
}

int64_t eng_slot_read_file(struct eng_ring *ring, uint32_t slot, uint64_t offset, int fd,
			   int64_t file_offset, uint64_t size)
{
	struct iovec iov[IOV_MAX];
	struct cursor cursor;
	uint64_t done = 0;

	if (cursor_init(&cursor, ring, slot, offset, size))
		return -EINVAL;
	while (done < size) {
		int num = cursor_slice(&cursor, size - done, iov);
		ssize_t got = preadv(fd, iov, num, file_offset + (int64_t)done);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return -errno;
		if (!got)
			break;
		done += (uint64_t)got;
		cursor_advance(&cursor, (uint64_t)got);
	}
	return (int64_t)done;
}
