/* The chains of a ring, read again without the engine. */
#include "fuzz_model.h"

#include <string.h>

#define CHAIN_BYTES_MAX ((uint64_t)1 << 32)

/* Whether all of it is in places that are mapped and follow each other. */
static int is_memory(const struct world *world, uint64_t gpa, uint64_t size)
{
	while (size) {
		uint64_t step = 0;

		for (uint32_t i = 0; i < WORLD_PLACES; i++)
			if (world->is_mapped[i] && gpa - WORLD_PLACE[i].gpa < WORLD_PLACE[i].size)
				step = WORLD_PLACE[i].size - (gpa - WORLD_PLACE[i].gpa);
		if (!step)
			return 0;
		if (step > size)
			step = size;
		gpa += step;
		size -= step;
	}
	return 1;
}

static int add(const struct world *world, const struct vring_desc *desc, struct model_chain *chain)
{
	if (desc->flags & VRING_DESC_F_WRITE)
		chain->has_writable = 1;
	else if (chain->has_writable)
		return ENG_EORDER;
	if (desc->len > UINT64_MAX - desc->addr)
		return ENG_EADDR_OVERFLOW;
	if (chain->readable + chain->writable + desc->len > CHAIN_BYTES_MAX)
		return ENG_ETOTAL;
	if (!is_memory(world, desc->addr, desc->len))
		return ENG_EADDR;
	if (chain->has_writable)
		chain->writable += desc->len;
	else
		chain->readable += desc->len;
	return 0;
}

static int check_indirect(const struct world *world, const struct vring_desc *desc)
{
	if (!world->ring.is_indirect)
		return ENG_EINDIRECT_FEATURE;
	if (desc->flags & VRING_DESC_F_NEXT)
		return ENG_EINDIRECT_NEXT;
	if (!desc->len || desc->len % 16 || desc->len / 16 > ENG_NUM_MAX)
		return ENG_EINDIRECT_LEN;
	return desc->len > UINT64_MAX - desc->addr ? ENG_EADDR_OVERFLOW : 0;
}

/* Goes through a table from the entry `at` on. */
static int read_table(const struct world *world, uint64_t table, uint32_t num, uint32_t at,
		      struct model_chain *chain)
{
	struct vring_desc desc;
	int code;

	for (uint32_t hops = 0; hops < num; hops++) {
		uint64_t gpa = table + 16 * (uint64_t)at;

		if (!is_memory(world, gpa, sizeof(desc)))
			return ENG_EADDR;
		MUST(world_read(world, gpa, &desc, sizeof(desc)));
		if (desc.flags & VRING_DESC_F_INDIRECT) {
			if (chain->is_indirect)
				return ENG_EINDIRECT_NESTED;
			code = check_indirect(world, &desc);
			chain->is_indirect = 1;
			return code ? code : read_table(world, desc.addr, desc.len / 16, 0, chain);
		}
		code = add(world, &desc, chain);
		if (code || !(desc.flags & VRING_DESC_F_NEXT))
			return code;
		at = desc.next;
		if (at >= num)
			return ENG_ENEXT;
	}
	return ENG_ELOOP;
}

struct model_chain model_chain_at(const struct world *world, uint32_t head)
{
	struct model_chain chain = { 0 };

	chain.code = read_table(world, WORLD_DESC, world->ring.num, head, &chain);
	return chain;
}

void model_check_slot(const struct world *world, uint32_t slot)
{
	struct model_chain chain = model_chain_at(world, world->ring.head[slot]);

	MUST(!chain.code && chain.readable == world->ring.readable_len[slot]);
	MUST(chain.writable == world->ring.writable_len[slot]);
}

/* Whether the longest chain had no room any more, so that the pop may have ended before. */
static int is_full(const struct eng_ring *ring)
{
	return ring->scratch_used > ENG_SCRATCH_SIZE - ENG_REQUEST_MAX ||
	       ring->iov_used > ENG_IOV_NUM - ENG_CHAIN_IOV_MAX;
}

void model_check_pop(const struct world *world, uint16_t before, uint32_t limit, int num)
{
	uint16_t pending = (uint16_t)(world_word(world, WORLD_AVAIL + 2) - before);
	int code = pending > world->ring.num ? ENG_EAVAIL_JUMP : 0;
	int count = 0;

	while (!code && count < pending && (uint32_t)count < limit) {
		uint32_t at = (uint32_t)(before + count) % world->ring.num;
		uint16_t head = world_word(world, WORLD_AVAIL + 4 + 2 * (uint64_t)at);

		code = head >= world->ring.num ? ENG_EHEAD : model_chain_at(world, head).code;
		if (!code && count < num) {
			MUST(world->ring.head[count] == head);
			model_check_slot(world, (uint32_t)count);
		}
		count += !code;
	}
	if (num < 0)
		MUST(!count && code == -num);
	else
		MUST(num == count || (num < count && is_full(&world->ring)));
}
