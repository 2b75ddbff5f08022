/*
 * A hostile guest and front-end against the ring, call by call: regions come and go, the record is
 * anything, calls come in any order and with any arguments, and guest memory changes meanwhile.
 *
 * Input: a byte of modes, then a byte for each call and what it takes. If the mode says so, a thread
 * writes descriptors, the available ring and the record all the time. What it writes lets a writable
 * buffer lie among the buffers and the indirect tables only, whichever parts of descriptors come
 * together; so a byte that changed elsewhere is a fault. Without the thread, whatever changed must lie in
 * what could be read as a writable descriptor when the chain was popped.
 */
#define _GNU_SOURCE
#include "fuzz_changes.h"
#include "fuzz_log.h"
#include "fuzz_model.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const size_t fuzz_input_size = 320;

enum { IS_RACING = 1, IS_EVENT_IDX = 2, IS_NOT_INDIRECT = 4, RACE_CHANGES = 1 << 20 };

struct sequence {
	struct world world;
	struct input input;
	pthread_t thread;
	int is_racing, is_stopping;
	uint64_t random;
	uint32_t in_flight;		/* as the ring should count it */
	uint32_t slots_num;
	uint8_t is_done[ENG_SLOTS_MAX];
};

static unsigned long popped, completed, recovered, broken, raced;

static void *race(void *argument)
{
	struct sequence *it = argument;

	for (uint32_t i = 0; i < RACE_CHANGES; i++) {
		if (__atomic_load_n(&it->is_stopping, __ATOMIC_ACQUIRE))
			break;
		change(&it->world, next_random(&it->random), 1);
		__atomic_fetch_add(&raced, 1, __ATOMIC_RELAXED);
		if (i % 64 == 63)
			(void)sched_yield();
	}
	return NULL;
}

/* --- Calls, and what must come of them --- */

static int expected(const struct eng_ring *ring)
{
	if (ring->fault)
		return -ENG_EBROKEN;
	return ring->generation == ring->map->generation ? 0 : -ENG_ESTALE;
}

static void check_writes(struct sequence *it)
{
	if (!it->is_racing)
		world_check(&it->world);
}

static void got_slots(struct sequence *it, uint32_t num)
{
	it->slots_num = num;
	memset(it->is_done, 0, sizeof(it->is_done));
	for (uint32_t slot = 0; slot < num; slot++)
		world_check_slot(&it->world, slot);
}

static void pop(struct sequence *it)
{
	struct eng_ring *ring = &it->world.ring;
	uint32_t limit = 1 + (uint32_t)input_take(&it->input, 1) % 40;
	uint16_t before = ring->last_avail;
	int usable = expected(ring);
	int num;

	if (!it->is_racing)
		world_allow_offered(&it->world);
	num = eng_ring_pop(ring, limit);
	check_writes(it);
	if (usable) {
		MUST(num == usable);
		return;
	}
	it->slots_num = 0;
	if (!it->is_racing && world_is_plain(&it->world))
		model_check_pop(&it->world, before, limit, num);
	if (num < 0) {
		broken++;
		MUST(ring->fault == (uint32_t)-num && eng_ring_pop(ring, limit) == -ENG_EBROKEN);
		return;
	}
	MUST((uint32_t)num <= limit && (uint16_t)(ring->last_avail - before) == num);
	got_slots(it, (uint32_t)num);
	it->in_flight += (uint32_t)num;
	MUST(ring->in_flight == it->in_flight);
	popped += (unsigned long)num;
}

static void load(struct sequence *it)
{
	struct eng_ring *ring = &it->world.ring;
	uint16_t head = (uint16_t)(input_take(&it->input, 1) % (WORLD_NUM + 1));
	int usable = expected(ring);
	int status;

	/* Otherwise what was popped before stays as it is. */
	if (!it->is_racing && head < ring->num)
		world_allow_offered(&it->world);
	status = eng_ring_load(ring, head);
	if (usable || head >= ring->num) {
		MUST(status == (usable ? usable : -ENG_ESLOT));
		return;
	}
	it->slots_num = 0;
	if (status)
		MUST(ring->fault == (uint32_t)-status);
	else
		got_slots(it, 1);
	if (!it->is_racing && world_is_plain(&it->world))
		MUST(model_chain_at(&it->world, head).code == -status);
}

