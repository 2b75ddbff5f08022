/*
 * Guest memory for the fuzzers of rings.
 *
 * What a region's mapping has beyond the region, to the border of a page, is poisoned, so that a byte
 * too far is ASan's. The places are looked up here without the engine: this is the independent half of
 * every comparison.
 */
#define _GNU_SOURCE
#include "fuzz_world.h"

#include <errno.h>
#include <fcntl.h>
#include <sanitizer/asan_interface.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define PAGE 4096u

const struct world_place WORLD_PLACE[WORLD_PLACES] = {
	{ 0x10000, 0x2300, WORLD_USER(0x10000), 0, 0 },
	{ WORLD_EDGE, 0xd10, WORLD_USER(0x20000), 0x4000, 0 },	/* follows the first in guest addresses */
	{ 0x40000, 0x1801, WORLD_USER(0x40000), 0x10, 1 },
	{ 0x50000, 0x0ff0, WORLD_USER(0x50000), 0x3000, 1 },
	{ 0x60000, 0x0801, WORLD_USER(0x60000), 0x4000, 0 },		/* the second's bytes again */
	{ 0x70000, 0x1000, WORLD_USER(0x70000), 0x5003, 1 },		/* where nothing is aligned */
};

/* --- Once --- */

static uint8_t *map_shared(int fd, size_t size)
{
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	MUST(at != MAP_FAILED);
	return at;
}

static int new_file(const char *name, size_t size)
{
	int fd = memfd_create(name, MFD_CLOEXEC);

	MUST(fd >= 0);
	MUST(!ftruncate(fd, (off_t)size));
	return fd;
}

