/*
 * A well-behaved guest whose worker is replaced and whose memory is plugged and unplugged at any call: no
 * chain is lost, none comes back twice, and each has the bytes that were written for it.
 *
 * Input: a byte of modes, where the indices begin, then a byte for each step and what it takes. A chain
 * has descriptors, a table and buffers of its own, so that all that belongs to it is known by its number.
 */
#include "fuzz_world.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

const size_t fuzz_input_size = 256;

enum {
	CHAINS = 5,
	DESCS = 3,			/* of each chain, in the ring's table */
	PIECES = 8,
	READABLE = 0x200,		/* room of each chain for what it sends */
	WRITABLE = 0x400,		/* and for what it gets */
	REPLIES = 0x40000,
};

enum chain_state { FREE, OFFERED, POPPED };

struct chain {
	enum chain_state state;
	uint32_t readable_len, writable_len;
	uint8_t pattern;
};

struct driver {
	struct world world;
	struct input input;
	struct chain chain[CHAINS];
	uint32_t offered[CHAINS], offered_num;		/* in their order */
	uint32_t popped[CHAINS], popped_num;
	int slot[ENG_SLOTS_MAX];			/* the chain in it, or -1 */
	uint32_t slots_num;
	uint16_t avail_idx, used_idx, signalled_idx, used_event;
	int is_event_idx, is_signalled_valid, is_no_interrupt;
};

static unsigned long returned, restarts, translations, signals;

/* --- The guest --- */

static uint64_t request_at(uint32_t number)
{
	return WORLD_BUFFERS + READABLE * (uint64_t)number;
}

/* The last one crosses from one region into the next. */
static uint64_t reply_at(uint32_t number)
{
	return number == CHAINS - 1 ? WORLD_EDGE - 0x100 : REPLIES + WRITABLE * (uint64_t)number;
}

/* Cuts a buffer into `num` descriptors. */
static struct vring_desc *cut(struct driver *it, struct vring_desc *to, uint32_t num, uint64_t gpa,
			      uint32_t size, uint16_t flags)
{
	while (num--) {
		uint32_t step = num ? (uint32_t)input_take(&it->input, 1) % (size + 1) : size;

		*to++ = (struct vring_desc){ .addr = gpa, .len = step, .flags = flags };
		gpa += step;
		size -= step;
	}
	return to;
}

static void link_descs(struct vring_desc *descs, uint32_t num, uint32_t first)
{
	for (uint32_t i = 0; i + 1 < num; i++) {
		descs[i].flags |= VRING_DESC_F_NEXT;
		descs[i].next = (uint16_t)(first + i + 1);
	}
}

static uint32_t pieces_of(uint32_t size, uint64_t choice, uint32_t most)
{
	return size ? 1 + (uint32_t)choice % most : 0;
}

static void write_chain(struct driver *it, uint32_t number)
{
	struct chain *chain = &it->chain[number];
	uint64_t choice = input_take(&it->input, 1);
	uint32_t most = choice & 1 ? PIECES / 2 : 1;
	struct vring_desc descs[PIECES], *end = descs;
	uint32_t num;

	end = cut(it, end, pieces_of(chain->readable_len, choice >> 1, most), request_at(number),
		  chain->readable_len, 0);
	end = cut(it, end, pieces_of(chain->writable_len, choice >> 4, most), reply_at(number),
		  chain->writable_len, VRING_DESC_F_WRITE);
	num = (uint32_t)(end - descs);
	if (choice & 1) {
		uint64_t table = WORLD_TABLES + 16 * PIECES * (uint64_t)number;
		struct vring_desc indirect = { .addr = table, .len = 16 * num,
					       .flags = VRING_DESC_F_INDIRECT };

		link_descs(descs, num, 0);
		world_write(&it->world, table, descs, 16 * (uint64_t)num);
		descs[0] = indirect;
		num = 1;
	} else {
		link_descs(descs, num, DESCS * number);
	}
	world_write(&it->world, WORLD_DESC + 16 * DESCS * (uint64_t)number, descs, 16 * (uint64_t)num);
}