/* What a call on a slot must return before it does anything. */
static int expected_of_slot(const struct sequence *it, uint32_t slot)
{
	int usable = expected(&it->world.ring);

	if (usable)
		return usable;
	return slot >= it->slots_num || it->is_done[slot] ? -ENG_ESLOT : 0;
}

static int is_outside(const struct eng_ring *ring, uint32_t slot, uint64_t offset, uint64_t size)
{
	return offset > ring->writable_len[slot] || size > ring->writable_len[slot] - offset;
}

/* Most often, a number of bytes that the slot has room for, or nearly so. */
static uint64_t some_size(struct sequence *it, uint32_t slot)
{
	uint64_t choice = input_take(&it->input, 1);
	uint64_t room = it->world.ring.writable_len[slot % ENG_SLOTS_MAX];

	if (choice & 0x80)
		return room + (choice & 3) - 1;
	return choice == 1 ? UINT64_MAX - 2 : choice * 7 % (room + 1);
}

static void write_slot(struct sequence *it)
{
	struct eng_ring *ring = &it->world.ring;
	uint32_t slot = (uint32_t)input_take(&it->input, 1) % (it->slots_num + 1);
	uint64_t offset = some_size(it, slot) / 2;
	uint64_t size = some_size(it, slot);
	int wanted = expected_of_slot(it, slot);
	uint8_t *data;

	if (!wanted && is_outside(ring, slot, offset, size))
		wanted = -ENG_EBOUNDS;
	data = take_memory(wanted ? 1 : size);
	memset(data, WORLD_SOURCE_BYTE, wanted ? 1 : size);
	MUST(eng_slot_write(ring, slot, offset, data, size) == wanted);
	free(data);
	if (!wanted)
		log_slot(&it->world, slot, offset, size, input_take(&it->input, 1) % 20);
	check_writes(it);
}

static void read_file(struct sequence *it)
{
	struct eng_ring *ring = &it->world.ring;
	uint32_t slot = (uint32_t)input_take(&it->input, 1) % (it->slots_num + 1);
	uint64_t offset = some_size(it, slot) / 2;
	uint64_t size = some_size(it, slot);
	int64_t from = (int64_t)input_take(&it->input, 2) % (WORLD_SOURCE_SIZE + 9);
	int64_t left = from < WORLD_SOURCE_SIZE ? WORLD_SOURCE_SIZE - from : 0;
	int64_t wanted = size < (uint64_t)left ? (int64_t)size : left;
	int fd = input_take(&it->input, 1) % 8 ? it->world.source : -1;

	if (expected_of_slot(it, slot) || is_outside(ring, slot, offset, size))
		wanted = -EINVAL;
	else if (fd < 0 && size)
		wanted = -EBADF;
	MUST(eng_slot_read_file(ring, slot, offset, fd, from, size) == wanted);
	check_writes(it);
}

static void complete_slot(struct sequence *it, uint32_t slot, uint64_t length)
{
	struct eng_ring *ring = &it->world.ring;
	uint16_t used = ring->used_idx;
	int wanted = expected_of_slot(it, slot);

	length &= UINT32_MAX;
	if (!wanted && length > ring->writable_len[slot])
		wanted = -ENG_EBOUNDS;
	if (!wanted && !it->in_flight)
		wanted = -ENG_EIDLE;
	MUST(eng_ring_complete(ring, slot, (uint32_t)length) == wanted);
	if (!wanted) {
		struct vring_used_elem element = { 0 };
		uint64_t at = WORLD_USED + 4 + 8 * (used & (ring->num - 1u));

		it->is_done[slot] = 1;
		it->in_flight--;
		completed++;
		MUST(ring->in_flight == it->in_flight && ring->used_idx == (uint16_t)(used + 1));
		if (world_is_plain(&it->world)) {
			MUST(world_read(&it->world, at, &element, sizeof(element)));
			MUST(element.id == ring->head[slot] && element.len == length);
			MUST(world_word(&it->world, WORLD_USED + 2) == ring->used_idx);
		}
	}
	check_writes(it);
}

