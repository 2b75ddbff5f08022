/* The dirty log, byte by byte. */
#include "fuzz_log.h"

#include <stdlib.h>
#include <string.h>

enum { PAGES = 0x80, PAGE_SHIFT = 12 };

static uint64_t gpa_of_host(const struct world *world, const uint8_t *host)
{
	for (uint32_t i = 0; i < world->map.num; i++) {
		const struct eng_region *region = &world->map.region[i];

		if (host >= region->host && host < region->host + region->size)
			return region->gpa + (uint64_t)(host - region->host);
	}
	MUST(!"it is guest memory");
	return 0;
}

/* Marks the page of each byte, from `offset` on, of the writable part of a slot. */
static void mark(const struct world *world, uint32_t slot, uint64_t offset, uint64_t size, uint8_t *marks)
{
	const struct eng_ring *ring = &world->ring;
	uint64_t at = 0;

	for (uint32_t i = 0; i < ring->iov_num[slot]; i++) {
		const struct iovec *iov = &ring->iov[ring->iov_start[slot] + i];

		for (size_t k = 0; k < iov->iov_len; k++, at++)
			if (at >= offset && at - offset < size)
				marks[gpa_of_host(world, (uint8_t *)iov->iov_base + k) >> PAGE_SHIFT] = 1;
	}
}

void log_slot(const struct world *world, uint32_t slot, uint64_t offset, uint64_t size, uint64_t log_size)
{
	uint8_t marks[PAGES] = { 0 };
	uint8_t *log = take_memory(log_size);
	int is_outside = 0;

	mark(world, slot, offset, size, marks);
	for (uint64_t page = log_size * 8; page < PAGES; page++)
		is_outside |= marks[page];
	MUST(eng_log_slot(log, log_size, &world->ring, slot, offset, size) == -is_outside);
	for (uint64_t page = 0; page < PAGES && page < log_size * 8; page++)
		MUST((log[page / 8] >> page % 8 & 1) == marks[page]);
	MUST(eng_log_slot(log, log_size, &world->ring, world->ring.slots_num, 0, 1) == -1);
	free(log);
}