static void offer(struct driver *it)
{
	uint32_t number = (uint32_t)input_take(&it->input, 1) % CHAINS;
	struct chain *chain = &it->chain[number];
	uint8_t request[READABLE];
	uint16_t head = (uint16_t)(DESCS * number);

	if (chain->state != FREE)
		return;
	chain->state = OFFERED;
	chain->pattern = (uint8_t)input_take(&it->input, 1);
	chain->readable_len = (uint32_t)input_take(&it->input, 2) % READABLE;
	chain->writable_len = (uint32_t)input_take(&it->input, 2) % WRITABLE;
	if (!chain->readable_len && !chain->writable_len)
		chain->readable_len = 1;
	memset(request, chain->pattern, sizeof(request));
	world_write(&it->world, request_at(number), request, chain->readable_len);
	write_chain(it, number);
	it->offered[it->offered_num++] = number;
	world_write(&it->world, WORLD_AVAIL + 4 + 2u * (it->avail_idx % WORLD_NUM), &head, 2);
	it->avail_idx++;
	world_write(&it->world, WORLD_AVAIL + 2, &it->avail_idx, 2);
}

static void forget_popped(struct driver *it, uint32_t number)
{
	for (uint32_t i = 0; i < it->popped_num; i++)
		if (it->popped[i] == number) {
			memmove(&it->popped[i], &it->popped[i + 1],
				(--it->popped_num - i) * sizeof(it->popped[0]));
			return;
		}
	MUST(!"it was popped");
}

/* Exactly the chain that was completed just now is back, with its bytes. */
static void reap(struct driver *it, uint32_t number, uint32_t length)
{
	struct chain *chain = &it->chain[number];
	struct vring_used_elem element;
	uint8_t reply[WRITABLE];

	MUST(world_read(&it->world, WORLD_USED + 4 + 8u * (it->used_idx % WORLD_NUM), &element, 8));
	MUST(world_word(&it->world, WORLD_USED + 2) == (uint16_t)(it->used_idx + 1));
	MUST(element.id == DESCS * number && element.len == length);
	MUST(world_read(&it->world, reply_at(number), reply, length));
	for (uint32_t i = 0; i < length; i++)
		MUST(reply[i] == (uint8_t)(chain->pattern + i));
	MUST(chain->state == POPPED);
	chain->state = FREE;
	forget_popped(it, number);
	it->used_idx++;
	returned++;
}

static void allow_popped(struct driver *it)
{
	world_check(&it->world);
	world_allow_nothing(&it->world);
	world_allow(&it->world, WORLD_USED, WORLD_USED_SIZE);
	for (uint32_t i = 0; i < it->popped_num; i++)
		world_allow(&it->world, reply_at(it->popped[i]),
			    it->chain[it->popped[i]].writable_len);
}

/* --- The device --- */

static void check_request(const struct driver *it, uint32_t slot, uint32_t number)
{
	const struct eng_ring *ring = &it->world.ring;
	const struct chain *chain = &it->chain[number];

	world_check_slot(&it->world, slot);
	MUST(ring->head[slot] == DESCS * number);
	MUST(ring->readable_len[slot] == chain->readable_len);
	MUST(ring->writable_len[slot] == chain->writable_len);
	for (uint32_t at = ring->request_start[slot]; at < ring->request_end[slot]; at++)
		MUST(ring->scratch[at] == chain->pattern);
}

static void pop(struct driver *it)
{
	uint32_t limit = 1 + (uint32_t)input_take(&it->input, 1) % (CHAINS + 1);
	uint32_t num = it->offered_num < limit ? it->offered_num : limit;

	MUST(eng_ring_has_chains(&it->world.ring) == (it->offered_num != 0));
	MUST(eng_ring_pop(&it->world.ring, limit) == (int)num);
	it->slots_num = num;
	for (uint32_t slot = 0; slot < num; slot++) {
		uint32_t number = it->offered[slot];

		it->chain[number].state = POPPED;
		it->popped[it->popped_num++] = number;
		it->slot[slot] = (int)number;
		check_request(it, slot, number);
	}
	it->offered_num -= num;
	memmove(it->offered, it->offered + num, it->offered_num * sizeof(it->offered[0]));
	MUST(it->world.ring.in_flight == it->popped_num);
	if (num && !it->is_event_idx)
		MUST(world_word(&it->world, WORLD_USED) == VRING_USED_F_NO_NOTIFY);
}