static void complete(struct sequence *it)
{
	uint32_t slot = (uint32_t)input_take(&it->input, 1) % (it->slots_num + 1);

	complete_slot(it, slot, some_size(it, slot));
}

/* Each chain that was popped goes back, whatever the guest does meanwhile. */
static void complete_all(struct sequence *it)
{
	struct eng_ring *ring = &it->world.ring;

	for (uint32_t slot = 0; slot < it->slots_num; slot++) {
		if (!it->is_done[slot])
			complete_slot(it, slot, ring->writable_len[slot] & UINT32_MAX);
		if (!expected(ring) && it->in_flight)
			MUST(it->is_done[slot]);
	}
	eng_ring_signal(ring);
}

static void look(struct sequence *it)
{
	struct eng_ring *ring = &it->world.ring;
	int usable = expected(ring);
	int status = eng_ring_arm(ring);

	MUST(usable ? status == usable : status == 0 || status == 1);
	status = eng_ring_has_chains(ring);
	MUST(usable ? !status : status == 0 || status == 1);
	eng_ring_signal(ring);
	check_writes(it);
}

static void change_map(struct sequence *it)
{
	uint32_t place = (uint32_t)input_take(&it->input, 1) % WORLD_PLACES;

	if (it->world.is_mapped[place])
		world_unmap(&it->world, place);
	else
		world_map(&it->world, place);
}

static void translate(struct sequence *it)
{
	struct eng_ring *ring = &it->world.ring;
	uint32_t fault = ring->fault;
	int status = eng_ring_translate(ring);

	MUST(status ? ring->fault == (uint32_t)-status : ring->fault == fault);
	MUST(!status || !it->world.is_mapped[0] || !world_is_plain(&it->world) || ring->num > WORLD_NUM);
	it->slots_num = 0;
}

/* --- A new process --- */

static uint32_t flagged(const struct world *world, uint32_t num)
{
	uint32_t sum = 0;

	for (uint32_t head = 0; head < num; head++)
		sum += world->record->desc[head].inflight == 1;
	return sum;
}

/* What an earlier process left behind runs again: each head once, and as many as are counted. */
static void recover(struct sequence *it, uint32_t flagged_num)
{
	struct eng_ring *ring = &it->world.ring;

	MUST(ring->in_flight <= ring->num);
	if (!it->is_racing)
		MUST(ring->in_flight == 0 || ring->in_flight <= flagged_num);
	for (uint32_t i = 0; i < ring->in_flight; i++)
		MUST(ring->recovered[i].head < ring->num &&
		     (!i || ring->recovered[i].head > ring->recovered[i - 1].head));
	recovered += ring->in_flight;
}

static void choose_ring(struct sequence *it, uint64_t choice, uint64_t modes)
{
	static const uint32_t kinds[WORLD_CALLS] = {
		ENG_SIGNAL_NONBLOCKING, ENG_SIGNAL_POLLED, ENG_SIGNAL_NONBLOCKING,
		ENG_SIGNAL_SOCKET, ENG_SIGNAL_POLLED, ENG_SIGNAL_POLLED,
	};
	static const uint32_t nums[8] = { 0, 3, 8, 4, 1, 1 << 16, WORLD_NUM, WORLD_NUM };
	struct eng_ring *ring = &it->world.ring;
	uint64_t number = input_take(&it->input, 1);

	ring->is_event_idx = (modes & IS_EVENT_IDX) != 0;
	ring->is_indirect = !(modes & IS_NOT_INDIRECT);
	ring->call_fd = it->world.call[number % WORLD_CALLS];
	ring->call_kind = kinds[number % WORLD_CALLS];
	if (choice & 0x10)
		ring->num = nums[number >> 5];
	/* Parts over each other, in other places, or nowhere. */
	if (!it->is_racing && choice & 0x20) {
		uint64_t *addr[3] = { &ring->desc_addr, &ring->avail_addr, &ring->used_addr };

		*addr[number % 3] = WORLD_PLACE[number >> 2 & 3].user_addr + 4 * (number >> 4);
		if (choice & 0x80)	/* the end of a region is in the ring */
			*addr[number % 3] += (WORLD_PLACE[number >> 2 & 3].size - 0xa0) & ~(uint64_t)15;
		if (choice & 0x40)
			*addr[number % 3] = WORLD_PLACE[5].user_addr + (number & 0xfc);
	}
}

