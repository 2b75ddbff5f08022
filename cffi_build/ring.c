/* The device side of one split virtqueue, and the record of what was popped and not returned. */
#include "barrier.h"
#include "engine.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

_Static_assert(sizeof(struct eng_inflight_desc) == 16, "vhost-user: inflight entry");
_Static_assert(offsetof(struct eng_inflight_desc, next) == 6, "vhost-user: inflight entry");
_Static_assert(offsetof(struct eng_inflight, last_batch_head) == 12, "vhost-user: inflight header");
_Static_assert(offsetof(struct eng_inflight, desc) == 16, "vhost-user: inflight header");

enum { INFLIGHT_VERSION = 1 };

static int ring_area(struct eng_ring *ring, int code, uint64_t user_addr, uint64_t size,
		     uint64_t alignment, void **ret)
{
	uint8_t *host = eng_map_user(ring->map, user_addr, size);

	/* Aligned for the guest and, as regions may begin anywhere, for us too. */
	if (!host || user_addr % alignment || (uintptr_t)host % alignment)
		return eng_ring_break(ring, code, 0, user_addr);
	*ret = host;
	return 0;
}

/* VIRTIO 1.3, 2.7: sizes and alignments of the three areas, event fields included. */
int eng_ring_translate(struct eng_ring *ring)
{
	uint64_t num = ring->num;
	void *desc = NULL;
	void *avail = NULL;
	void *used = NULL;
	int status = ring_area(ring, ENG_EDESC_AREA, ring->desc_addr, 16 * num, 16, &desc);

	if (!status)
		status = ring_area(ring, ENG_EAVAIL_AREA, ring->avail_addr, 6 + 2 * num, 2, &avail);
	if (!status)
		status = ring_area(ring, ENG_EUSED_AREA, ring->used_addr, 6 + 8 * num, 4, &used);
	if (status)
		return status;
	ring->slots_num = 0;
	ring->generation = ring->map->generation;
	ring->desc = desc;
	ring->avail = avail;
	ring->used = used;
	return 0;
}

static void ring_start_fresh(struct eng_ring *ring, uint16_t base)
{
	struct eng_inflight *area = ring->inflight;

	ring->last_avail = base;
	memset(area, 0, sizeof(*area) + ring->num * sizeof(area->desc[0]));
	area->desc_num = (uint16_t)ring->num;
	area->used_idx = ring->used_idx;
	eng_store_release(&area->version, INFLIGHT_VERSION);
}

/*
 * The last batch was published, perhaps not cleared: clear it. Guest or front-end may lie, and the
 * front-end may write to the record meanwhile: each word of it is read once.
 */
static int ring_clear_published(struct eng_ring *ring)
{
	struct eng_inflight *area = ring->inflight;
	uint16_t left = (uint16_t)(ring->used_idx - eng_load_relaxed(&area->used_idx));
	uint16_t head = eng_load_relaxed(&area->last_batch_head);

	if (left > ring->num)
		return eng_ring_break(ring, ENG_EUSED_IDX, head, ring->used_idx);
	for (; left; left--) {
		if (head >= ring->num)
			return eng_ring_break(ring, ENG_EINFLIGHT, head, ring->used_idx);
		eng_store_flag_release(&area->desc[head].inflight, 0);
		head = eng_load_relaxed(&area->desc[head].next);
	}
	eng_store_release(&area->used_idx, ring->used_idx);
	return 0;
}

/* vhost-user: inflight I/O tracking, recovery of a split virtqueue. */
static int ring_start_recovered(struct eng_ring *ring)
{
	const struct eng_inflight *area = ring->inflight;
	uint32_t head;
	int status = ring_clear_published(ring);

	if (status)
		return status;
	for (head = 0; head < ring->num; head++) {
		uint64_t counter = eng_load_counter_relaxed(&area->desc[head].counter);

		if (counter >= ring->counter)
			ring->counter = counter + 1;
		if (eng_load_flag_relaxed(&area->desc[head].inflight) == 1)
			ring->recovered[ring->in_flight++] =
				(struct eng_recovered){ .counter = counter, .head = head };
	}
	ring->last_avail = (uint16_t)(ring->used_idx + ring->in_flight);
	/* The process before us may have died between publishing and signalling. */
	eng_signal(ring->call_fd, ring->call_kind);
	return 0;
}

