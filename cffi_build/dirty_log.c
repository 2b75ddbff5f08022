/* Marks written pages in the dirty log. Only the Python side of a ring calls this. */
#include "dirty_log.h"

enum { PAGE_SHIFT = 12 };	/* vhost-user: Migration: VHOST_LOG_PAGE, whatever the host's pages are */

int eng_log_guest(uint8_t *log, uint64_t log_size, uint64_t gpa, uint64_t size)
{
	uint64_t page = gpa >> PAGE_SHIFT;
	uint64_t last = (gpa + size - 1) >> PAGE_SHIFT;

	if (!size)
		return 0;
	for (; page <= last; page++) {
		if (page / 8 >= log_size)
			return -1;
		/*
		 * Others mark and clear bits of the same byte meanwhile. A bit that is set already is
		 * set again: a load that finds it could overtake the write that it stands for, and the
		 * front-end could clear it and copy the page in between.
		 */
		(void)__atomic_fetch_or(&log[page / 8], (uint8_t)(1u << page % 8), __ATOMIC_SEQ_CST);
	}
	return 0;
}

static int log_host(uint8_t *log, uint64_t log_size, const struct eng_map *map, const uint8_t *host,
		    uint64_t size)
{
	int status = 0;
	uint32_t at = 0;

	/* Neighbouring regions may be neighbours here, too, and then be one entry of an iovec. */
	while (size && at < map->num) {
		const struct eng_region *region = &map->region[at];
		uint64_t offset = (uintptr_t)host - (uintptr_t)region->host;
		uint64_t step = region->size - offset;

		at++;
		if (offset >= region->size)
			continue;
		if (step > size)
			step = size;
		status |= eng_log_guest(log, log_size, region->gpa + offset, step);
		host += step;
		size -= step;
		at = 0;
	}
	return size ? -1 : status;
}

int eng_log_slot(uint8_t *log, uint64_t log_size, const struct eng_ring *ring, uint32_t slot,
		 uint64_t offset, uint64_t size)
{
	const struct iovec *iov;
	uint32_t left;
	int status = 0;

	if (slot >= ring->slots_num || eng_ring_usable(ring) == -ENG_ESTALE)
		return -1;
	iov = ring->iov + ring->iov_start[slot];
	for (left = ring->iov_num[slot]; left && size; left--, iov++) {
		uint64_t step = iov->iov_len;

		if (offset >= step) {
			offset -= step;
			continue;
		}
		step -= offset;
		if (step > size)
			step = size;
		status |= log_host(log, log_size, ring->map, (const uint8_t *)iov->iov_base + offset,
				   step);
		offset = 0;
		size -= step;
	}
	return status;
}