static void start(struct sequence *it, uint64_t choice, uint64_t modes)
{
	struct world *world = &it->world;
	uint32_t flagged_num;
	int is_known;

	world_new_ring(world);
	choose_ring(it, choice, modes);
	if ((choice & 3) == 1)
		memset(world->record, 0, WORLD_RECORD_SIZE);
	if ((choice & 3) == 2)
		for (uint32_t i = 0; i < 8; i++)
			change_record(world, input_take(&it->input, 6));
	flagged_num = flagged(world, WORLD_NUM);
	is_known = world->record->version == 1 && world->record->desc_num == world->ring.num;
	it->in_flight = it->slots_num = 0;
	if (!it->is_racing)
		world_allow_offered(world);
	if (eng_ring_start(&world->ring, (uint16_t)(choice * 257))) {
		MUST(world->ring.fault);
		return;
	}
	check_writes(it);
	if (is_known || it->is_racing)
		recover(it, flagged_num);
	else
		MUST(!world->ring.in_flight);
	it->in_flight = world->ring.in_flight;
}

/* --- All of it --- */

static void call(struct sequence *it, uint64_t modes)
{
	uint64_t choice = input_take(&it->input, 1);

	switch (choice & 15) {
	case 0: case 1: case 2:
		for (uint32_t i = 0; !it->is_racing && i < 6; i++)
			change(&it->world, input_take(&it->input, 8), 0);
		if (!it->is_racing)
			break;
		/* fall through */
	case 3:
		pop(it);
		complete_all(it);
		break;
	case 4: case 5:
		pop(it);
		break;
	case 6: case 7:
		write_slot(it);
		break;
	case 8:
		read_file(it);
		break;
	case 9:
		complete(it);
		break;
	case 10:
		load(it);
		break;
	case 11:
		look(it);
		break;
	case 12:
		if (choice >> 4 == 0)
			world_fill(&it->world);
		change_map(it);
		break;
	case 13:
		translate(it);
		break;
	default:
		start(it, choice >> 4 | input_take(&it->input, 1) << 4, modes);
		break;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct sequence it;
	uint64_t modes = size ? data[0] : 0;

	it.input = (struct input){ .data = data + !!size, .left = size - !!size };
	it.is_racing = modes & IS_RACING;
	it.is_stopping = 0;
	it.random = input_take(&it.input, 8) | 1;
	world_begin(&it.world);
	for (uint32_t i = 0; i < 48; i++)
		change(&it.world, next_random(&it.random), it.is_racing);
	memset(it.world.record, 0, WORLD_RECORD_SIZE);
	start(&it, 0, modes);
	if (it.is_racing) {
		world_allow(&it.world, WORLD_USED, WORLD_USED_SIZE);
		world_allow(&it.world, WORLD_TABLES, WORLD_TABLES_END - WORLD_TABLES);
		world_allow(&it.world, WORLD_BUFFERS, UINT64_MAX - WORLD_BUFFERS);
		MUST(!pthread_create(&it.thread, NULL, race, &it));
	}
	while (it.input.left > 4)
		call(&it, modes);
	if (it.is_racing) {
		__atomic_store_n(&it.is_stopping, 1, __ATOMIC_RELEASE);
		MUST(!pthread_join(it.thread, NULL));
	}
	complete_all(&it);
	world_end(&it.world);
	return 0;
}

int fuzz_report(unsigned long count)
{
	printf("%lu inputs, %lu chains, %lu returned, %lu recovered, %lu rings broken, %lu changes meanwhile\n",
	       count, popped, completed, recovered, broken, raced);
	return popped && completed && recovered && broken && raced ? 0 : 1;
}
