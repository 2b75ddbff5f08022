/*
 * Feeds the engine rings built from the fuzzer's bytes and checks what it did to guest memory.
 *
 * Input: a byte of features, an 8-byte record per descriptor, avail.idx, heads, and the inflight
 * record, if the features say that there is one. So most inputs have the form of a ring and go
 * deep; addresses fall in, at the edges of, and outside the regions.
 * Guest memory is allocated region by region: a byte too far is ASan's. Beyond that, whatever
 * changed must be in a buffer that some descriptor calls writable, or in the used ring.
 */
#include "engine.h"
#include "fuzz.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
	NUM = 16,
	REGIONS = 4,
	TABLE_DESCS = 32,
	RECORD = 8,
	RING_GPA = 0x10000,
	AVAIL_OFFSET = 16 * NUM,
	USED_OFFSET = AVAIL_OFFSET + 64,
	TABLE_OFFSET = 0x1f0,		/* the last descriptors lie in the next region */
	INFLIGHT_SIZE = 16 + 16 * NUM,
};

_Static_assert(USED_OFFSET + 6 + 8 * NUM <= TABLE_OFFSET + 16, "areas in the first region");

static const struct { uint64_t gpa, size; } LAYOUT[REGIONS] = {
	{ RING_GPA, 0x300 }, { RING_GPA + 0x300, 0x180 }, { 0x20000, 0x1000 }, { 0x21000, 0x801 },
};

struct guest {
	struct eng_map map;
	uint8_t *before[REGIONS];
	uint8_t *writable[REGIONS];	/* one byte each: may it change? */
};

static void guest_init(struct guest *guest)
{
	uint32_t i;

	memset(&guest->map, 0, sizeof(guest->map));
	guest->map.num = REGIONS;
	for (i = 0; i < REGIONS; i++) {
		struct eng_region *region = &guest->map.region[i];

		region->gpa = region->user_addr = LAYOUT[i].gpa;
		region->size = LAYOUT[i].size;
		region->host = take_memory(region->size);
		guest->before[i] = take_memory(region->size);
		guest->writable[i] = take_memory(region->size);
	}
}

static void guest_deinit(struct guest *guest)
{
	uint32_t i;

	for (i = 0; i < REGIONS; i++) {
		free(guest->map.region[i].host);
		free(guest->before[i]);
		free(guest->writable[i]);
	}
}

static void guest_write(struct guest *guest, uint64_t gpa, const void *data, uint64_t size)
{
	const uint8_t *from = data;

	for (; size; size--, gpa++, from++) {
		uint64_t usable;
		uint8_t *host = eng_map_gpa(&guest->map, gpa, &usable);

		if (!host)
			abort();
		*host = *from;
	}
}

/* Byte by byte and without the engine's lookup: this is the independent half of the check. */
static void guest_allow(struct guest *guest, uint64_t gpa, uint64_t size)
{
	uint32_t i;
	uint64_t at;

	for (i = 0; i < REGIONS; i++)
		for (at = 0; at < LAYOUT[i].size; at++)
			if (LAYOUT[i].gpa + at >= gpa && LAYOUT[i].gpa + at - gpa < size)
				guest->writable[i][at] = 1;
}

static void guest_remember(struct guest *guest)
{
	uint32_t i;

	for (i = 0; i < REGIONS; i++)
		memcpy(guest->before[i], guest->map.region[i].host, LAYOUT[i].size);
}

static void guest_check(const struct guest *guest)
{
	uint32_t i;
	uint64_t at;

	for (i = 0; i < REGIONS; i++)
		for (at = 0; at < LAYOUT[i].size; at++)
			if (guest->map.region[i].host[at] != guest->before[i][at] &&
			    !guest->writable[i][at]) {
				fprintf(stderr, "changed: %#llx\n",
					(unsigned long long)(LAYOUT[i].gpa + at));
				abort();
			}
}

/* One record: a kind byte that picks address and length, two bytes for each, flags, next. */
static struct vring_desc desc_make(struct input *input)
{
	uint64_t kind = input_take(input, 1);
	uint64_t low = input_take(input, 2);
	uint64_t length = input_take(input, 2);
	struct vring_desc desc = { .addr = 0x20000 + low % 0x1000, .len = length & 0x3ff };

	desc.flags = (uint16_t)(input_take(input, 1) & 7);
	desc.next = (uint16_t)(input_take(input, 1) % (TABLE_DESCS + 2));
	if (kind & 1)			/* over the edge between two regions, or out of the last */
		desc.addr = LAYOUT[low % REGIONS].gpa + LAYOUT[low % REGIONS].size - (length & 63);
	if (kind & 16)
		desc.flags &= 3;
	if ((kind & 6) == 6)
		desc.flags &= 2;
	if ((kind & 0x60) == 0x60) {
		desc.addr = RING_GPA + TABLE_OFFSET;
		desc.len = 16 * (uint32_t)(length % (TABLE_DESCS + 1));
		desc.flags = VRING_DESC_F_INDIRECT;
	}
	if ((kind & 0x8c) == 0x8c) {
		desc.addr = low << 48 | length << 32 | kind;
		desc.len = (uint32_t)(low << 16 | length);
	}
	(void)input_take(input, RECORD - 7);
	return desc;
}

