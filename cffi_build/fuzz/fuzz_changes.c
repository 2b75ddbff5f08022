/* What a hostile guest and front-end write. */
#include "fuzz_changes.h"

#include <string.h>

static uint64_t gpa_of(uint64_t bits)
{
	const struct world_place *place = &WORLD_PLACE[bits % WORLD_PLACES];

	if (bits % WORLD_PLACES)
		return place->gpa + (bits >> 8 & 0xffff) % place->size;
	return WORLD_BUFFERS + (bits >> 8 & 0xfff);
}

/* Addresses are in memory, or so far outside that they fail; lengths are small, or fail, too. */
static struct vring_desc desc_make(uint64_t bits, int is_racing)
{
	struct vring_desc desc = { .addr = gpa_of(bits), .len = (uint32_t)(bits >> 24) & 0x1ff };
	uint32_t kind = (uint32_t)(bits >> 40) & 0xff;

	desc.flags = kind & 0x20 ? VRING_DESC_F_WRITE : 0;
	if (kind & 0x40)
		desc.flags |= VRING_DESC_F_NEXT;
	desc.next = (uint16_t)((bits >> 48) % WORLD_NUM);
	if (kind % 16 == 2) {
		desc.addr = WORLD_TABLES + (bits >> 8) % WORLD_TABLES_NUM * 16 * WORLD_TABLE_DESCS;
		desc.len = 16 * (1 + (uint32_t)(bits >> 24) % WORLD_TABLE_DESCS);
		desc.flags = VRING_DESC_F_INDIRECT | (kind == 0x72 ? VRING_DESC_F_NEXT : 0);
	} else if (kind % 16 == 1) {	/* where the table ends */
		desc.flags |= VRING_DESC_F_NEXT;
		desc.next = (uint16_t)(WORLD_NUM - 1 + (bits >> 48) % 3);
	} else if (kind == 3) {
		desc.len = 0x8000u << (bits >> 56) % 17;
	} else if (kind == 4) {
		desc.addr = UINT64_MAX - (bits >> 8 & 0xff);
	} else if (!is_racing && kind % 8 == 5) {
		/* An edge; and what no thread may write: descriptors, rings, anything. */
		desc.addr = WORLD_EDGE - (bits >> 8 & 0x3f);
		if (kind & 0x80)
			desc.addr = WORLD_DESC + (bits >> 8 & 0xfff);
		if (kind & 0x10) {
			desc.flags = VRING_DESC_F_INDIRECT;
			desc.len &= ~15u;
		}
		if ((kind & 0x98) == 0x98)
			desc.len = (uint32_t)(bits >> 8);
	}
	return desc;
}

static void store_desc(struct world *world, uint64_t gpa, struct vring_desc desc)
{
	uint64_t halves[2];

	memcpy(halves, &desc, sizeof(halves));
	world_store(world, gpa, halves[0], 8);
	world_store(world, gpa + 8, halves[1], 8);
}

void change_record(struct world *world, uint64_t bits)
{
	uint8_t *record = (uint8_t *)world->record;
	uint64_t at = 16 + (bits >> 8 & 0xffff) % (WORLD_RECORD_SIZE - 16);

	/* The head of the last batch, and the index of the used ring then. */
	if ((bits & 0xf0) == 0x10) {
		world->record->last_batch_head = (uint16_t)((bits >> 8) % (WORLD_NUM + 1));
		world->record->used_idx -= (uint16_t)((bits >> 16) % 4);
		return;
	}
	if ((bits & 0xf0) == 0)
		at = (bits >> 8) % 16;
	__atomic_store_n(&record[at], (uint8_t)(bits >> 32 & (bits & 0x80 ? 0xffu : 3u)),
			 __ATOMIC_RELAXED);
}

/* What the available index is to be: most often, some chains more than were taken. */
static uint16_t next_avail(const struct world *world, uint64_t bits, int is_racing)
{
	uint16_t taken = __atomic_load_n(&world->ring.last_avail, __ATOMIC_RELAXED);

	if (bits % (is_racing ? 512 : 16) == 0)
		return (uint16_t)(bits >> 16);
	return (uint16_t)(taken + (bits >> 16) % (WORLD_NUM + 1));
}

void change(struct world *world, uint64_t bits, int is_racing)
{
	uint64_t more = bits >> 4;

	switch (bits & 15) {
	default:
		store_desc(world, WORLD_DESC + 16 * (more % WORLD_NUM), desc_make(bits >> 8, is_racing));
		break;
	case 8: case 9:
		more %= WORLD_TABLES_NUM * WORLD_TABLE_DESCS;
		store_desc(world, WORLD_TABLES + 16 * more, desc_make(bits >> 9, is_racing));
		break;
	case 10: case 11:
		world_store(world, WORLD_AVAIL + 4 + 2 * (more % (WORLD_NUM + 1)),
			    (bits >> 16) % (is_racing || bits >> 60 ? WORLD_NUM : 20u), 2);
		break;
	case 12: case 13:
		world_store(world, WORLD_AVAIL + 2, next_avail(world, more, is_racing), 2);
		break;
	case 14:
		world_store(world, WORLD_AVAIL, more & 1, 2);
		if (!is_racing && more % 16 == 2)
			world_store(world, WORLD_USED + 2 * (more >> 4 & 1), more >> 8, 2);
		break;
	case 15:
		change_record(world, more);
		break;
	}
}

uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}