/* The record lies at the end of a page, before one that cannot be touched. */
static void make_record(struct world *world)
{
	int fd = new_file("record", PAGE);
	void *at = mmap(NULL, 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	MUST(at != MAP_FAILED);
	MUST(mmap(at, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == at);
	(void)close(fd);
	world->record_page = at;
	at = world->record_page + PAGE - WORLD_RECORD_SIZE;
	world->record = at;
}

/* Descriptors of all kinds that a call descriptor may be, whose reader never reads. */
static void make_calls(struct world *world)
{
	int pipes[2], ends[2];

	MUST(!pipe2(pipes, O_NONBLOCK | O_CLOEXEC) && fcntl(pipes[1], F_SETPIPE_SZ, PAGE) > 0);
	MUST(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
	world->call[0] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	world->call[1] = eventfd(0, EFD_CLOEXEC);
	world->call[2] = pipes[1];
	world->call[3] = ends[0];
	world->call[4] = pipes[0];	/* cannot be written to */
	world->call[5] = -1;
}

static void make(struct world *world)
{
	uint8_t source[WORLD_SOURCE_SIZE];

	for (uint32_t i = 0; i < WORLD_FILES; i++) {
		world->fd[i] = new_file("guest", WORLD_FILE_SIZE);
		world->view[i] = map_shared(world->fd[i], WORLD_FILE_SIZE);
		world->shadow[i] = take_memory(WORLD_FILE_SIZE);
		world->allowed[i] = take_memory(WORLD_FILE_SIZE);
	}
	make_record(world);
	make_calls(world);
	world->source = new_file("source", 0);
	memset(source, WORLD_SOURCE_BYTE, sizeof(source));
	MUST(write(world->source, source, sizeof(source)) == sizeof(source));
	world->ring.recovered = take_memory(WORLD_NUM * sizeof(struct eng_recovered));
	world->ring.scratch = take_memory(ENG_SCRATCH_SIZE);
	world->ring.iov = take_memory(ENG_IOV_SIZE);
}

/* --- For each input --- */

void world_begin(struct world *world)
{
	if (!world->record)
		make(world);
	for (uint32_t i = 0; i < WORLD_FILES; i++) {
		memset(world->view[i], 0, WORLD_FILE_SIZE);
		memset(world->shadow[i], 0, WORLD_FILE_SIZE);
	}
	world_allow_nothing(world);
	memset(world->record_page, 0, PAGE);
	for (uint32_t i = 0; i < WORLD_PLACES - 2; i++)
		world_map(world, i);
	world_new_ring(world);
}

void world_end(struct world *world)
{
	static const uint8_t zeros[PAGE - WORLD_RECORD_SIZE];

	world_check(world);
	MUST(!memcmp(world->record_page, zeros, sizeof(zeros)));
	for (uint32_t i = 0; i < WORLD_PLACES; i++)
		if (world->is_mapped[i])
			world_unmap(world, i);
	MUST(!world->map.num);
}

static void poison(const struct eng_region *region, int is_poisoned)
{
	const uint8_t *end = region->host + region->size;
	size_t before = (size_t)(region->host - region->base);
	size_t after = (size_t)(region->base + region->base_size - end);

	if (is_poisoned) {
		ASAN_POISON_MEMORY_REGION(region->base, before);
		ASAN_POISON_MEMORY_REGION(end, after);
	} else {
		ASAN_UNPOISON_MEMORY_REGION(region->base, region->base_size);
	}
}

static const struct eng_region *region_at(const struct world *world, uint64_t gpa)
{
	for (uint32_t i = 0; i < world->map.num; i++)
		if (world->map.region[i].gpa == gpa)
			return &world->map.region[i];
	MUST(!"the region is mapped");
	return NULL;
}

void world_map(struct world *world, uint32_t place)
{
	const struct world_place *it = &WORLD_PLACE[place];
	uint32_t generation = world->map.generation;

	MUST(!eng_map_add(&world->map, world->fd[it->file], it->gpa, it->size, it->user_addr,
			  it->offset));
	MUST(world->map.generation == generation);
	poison(region_at(world, it->gpa), 1);
	world->is_mapped[place] = 1;
}

void world_unmap(struct world *world, uint32_t place)
{
	uint32_t generation = world->map.generation;

	poison(region_at(world, WORLD_PLACE[place].gpa), 0);
	MUST(!eng_map_remove(&world->map, WORLD_PLACE[place].gpa));
	MUST(world->map.generation != generation);
	world->is_mapped[place] = 0;
}

void world_fill(struct world *world)
{
	struct eng_map *map = &world->map;
	uint64_t gpa = 0x100000;
	int large = memfd_create("large", MFD_CLOEXEC | MFD_HUGETLB);

	MUST(eng_map_add(map, -1, gpa, 4096, gpa, 0) == -EBADF);
	MUST(eng_map_add(map, world->fd[0], gpa, 4096, gpa, (uint64_t)1 << 63) < 0);
	MUST(eng_map_remove(map, gpa) == -ENOENT);
	if (large >= 0) {
		int status = eng_map_add(map, large, gpa, 4096, gpa, 0);

		if (!status)
			MUST(!eng_map_remove(map, gpa));
		(void)close(large);
	}
	while (map->num < ENG_REGIONS_MAX) {
		MUST(!eng_map_add(map, world->fd[0], gpa, 4096, gpa, 0));
		gpa += 4096;
	}
	MUST(eng_map_add(map, world->fd[0], gpa, 4096, gpa, 0) == -ENOSPC);
	while (gpa > 0x100000) {
		gpa -= 4096;
		MUST(!eng_map_remove(map, gpa));
	}
}

void world_new_ring(struct world *world)
{
	struct eng_ring ring = {
		.map = &world->map,
		.inflight = world->record,
		.recovered = world->ring.recovered,
		.scratch = world->ring.scratch,
		.iov = world->ring.iov,
		.desc_addr = WORLD_USER(WORLD_DESC),
		.avail_addr = WORLD_USER(WORLD_AVAIL),
		.used_addr = WORLD_USER(WORLD_USED),
		.num = WORLD_NUM,
		.call_fd = -1,
	};

	world->ring = ring;
}

int world_is_plain(const struct world *world)
{
	return world->ring.desc_addr == WORLD_USER(WORLD_DESC) &&
	       world->ring.avail_addr == WORLD_USER(WORLD_AVAIL) &&
	       world->ring.used_addr == WORLD_USER(WORLD_USED);
}

/* --- The guest's bytes --- */

static const struct world_place *place_of(uint64_t gpa)
{
	for (uint32_t i = 0; i < WORLD_PLACES; i++)
		if (gpa - WORLD_PLACE[i].gpa < WORLD_PLACE[i].size)
			return &WORLD_PLACE[i];
	return NULL;
}

void world_write(struct world *world, uint64_t gpa, const void *data, uint64_t size)
{
	const uint8_t *from = data;

	for (; size; size--, gpa++, from++) {
		const struct world_place *place = place_of(gpa);

		if (place) {
			uint64_t at = place->offset + (gpa - place->gpa);

			world->view[place->file][at] = world->shadow[place->file][at] = *from;
		}
	}
}

void world_store(struct world *world, uint64_t gpa, uint64_t value, uint32_t size)
{
	const struct world_place *place = place_of(gpa);
	uint64_t at;
	void *to;

	MUST(place && gpa % size == 0 && place->size - (gpa - place->gpa) >= size);
	at = place->offset + (gpa - place->gpa);
	memcpy(world->shadow[place->file] + at, &value, size);
	to = world->view[place->file] + at;
	if (size == 2)
		__atomic_store_n((uint16_t *)to, (uint16_t)value, __ATOMIC_RELEASE);
	else
		__atomic_store_n((uint64_t *)to, value, __ATOMIC_RELEASE);
}

int world_read(const struct world *world, uint64_t gpa, void *data, uint64_t size)
{
	uint8_t *to = data;

	for (; size; size--, gpa++, to++) {
		const struct world_place *place = place_of(gpa);

		if (!place)
			return 0;
		*to = world->view[place->file][place->offset + (gpa - place->gpa)];
	}
	return 1;
}

uint16_t world_word(const struct world *world, uint64_t gpa)
{
	uint16_t value = 0;

	MUST(world_read(world, gpa, &value, sizeof(value)));
	return value;
}

/* --- What the device may write --- */

void world_allow_nothing(struct world *world)
{
	for (uint32_t i = 0; i < WORLD_FILES; i++)
		memset(world->allowed[i], 0, WORLD_FILE_SIZE);
}

void world_allow(struct world *world, uint64_t gpa, uint64_t size)
{
	for (uint32_t i = 0; i < WORLD_PLACES; i++) {
		const struct world_place *place = &WORLD_PLACE[i];
		uint64_t end = size > UINT64_MAX - gpa ? UINT64_MAX : gpa + size;
		uint64_t first = gpa > place->gpa ? gpa : place->gpa;
		uint64_t last = end < place->gpa + place->size ? end : place->gpa + place->size;

		if (first < last)
			memset(world->allowed[place->file] + place->offset + (first - place->gpa), 1,
			       last - first);
	}
}

static uint64_t gpa_of_user(uint64_t user_addr)
{
	for (uint32_t i = 0; i < WORLD_PLACES; i++)
		if (user_addr - WORLD_PLACE[i].user_addr < WORLD_PLACE[i].size)
			return WORLD_PLACE[i].gpa + (user_addr - WORLD_PLACE[i].user_addr);
	return 0;
}

/* How many bytes from `gpa` on, ENG_NUM_MAX descriptors at most, are outside all places. */
static uint64_t hole_at(uint64_t gpa)
{
	uint64_t size = 16 * (uint64_t)ENG_NUM_MAX;

	if (place_of(gpa))
		return 0;
	for (uint32_t i = 0; i < WORLD_PLACES; i++)
		if (WORLD_PLACE[i].gpa - gpa < size)
			size = WORLD_PLACE[i].gpa - gpa;
	return size;
}

static void allow_descs(struct world *world, uint64_t gpa, uint32_t num, int depth)
{
	for (uint32_t i = 0; i < num && i < ENG_NUM_MAX; i++) {
		struct vring_desc desc;

		if (!world_read(world, gpa + 16 * (uint64_t)i, &desc, sizeof(desc))) {
			uint64_t hole = hole_at(gpa + 16 * (uint64_t)i);

			/* What lies behind a hole can be reached, too. */
			i += hole ? (uint32_t)((hole - 1) / 16) : 0;
			continue;
		}
		if (desc.flags & VRING_DESC_F_WRITE)
			world_allow(world, desc.addr, desc.len);
		if (desc.flags & VRING_DESC_F_INDIRECT && !depth)
			allow_descs(world, desc.addr, desc.len / 16, 1);
	}
}

void world_allow_offered(struct world *world)
{
	uint32_t num = world->ring.num;

	world_allow_nothing(world);
	world_allow(world, gpa_of_user(world->ring.used_addr), 6 + 8 * (uint64_t)num);
	allow_descs(world, gpa_of_user(world->ring.desc_addr), num, 0);
}

static void check_block(struct world *world, uint32_t file, size_t at, size_t size)
{
	for (size_t end = at + size; at < end; at++) {
		if (world->view[file][at] == world->shadow[file][at])
			continue;
		MUST(world->allowed[file][at]);
		world->shadow[file][at] = world->view[file][at];
	}
}

void world_check(struct world *world)
{
	enum { BLOCK = 256 };

	for (uint32_t i = 0; i < WORLD_FILES; i++)
		for (size_t at = 0; at < WORLD_FILE_SIZE; at += BLOCK)
			if (memcmp(world->view[i] + at, world->shadow[i] + at, BLOCK) != 0)
				check_block(world, i, at, BLOCK);
}

static int is_mapped_memory(const struct world *world, const struct iovec *iov)
{
	const uint8_t *at = iov->iov_base;

	for (uint32_t i = 0; i < world->map.num; i++) {
		const struct eng_region *region = &world->map.region[i];

		if (at >= region->host && at < region->host + region->size &&
		    iov->iov_len <= (size_t)(region->host + region->size - at))
			return 1;
	}
	return 0;
}

void world_check_slot(const struct world *world, uint32_t slot)
{
	const struct eng_ring *ring = &world->ring;
	uint32_t copied = ring->request_end[slot] - ring->request_start[slot];
	uint64_t total = 0;

	MUST(copied == (ring->readable_len[slot] < ENG_REQUEST_MAX ? ring->readable_len[slot] :
								      ENG_REQUEST_MAX));
	MUST(ring->request_end[slot] <= ENG_SCRATCH_SIZE);
	for (uint32_t i = 0; i < ring->iov_num[slot]; i++) {
		const struct iovec *iov = &ring->iov[ring->iov_start[slot] + i];

		MUST(is_mapped_memory(world, iov));
		total += iov->iov_len;
	}
	MUST(total == ring->writable_len[slot]);
}
