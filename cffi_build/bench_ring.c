/* The driver's side of a split virtqueue with FUSE requests, as fast as replies come. */
#include "barrier.h"
#include "bench.h"

#include <errno.h>
#include <linux/fuse.h>
#include <poll.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
	REQUEST_AT = 0,
	REPLY_AT = BENCH_REQUEST_MAX,	/* its header; the body is behind the table */
	EXTRA_DESCS = 3,		/* request header, arguments, reply header */
	NS_PER_MS = 1000000,
	POLL_MS_MAX = 1000000,
};

_Static_assert(BENCH_SLOT_HEAD == 2 * BENCH_REQUEST_MAX, "a request, and the header of its reply");
_Static_assert(sizeof(struct fuse_in_header) == 40, "linux/fuse.h");
_Static_assert(sizeof(((struct bench_figures *)0)->buckets) == BENCH_BUCKETS * sizeof(uint64_t),
	       "bench.h names the number of buckets twice");

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* --- Histogram --- */

/* Latencies below 32 have a bucket each; every power of two from there on has 32. */
uint32_t bench_bucket(uint64_t latency_ns)
{
	uint32_t shift;

	if (latency_ns >> BENCH_SUB_BITS == 0)
		return (uint32_t)latency_ns;
	shift = 63 - (uint32_t)__builtin_clzll(latency_ns) - BENCH_SUB_BITS;
	return (shift << BENCH_SUB_BITS) + (uint32_t)(latency_ns >> shift);
}

uint64_t bench_bucket_start(uint32_t bucket)
{
	uint32_t power = bucket >> BENCH_SUB_BITS;
	uint64_t sub = bucket & ((1U << BENCH_SUB_BITS) - 1);

	if (!power)
		return sub;
	return (sub + (1U << BENCH_SUB_BITS)) << (power - 1);
}

/* --- Slots: request, header of the reply, descriptor table, body of the reply --- */

static size_t table_size(uint32_t room)
{
	size_t descs = EXTRA_DESCS + (room + BENCH_PAGE - 1) / BENCH_PAGE;

	return (descs * sizeof(struct vring_desc) + BENCH_PAGE - 1) / BENCH_PAGE * BENCH_PAGE;
}

size_t bench_slot_size(uint32_t room_max)
{
	size_t body = ((size_t)room_max + BENCH_PAGE - 1) / BENCH_PAGE * BENCH_PAGE;

	return BENCH_SLOT_HEAD + table_size(room_max) + body;
}

static uint8_t *slot_memory(const struct bench_ring *ring, uint32_t slot)
{
	return ring->memory + (size_t)slot * ring->slot_size;
}

static size_t body_at(const struct bench_ring *ring, uint32_t slot)
{
	return BENCH_SLOT_HEAD + table_size(ring->slots[slot].room);
}

const uint8_t *bench_reply(const struct bench_ring *ring, uint32_t slot)
{
	return slot_memory(ring, slot) + REPLY_AT;
}

const uint8_t *bench_reply_body(const struct bench_ring *ring, uint32_t slot)
{
	return slot_memory(ring, slot) + body_at(ring, slot);
}

static void add_desc(struct vring_desc *table, uint32_t *num, uint64_t addr, size_t len,
		     uint16_t flags)
{
	if (*num)
		table[*num - 1].flags |= VRING_DESC_F_NEXT;
	table[*num] = (struct vring_desc){
		.addr = addr, .len = (uint32_t)len, .flags = flags, .next = (uint16_t)(*num + 1),
	};
	++*num;
}

/*
 * Writes the indirect table of a slot as Linux lays out a request: header and arguments apart, then
 * the header of the reply, and each page of its body (linux fs/fuse/virtio_fs.c: virtio_fs_enqueue_req).
 */
static void slot_describe(const struct bench_ring *ring, uint32_t at, uint32_t size, uint32_t room)
{
	struct bench_slot *slot = &ring->slots[at];
	uint64_t gpa = ring->memory_gpa + (uint64_t)at * ring->slot_size;
	void *start = slot_memory(ring, at) + BENCH_SLOT_HEAD;
	struct vring_desc *table = start;
	const size_t header = sizeof(struct fuse_in_header);
	uint32_t num = 0;
	uint32_t done;
	void *descs = ring->desc;

	slot->size = size;
	slot->room = room;
	add_desc(table, &num, gpa + REQUEST_AT, header, 0);
	if (size > header)
		add_desc(table, &num, gpa + REQUEST_AT + header, size - header, 0);
	add_desc(table, &num, gpa + REPLY_AT, sizeof(struct fuse_out_header), VRING_DESC_F_WRITE);
	for (done = 0; done < room; done += BENCH_PAGE)
		add_desc(table, &num, gpa + body_at(ring, at) + done,
			 room - done < BENCH_PAGE ? room - done : BENCH_PAGE, VRING_DESC_F_WRITE);
	((struct vring_desc *)descs)[at] = (struct vring_desc){
		.addr = gpa + BENCH_SLOT_HEAD,
		.len = (uint32_t)(num * sizeof(*table)),
		.flags = VRING_DESC_F_INDIRECT,
	};
}