int eng_ring_start(struct eng_ring *ring, uint16_t base)
{
	const struct eng_inflight *area = ring->inflight;
	int status;

	if (!ring->num || ring->num > ENG_NUM_MAX || ring->num & (ring->num - 1))
		return eng_ring_break(ring, ENG_ENUM, 0, ring->num);
	status = eng_ring_translate(ring);
	if (status)
		return status;
	ring->used_idx = ring->signalled_idx = eng_load_acquire(&ring->used->idx);
	if (eng_load_relaxed(&area->version) == INFLIGHT_VERSION &&
	    eng_load_relaxed(&area->desc_num) == ring->num)
		return ring_start_recovered(ring);
	ring_start_fresh(ring, base);
	return 0;
}

static void ring_reset_slots(struct eng_ring *ring)
{
	ring->slots_num = ring->scratch_used = ring->iov_used = 0;
}

/* Whether the longest possible chain still fits: so a popped chain never has to be put back. */
static int ring_has_room(const struct eng_ring *ring)
{
	return ring->slots_num < ENG_SLOTS_MAX &&
	       ring->scratch_used <= ENG_SCRATCH_SIZE - ENG_REQUEST_MAX &&
	       ring->iov_used <= ENG_IOV_NUM - ENG_CHAIN_IOV_MAX;
}

/* Counter first: whoever finds the flag after a crash finds the order, too. */
static void ring_mark(struct eng_ring *ring, uint16_t head)
{
	struct eng_inflight_desc *entry = &ring->inflight->desc[head];

	entry->counter = ring->counter++;
	eng_store_flag_release(&entry->inflight, 1);
}

/* VIRTIO 1.3, 2.7.10: with EVENT_IDX the flags stay 0, silence is an avail_event left behind. */
static void ring_set_quiet(struct eng_ring *ring, int is_quiet)
{
	if (!ring->is_event_idx)
		eng_store_release(&ring->used->flags, is_quiet ? VRING_USED_F_NO_NOTIFY : 0);
	ring->is_quiet = is_quiet;
}

/* Take the next chain into the next slot. */
static int ring_take(struct eng_ring *ring)
{
	uint32_t at = ring->last_avail & (ring->num - 1);
	uint16_t head = eng_load_relaxed(&ring->avail->ring[at]);
	int status;

	if (head >= ring->num)
		return eng_ring_break(ring, ENG_EHEAD, head, at);
	ring_mark(ring, head);
	ring->last_avail++;
	ring->in_flight++;
	status = eng_chain_walk(ring, ring->slots_num, head);
	if (!status) {
		ring->slots_num++;
	} else if (ring->slots_num) {
		/* Left for the next pop, as the chains before it can still be returned. */
		ring->in_flight--;
		ring->last_avail--;
		eng_store_flag_release(&ring->inflight->desc[head].inflight, 0);
	}
	return status;
}

int eng_ring_pop(struct eng_ring *ring, uint32_t limit)
{
	int status = eng_ring_usable(ring);
	uint16_t avail_idx;
	uint16_t pending;

	if (status)
		return status;
	ring_reset_slots(ring);
	avail_idx = eng_load_acquire(&ring->avail->idx);
	pending = (uint16_t)(avail_idx - ring->last_avail);
	if (pending > ring->num)
		return eng_ring_break(ring, ENG_EAVAIL_JUMP, 0, avail_idx);
	if (pending && !ring->is_quiet)
		ring_set_quiet(ring, 1);
	while (pending-- && !status && ring->slots_num < limit && ring_has_room(ring))
		status = ring_take(ring);
	if (status && !ring->slots_num)
		return status;
	ring->fault = 0;
	return (int)ring->slots_num;
}

int eng_ring_load(struct eng_ring *ring, uint16_t head)
{
	int status = eng_ring_usable(ring);

	if (status)
		return status;
	if (head >= ring->num)
		return -ENG_ESLOT;
	ring_reset_slots(ring);
	status = eng_chain_walk(ring, 0, head);
	if (status)
		return status;
	ring->slots_num = 1;
	return 0;
}