static void guest_fill(struct guest *guest, struct input *input)
{
	uint16_t words[2 + NUM] = { 0 };
	uint32_t i;

	for (i = 0; i < NUM + TABLE_DESCS; i++) {
		struct vring_desc desc = desc_make(input);
		uint64_t gpa = RING_GPA + 16 * i;

		if (i >= NUM)
			gpa += TABLE_OFFSET - 16 * NUM;
		if (gpa + 16 > RING_GPA + 0x480)
			break;
		guest_write(guest, gpa, &desc, sizeof(desc));
	}
	words[1] = (uint16_t)(input_take(input, 1) % (NUM + 3));
	for (i = 0; i < NUM; i++)
		words[2 + i] = (uint16_t)(input_take(input, 1) % (NUM + (i & 1)));
	guest_write(guest, RING_GPA + AVAIL_OFFSET, words, sizeof(words));
}

/* Whatever can be read as a descriptor, reachable or not; indirect tables may lie anywhere. */
static void guest_allow_descs(struct guest *guest, uint64_t gpa, uint32_t num, int depth)
{
	uint32_t i;

	for (i = 0; i < num && i < 0x1000; i++) {
		struct vring_desc desc;
		uint64_t hole;

		if (eng_map_read(&guest->map, gpa + 16 * i, &desc, sizeof(desc), &hole))
			return;
		if (desc.flags & VRING_DESC_F_WRITE)
			guest_allow(guest, desc.addr, desc.len);
		if (desc.flags & VRING_DESC_F_INDIRECT && !depth)
			guest_allow_descs(guest, desc.addr, desc.len / 16, 1);
	}
}

static uint64_t smaller(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static uint32_t popped, recovered;

static void ring_exercise(struct eng_ring *ring, struct guest *guest)
{
	static const uint8_t reply[4096] = { 0xa5 };
	uint32_t slot;
	int count = eng_ring_pop(ring, ENG_SLOTS_MAX);

	guest_check(guest);
	for (slot = 0; count > 0 && slot < (uint32_t)count; slot++) {
		uint64_t length = ring->writable_len[slot];
		uint64_t at;

		popped++;
		for (at = 0; at < length; at += sizeof(reply))
			if (eng_slot_write(ring, slot, at, reply,
					   smaller(length - at, sizeof(reply))))
				abort();
		if (eng_slot_write(ring, slot, length, reply, 1) != -ENG_EBOUNDS)
			abort();
	}
	guest_check(guest);
	guest_allow(guest, RING_GPA + USED_OFFSET, 6 + 8 * NUM);
	for (slot = 0; count > 0 && slot < (uint32_t)count; slot++)
		if (eng_ring_complete(ring, slot, (uint32_t)ring->writable_len[slot]))
			abort();
	(void)eng_ring_arm(ring);
	guest_check(guest);
}

/* An inflight record as a front-end can have it: of this layout, with any content. */
static void inflight_fill(struct eng_inflight *area, struct input *input)
{
	uint32_t head;

	area->version = 1;
	area->desc_num = NUM;
	area->last_batch_head = (uint16_t)(input_take(input, 1) % (NUM + 1));
	area->used_idx = (uint16_t)(0 - input_take(input, 1) % (NUM + 2));
	for (head = 0; head < NUM; head++) {
		uint64_t entry = input_take(input, 1);

		area->desc[head].inflight = (uint8_t)(entry & 3);
		area->desc[head].next = (uint16_t)((entry >> 2 & 31) % (NUM + 1));
		area->desc[head].counter = entry & 0x80 ? UINT64_MAX - head : entry;
	}
}

/* Runs again what the record says was popped: each head once, and as many as are counted. */
static void ring_recover(struct eng_ring *ring)
{
	uint32_t count = ring->in_flight;
	uint32_t i;

	for (i = 0; i < count; i++) {
		uint32_t head = ring->recovered[i].head;
		int status;

		if (head >= NUM || (i && head <= ring->recovered[i - 1].head))
			abort();
		status = eng_ring_load(ring, (uint16_t)head);
		if (!status)
			status = eng_ring_complete(ring, 0, 0);
		if (!status)
			recovered++;
		else if (!ring->fault)
			abort();
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct guest guest;
	static struct eng_ring ring;
	struct input input = { .data = data, .left = size };
	uint64_t features = input_take(&input, 1);

	guest_init(&guest);
	guest_fill(&guest, &input);
	guest_allow_descs(&guest, RING_GPA, NUM, 0);
	ring = (struct eng_ring){
		.map = &guest.map,
		.inflight = take_memory(INFLIGHT_SIZE),
		.recovered = take_memory(NUM * sizeof(struct eng_recovered)),
		.scratch = take_memory(ENG_SCRATCH_SIZE),
		.iov = take_memory(ENG_IOV_SIZE),
		.desc_addr = RING_GPA,
		.avail_addr = RING_GPA + AVAIL_OFFSET,
		.used_addr = RING_GPA + USED_OFFSET,
		.num = NUM,
		.is_event_idx = features & 1,
		.is_indirect = (features & 6) != 6,
		.call_fd = -1,
	};
	if (!ring.is_event_idx)
		guest_allow(&guest, RING_GPA + USED_OFFSET, 2);
	if (features & 8)
		inflight_fill(ring.inflight, &input);
	if (!eng_ring_start(&ring, 0)) {
		guest_remember(&guest);
		if (ring.in_flight)
			guest_allow(&guest, RING_GPA + USED_OFFSET, 6 + 8 * NUM);
		ring_recover(&ring);
		ring_exercise(&ring, &guest);
	} else if (!(features & 8)) {
		abort();
	}
	free(ring.inflight);
	free(ring.recovered);
	free(ring.scratch);
	free(ring.iov);
	guest_deinit(&guest);
	return 0;
}

const size_t fuzz_input_size = 1 + RECORD * (NUM + TABLE_DESCS) + 1 + NUM + 2 + NUM;

int fuzz_report(unsigned long count)
{
	printf("%lu inputs, %u chains, %u recovered\n", count, popped, recovered);
	return popped && recovered ? 0 : 1;
}