/* --- Ring --- */

static struct vring_avail *avail_of(const struct bench_ring *ring)
{
	void *area = ring->avail;

	return area;
}

static struct vring_used *used_of(const struct bench_ring *ring)
{
	void *area = ring->used;

	return area;
}

static int fail(struct bench_ring *ring, int code, int64_t value, uint64_t wanted)
{
	ring->fault_value = value;
	ring->fault_wanted = wanted;
	return -code;
}

/* VIRTIO 1.3, 2.7.13.4 and 2.7.10: whether the device asked for a kick at the one new entry. */
static int wants_kick(const struct bench_ring *ring)
{
	const struct vring_used *used = used_of(ring);

	if (!ring->is_event_idx)
		return !(eng_load_relaxed(&used->flags) & VRING_USED_F_NO_NOTIFY);
	/* avail_event lies behind the used ring; it must be the index before the new entry. */
	return eng_load_relaxed((const uint16_t *)(const void *)&used->ring[ring->num]) ==
	       (uint16_t)(ring->avail_idx - 1);
}

static int kick(struct bench_ring *ring)
{
	static const uint64_t one = 1;

	ring->figures->kicks++;
	/* A full counter is a kick that was not read yet. */
	while (write(ring->kick_fd, &one, sizeof(one)) < 0 && errno != EAGAIN) {
		if (errno != EINTR)
			return fail(ring, BENCH_EKICK, errno, 0);
	}
	return 0;
}

static int send_request(struct bench_ring *ring, uint32_t at, uint32_t index, uint64_t sent_ns)
{
	const struct bench_request *request = &ring->requests[index];
	struct bench_slot *slot = &ring->slots[at];
	struct vring_avail *avail = avail_of(ring);
	uint8_t *memory = slot_memory(ring, at) + REQUEST_AT;

	if (slot->size != request->size || slot->room != request->room)
		slot_describe(ring, at, request->size, request->room);
	memcpy(memory, ring->bytes + request->at, request->size);
	slot->unique = ring->unique += 2;	/* as Linux counts; odd ones are interrupts */
	memcpy(memory + offsetof(struct fuse_in_header, unique), &slot->unique, sizeof(slot->unique));
	slot->request = index;
	slot->sent_ns = sent_ns;
	avail->ring[ring->avail_idx & (ring->num - 1)] = (uint16_t)at;
	ring->in_flight++;
	eng_store_release(&avail->idx, ++ring->avail_idx);
	eng_fence();
	return wants_kick(ring) ? kick(ring) : 0;
}

static int check_kind(struct bench_ring *ring, const struct bench_request *request, uint32_t at,
		      uint32_t size)
{
	uint64_t nodeid = 0;

	if (size < request->body_min || size > request->body_max)
		return fail(ring, BENCH_EBODY, size, request->body_min);
	if (request->kind != BENCH_FOUND && request->kind != BENCH_ABSENT)
		return 0;
	memcpy(&nodeid, bench_reply_body(ring, at), sizeof(nodeid));
	if ((nodeid != 0) != (request->kind == BENCH_FOUND))
		return fail(ring, BENCH_ENODE, (int64_t)nodeid, 0);
	return 0;
}

static int check_reply(struct bench_ring *ring, uint32_t at, uint32_t used_len)
{
	const struct bench_slot *slot = &ring->slots[at];
	const struct bench_request *request = &ring->requests[slot->request];
	struct fuse_out_header header;
	int is_allowed;

	memcpy(&header, bench_reply(ring, at), sizeof(header));
	ring->fault_request = slot->request;
	if (header.unique != slot->unique)
		return fail(ring, BENCH_EUNIQUE, (int64_t)header.unique, slot->unique);
	if (header.len < sizeof(header) || header.len - sizeof(header) > request->room)
		return fail(ring, BENCH_ELEN, header.len, sizeof(header) + request->room);
	if (header.len != used_len)
		ring->figures->odd_lengths++;
	ring->figures->body_bytes += header.len - sizeof(header);
	if (!header.error)
		return check_kind(ring, request, at, (uint32_t)(header.len - sizeof(header)));
	is_allowed = request->kind == BENCH_ANY ||
		     (request->kind == BENCH_ABSENT && header.error == -ENOENT);
	if (!is_allowed || header.error > 0)
		return fail(ring, BENCH_EERROR, header.error, 0);
	if (header.len != sizeof(header))
		return fail(ring, BENCH_EBODY, (int64_t)(header.len - sizeof(header)), 0);
	return 0;
}