/*
 * The descriptor belongs to the front-end and may be of any kind. Its flags are the front-end's too:
 * setting O_NONBLOCK here would change them for both. A descriptor that is not non-blocking is
 * therefore polled first, and a front-end that fills it between poll(2) and write(2) stops this
 * process; so the caller must hold nothing that others wait for. Where there is no room, a signal
 * waits to be read already, and none is lost.
 */
void eng_signal(int fd, uint32_t kind)
{
	static const uint64_t one = 1;
	struct pollfd room = { .fd = fd, .events = POLLOUT };
	ssize_t sent;

	if (fd < 0)
		return;
	do {
		if (kind == ENG_SIGNAL_SOCKET)
			sent = send(fd, &one, sizeof(one), MSG_DONTWAIT | MSG_NOSIGNAL);
		else if (kind == ENG_SIGNAL_NONBLOCKING ||
			 (poll(&room, 1, 0) == 1 && room.revents & POLLOUT))
			sent = write(fd, &one, sizeof(one));
		else
			return;
	} while (sent < 0 && errno == EINTR);
}

/* VIRTIO 1.3, 2.7.7.2: whether the driver wants to hear of what is new since last time. */
static int ring_wants_signal(struct eng_ring *ring)
{
	uint16_t old = ring->signalled_idx;
	int is_valid = ring->is_signalled_idx_valid;
	uint16_t event;

	ring->signalled_idx = ring->used_idx;
	ring->is_signalled_idx_valid = 1;
	/* Where the ring cannot be read any more, a signal too many does no harm. */
	if (!is_valid || ring->generation != ring->map->generation)
		return 1;
	if (!ring->is_event_idx)
		return !(eng_load_relaxed(&ring->avail->flags) & VRING_AVAIL_F_NO_INTERRUPT);
	event = eng_load_relaxed(&ring->avail->ring[ring->num]);
	return (uint16_t)(ring->used_idx - event - 1) < (uint16_t)(ring->used_idx - old);
}

void eng_ring_signal(struct eng_ring *ring)
{
	if (ring->used_idx == ring->signalled_idx)
		return;
	eng_fence();
	if (ring_wants_signal(ring))
		eng_signal(ring->call_fd, ring->call_kind);
}

static void return_chain(struct eng_ring *ring, uint16_t head, uint32_t length)
{
	struct eng_inflight *area = ring->inflight;
	struct vring_used_elem *element;

	ring->in_flight--;
	area->desc[head].next = eng_load_relaxed(&area->last_batch_head);
	eng_store_release(&area->last_batch_head, head);
	element = &ring->used->ring[ring->used_idx & (ring->num - 1)];
	element->id = head;
	element->len = length;
	ring->used_idx++;
	eng_store_release(&ring->used->idx, ring->used_idx);
	eng_store_flag_release(&area->desc[head].inflight, 0);
	eng_store_release(&area->used_idx, ring->used_idx);
}

int eng_ring_complete(struct eng_ring *ring, uint32_t slot, uint32_t length)
{
	int status = eng_ring_usable(ring);

	if (status)
		return status;
	if (slot >= ring->slots_num || ring->is_done[slot])
		return -ENG_ESLOT;
	if (length > ring->writable_len[slot])
		return -ENG_EBOUNDS;
	if (!ring->in_flight)
		return -ENG_EIDLE;
	/* From here on the buffers are the guest's again: no write may follow. */
	ring->is_done[slot] = 1;
	return_chain(ring, (uint16_t)ring->head[slot], length);
	return 0;
}

int eng_ring_has_chains(const struct eng_ring *ring)
{
	return !eng_ring_usable(ring) &&
	       eng_load_acquire(&ring->avail->idx) != ring->last_avail;
}

int eng_ring_arm(struct eng_ring *ring)
{
	int status = eng_ring_usable(ring);
	uint16_t *avail_event;

	if (status)
		return status;
	avail_event = (uint16_t *)&ring->used->ring[ring->num];
	if (ring->is_event_idx)
		eng_store_release(avail_event, ring->last_avail);
	ring_set_quiet(ring, 0);
	eng_fence();
	if (eng_load_acquire(&ring->avail->idx) == ring->last_avail)
		return 0;
	ring_set_quiet(ring, 1);
	return 1;
}