static void answer(struct driver *it, uint32_t slot, uint32_t number)
{
	struct eng_ring *ring = &it->world.ring;
	uint32_t length = (uint32_t)input_take(&it->input, 2) % (it->chain[number].writable_len + 1);
	uint32_t half = length / 2;
	uint8_t reply[WRITABLE];

	for (uint32_t i = 0; i < length; i++)
		reply[i] = (uint8_t)(it->chain[number].pattern + i);
	/* As replies are written: the header goes last. */
	MUST(!eng_slot_write(ring, slot, half, reply + half, length - half));
	MUST(!eng_slot_write(ring, slot, 0, reply, half));
	MUST(!eng_ring_complete(ring, slot, length));
	MUST(eng_ring_complete(ring, slot, length) == -ENG_ESLOT);
	MUST(eng_slot_write(ring, slot, 0, reply, 0) == -ENG_ESLOT);
	reap(it, number, length);
	allow_popped(it);
}

static void answer_slot(struct driver *it)
{
	uint32_t slot = (uint32_t)input_take(&it->input, 1) % ENG_SLOTS_MAX;

	if (it->slots_num)
		slot %= it->slots_num;
	if (slot >= it->slots_num || it->slot[slot] < 0)
		return;
	answer(it, slot, (uint32_t)it->slot[slot]);
	it->slot[slot] = -1;
}

/* A chain that waits, or that another process has left, is walked again. */
static void answer_popped(struct driver *it)
{
	uint64_t choice = input_take(&it->input, 1);
	uint32_t number;

	if (!it->popped_num)
		return;
	number = it->popped[choice % it->popped_num];
	MUST(!eng_ring_load(&it->world.ring, (uint16_t)(DESCS * number)));
	it->slots_num = 1;
	it->slot[0] = (int)number;
	check_request(it, 0, number);
	if (choice & 0x80)
		return;
	answer(it, 0, number);
	it->slot[0] = -1;
}

/* --- Notification --- */

static uint64_t calls(struct driver *it)
{
	uint64_t count = 0;

	return read(it->world.call[0], &count, sizeof(count)) == sizeof(count) ? count : 0;
}

static int is_call_due(const struct driver *it)
{
	if (it->used_idx == it->signalled_idx)
		return 0;
	if (!it->is_signalled_valid || it->world.ring.generation != it->world.map.generation)
		return 1;
	if (!it->is_event_idx)
		return !it->is_no_interrupt;
	for (uint16_t index = it->signalled_idx; index != it->used_idx; index++)
		if (index == it->used_event)
			return 1;
	return 0;
}

static void notify(struct driver *it)
{
	int is_due = is_call_due(it);

	eng_ring_signal(&it->world.ring);
	MUST(calls(it) == (uint64_t)is_due);
	if (it->used_idx != it->signalled_idx)
		it->is_signalled_valid = 1;
	it->signalled_idx = it->used_idx;
	signals += (unsigned long)is_due;
}

static void set_interrupts(struct driver *it)
{
	uint64_t choice = input_take(&it->input, 1);
	uint16_t flags = (uint16_t)(choice & 1);

	it->is_no_interrupt = flags;
	it->used_event = (uint16_t)(it->used_idx + (choice >> 1 & 7) - 2);
	world_write(&it->world, WORLD_AVAIL, &flags, 2);
	world_write(&it->world, WORLD_AVAIL + 4 + 2 * WORLD_NUM, &it->used_event, 2);
}

static void arm(struct driver *it)
{
	uint16_t taken = (uint16_t)(it->avail_idx - it->offered_num);

	MUST(eng_ring_arm(&it->world.ring) == (it->offered_num != 0));
	if (it->is_event_idx)
		MUST(world_word(&it->world, WORLD_USED + 4 + 8 * WORLD_NUM) == taken);
	else
		MUST(world_word(&it->world, WORLD_USED) ==
		     (it->offered_num ? VRING_USED_F_NO_NOTIFY : 0));
}

/* --- Another process, and other memory --- */