static void record(struct bench_figures *figures, uint64_t latency_ns)
{
	figures->completed++;
	figures->buckets[bench_bucket(latency_ns)]++;
	if (latency_ns > figures->max_ns)
		figures->max_ns = latency_ns;
}

/* Takes the next entry of the used ring, and returns the slot that it names or a negated error. */
static int take_used(struct bench_ring *ring, uint64_t now)
{
	const struct vring_used *used = used_of(ring);
	const struct vring_used_elem element = used->ring[ring->used_idx & (ring->num - 1)];
	int status;

	if (element.id >= ring->slots_num || !ring->slots[element.id].unique)
		return fail(ring, BENCH_EUSED, element.id, 0);
	ring->used_idx++;
	ring->in_flight--;
	status = check_reply(ring, element.id, element.len);
	if (status)
		return status;
	record(ring->figures, now - ring->slots[element.id].sent_ns);
	ring->slots[element.id].unique = 0;
	return (int)element.id;
}

/* Asks to be woken by the next reply, or to be left alone until then. */
static void ask_for_call(struct bench_ring *ring, int is_wanted)
{
	struct vring_avail *avail = avail_of(ring);

	/* With EVENT_IDX the flags stay 0; silence is a used_event left behind. */
	if (!ring->is_event_idx)
		eng_store_release(&avail->flags, is_wanted ? 0 : VRING_AVAIL_F_NO_INTERRUPT);
	else if (is_wanted)
		eng_store_release(&avail->ring[ring->num], ring->used_idx);
	eng_fence();
}

static int poll_call(struct bench_ring *ring, uint64_t deadline_ns)
{
	struct pollfd fds[2] = {
		{ .fd = ring->call_fd, .events = POLLIN },
		{ .fd = ring->back_end_fd, .events = POLLIN },
	};
	uint64_t now = now_ns();
	uint64_t left_ms = now < deadline_ns ? (deadline_ns - now) / NS_PER_MS + 1 : 0;
	uint64_t counter;
	int count;

	ring->figures->waits++;
	count = poll(fds, 2, left_ms < POLL_MS_MAX ? (int)left_ms : POLL_MS_MAX);
	if (count < 0)
		return -BENCH_EINTR;
	if (!count)
		return -BENCH_ESTALL;
	if (!fds[0].revents)
		return -BENCH_EGONE;
	/* Cleared, or it would wake us again. What comes from now on sets it anew. */
	return read(ring->call_fd, &counter, sizeof(counter)) < 0 && errno == EINTR ? -BENCH_EINTR : 0;
}

static uint16_t used_idx_of(const struct bench_ring *ring)
{
	return eng_load_acquire(&used_of(ring)->idx);
}

static int wait_for_used(struct bench_ring *ring, uint64_t deadline_ns)
{
	int status = 0;

	ask_for_call(ring, 1);
	while (!status && used_idx_of(ring) == ring->used_idx)
		status = poll_call(ring, deadline_ns);
	ask_for_call(ring, 0);
	if ((uint16_t)(used_idx_of(ring) - ring->used_idx) > ring->in_flight)
		return fail(ring, BENCH_EJUMP, used_idx_of(ring), 0);
	return status;
}

/* The requests of one run that are still to be sent. */
struct plan {
	uint64_t left;
	uint64_t stop_ns;
	uint32_t next;
};

static int send_next(struct bench_ring *ring, struct plan *plan, uint32_t slot, uint64_t now)
{
	uint32_t index = plan->next;

	if (!plan->left || now >= plan->stop_ns)
		return 0;
	plan->left--;
	plan->next = index + 1 < ring->requests_num ? index + 1 : 0;
	return send_request(ring, slot, index, now);
}

int bench_ring_run(struct bench_ring *ring)
{
	uint64_t start_ns = now_ns();
	uint64_t now = start_ns;
	struct plan plan = {
		.left = ring->count ? ring->count : UINT64_MAX,
		.stop_ns = start_ns + ring->duration_ns,
		.next = ring->first % ring->requests_num,
	};
	int status = 0;
	uint32_t slot;

	ask_for_call(ring, 0);
	for (slot = 0; slot < ring->depth && !status; slot++)
		status = send_next(ring, &plan, slot, now_ns());
	while (!status && ring->in_flight) {
		status = wait_for_used(ring, now + ring->stall_ns);
		while (!status && used_idx_of(ring) != ring->used_idx) {
			int taken;

			now = now_ns();
			taken = take_used(ring, now);
			status = taken < 0 ? taken : send_next(ring, &plan, (uint32_t)taken, now);
		}
	}
	ring->figures->elapsed_ns += now - start_ns;
	return status;
}