static void start(struct driver *it, uint16_t base)
{
	struct eng_ring *ring = &it->world.ring;

	world_new_ring(&it->world);
	ring->is_event_idx = it->is_event_idx;
	ring->is_indirect = 1;
	ring->call_fd = it->world.call[0];
	ring->call_kind = ENG_SIGNAL_NONBLOCKING;
	MUST(!eng_ring_start(ring, base));
	it->slots_num = 0;
	it->is_signalled_valid = 0;
	it->signalled_idx = it->used_idx;
}

static void restart(struct driver *it)
{
	const struct eng_ring *ring = &it->world.ring;

	memset(it->world.ring.recovered, 0xff, WORLD_NUM * sizeof(struct eng_recovered));
	start(it, 0x1234);
	MUST(calls(it) == 1);	/* the last signal may be lost */
	MUST(ring->in_flight == it->popped_num);
	MUST(ring->last_avail == (uint16_t)(it->avail_idx - it->offered_num));
	for (uint32_t i = 0; i < it->popped_num; i++) {
		uint32_t found = 0;
		uint32_t older = 0;
		uint64_t counter = 0;

		for (uint32_t k = 0; k < ring->in_flight; k++)
			if (ring->recovered[k].head == DESCS * it->popped[i]) {
				found++;
				counter = ring->recovered[k].counter;
			}
		for (uint32_t k = 0; k < ring->in_flight; k++)
			older += ring->recovered[k].counter < counter;
		MUST(found == 1 && older == i);
	}
	restarts++;
}

static void change_memory(struct driver *it)
{
	uint64_t choice = input_take(&it->input, 1);
	uint32_t place = 2 + (uint32_t)choice % 4;
	struct eng_ring *ring = &it->world.ring;

	/* What chains use comes back at once, at another host address. */
	if (place == 2 || !it->world.is_mapped[place]) {
		if (it->world.is_mapped[place])
			world_unmap(&it->world, place);
		world_map(&it->world, place);
	} else {
		world_unmap(&it->world, place);
	}
	if (ring->generation == it->world.map.generation)
		return;
	MUST(eng_ring_pop(ring, 1) == -ENG_ESTALE && eng_ring_arm(ring) == -ENG_ESTALE);
	MUST(eng_ring_complete(ring, 0, 0) == -ENG_ESTALE && !eng_ring_has_chains(ring));
	if (choice & 0x80)
		notify(it);
	MUST(!eng_ring_translate(ring));
	it->slots_num = 0;
	translations++;
}

static void load_nothing(struct driver *it)
{
	MUST(eng_ring_load(&it->world.ring, WORLD_NUM) == -ENG_ESLOT);
}

static void step(struct driver *it)
{
	static void (*const steps[16])(struct driver *) = {
		offer, offer, offer, offer, pop, pop, answer_slot, answer_slot, answer_slot,
		answer_popped, notify, set_interrupts, arm, change_memory, restart, load_nothing,
	};

	steps[input_take(&it->input, 1) & 15](it);
	allow_popped(it);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct driver it;

	it.input = (struct input){ .data = data, .left = size };
	world_begin(&it.world);
	memset(it.chain, 0, sizeof(it.chain));
	it.offered_num = it.popped_num = 0;
	it.is_no_interrupt = 0;
	it.is_event_idx = (int)input_take(&it.input, 1) & 1;
	it.avail_idx = it.used_idx = (uint16_t)(input_take(&it.input, 1) - 128);
	it.used_event = 0;
	world_write(&it.world, WORLD_AVAIL + 2, &it.avail_idx, 2);
	world_write(&it.world, WORLD_USED + 2, &it.used_idx, 2);
	start(&it, it.avail_idx);
	allow_popped(&it);
	while (it.input.left)
		step(&it);
	while (it.popped_num)
		answer_popped(&it);
	MUST(!it.world.ring.in_flight);
	world_end(&it.world);
	return 0;
}

int fuzz_report(unsigned long count)
{
	printf("%lu inputs, %lu chains returned, %lu processes, %lu translations, %lu signals\n", count,
	       returned, restarts, translations, signals);
	return returned && restarts && translations && signals ? 0 : 1;
}
