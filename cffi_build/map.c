/* Guest memory: regions of the front-end's files, looked up by guest and by user address. */
#include "engine.h"

#include <errno.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

/* A hugetlbfs file can be mapped only at multiples of its page size. 0 and errno on failure. */
static uint64_t map_granularity(int fd)
{
	struct statfs fs;

	if (fstatfs(fd, &fs) < 0)
		return 0;
	if (fs.f_type == HUGETLBFS_MAGIC)
		return (uint64_t)fs.f_bsize;
	return (uint64_t)sysconf(_SC_PAGESIZE);
}

static int region_map(struct eng_region *region, int fd, uint64_t offset)
{
	uint64_t granularity = map_granularity(fd);
	uint64_t delta;
	void *base;

	if (!granularity)
		return -errno;
	delta = offset % granularity;
	region->base_size = region->size + delta;
	if (region->base_size % granularity)
		region->base_size += granularity - region->base_size % granularity;
	base = mmap(NULL, region->base_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd,
		    (off_t)(offset - delta));
	if (base == MAP_FAILED)
		return -errno;
	/* A core dump should not hold a guest's memory; that it might is no reason to fail. */
	(void)madvise(base, region->base_size, MADV_DONTDUMP);
	region->base = base;
	region->host = region->base + delta;
	return 0;
}

int eng_map_add(struct eng_map *map, int fd, uint64_t gpa, uint64_t size, uint64_t user_addr,
		uint64_t offset)
{
	struct eng_region region = { .gpa = gpa, .size = size, .user_addr = user_addr };
	uint32_t at = 0;
	int status;

	if (map->num == ENG_REGIONS_MAX)
		return -ENOSPC;
	status = region_map(&region, fd, offset);
	if (status)
		return status;
	while (at < map->num && map->region[at].gpa < gpa)
		at++;
	memmove(&map->region[at + 1], &map->region[at], (map->num - at) * sizeof(region));
	map->region[at] = region;
	map->num++;
	return 0;
}

int eng_map_remove(struct eng_map *map, uint64_t gpa)
{
	uint32_t at = 0;

	while (at < map->num && map->region[at].gpa != gpa)
		at++;
	if (at == map->num)
		return -ENOENT;
	/* Cannot fail for a whole mapping of ours. */
	(void)munmap(map->region[at].base, map->region[at].base_size);
	map->num--;
	memmove(&map->region[at], &map->region[at + 1],
		(map->num - at) * sizeof(map->region[0]));
	map->hit = 0;
	map->generation++;
	return 0;
}

void eng_map_deinit(struct eng_map *map)
{
	while (map->num)
		(void)eng_map_remove(map, map->region[map->num - 1].gpa);
}

/* The last region that begins at or below gpa, or the first; the caller checks gpa. num > 0. */
static uint32_t region_search(const struct eng_map *map, uint64_t gpa)
{
	uint32_t low = 0;
	uint32_t high = map->num;

	while (high - low > 1) {
		uint32_t middle = low + (high - low) / 2;

		if (map->region[middle].gpa <= gpa)
			low = middle;
		else
			high = middle;
	}
	return low;
}

uint8_t *eng_map_gpa(struct eng_map *map, uint64_t gpa, uint64_t *ret)
{
	const struct eng_region *region;

	if (!map->num)
		return NULL;
	/* A gpa below the region wraps around to a difference beyond its size. */
	region = &map->region[map->hit];
	if (gpa - region->gpa >= region->size) {
		map->hit = region_search(map, gpa);
		region = &map->region[map->hit];
		if (gpa - region->gpa >= region->size)
			return NULL;
	}
	*ret = region->size - (gpa - region->gpa);
	return region->host + (gpa - region->gpa);
}

uint8_t *eng_map_user(const struct eng_map *map, uint64_t user_addr, uint64_t size)
{
	uint32_t at;

	for (at = 0; at < map->num; at++) {
		const struct eng_region *region = &map->region[at];
		uint64_t offset = user_addr - region->user_addr;

		if (offset < region->size && size <= region->size - offset)
			return region->host + offset;
	}
	return NULL;
}

int eng_map_read(struct eng_map *map, uint64_t gpa, void *data, uint64_t size, uint64_t *ret)
{
	uint8_t *to = data;

	while (size) {
		uint64_t step;
		const uint8_t *from = eng_map_gpa(map, gpa, &step);

		if (!from) {
			*ret = gpa;
			return -1;
		}
		if (step > size)
			step = size;
		memcpy(to, from, step);
		to += step;
		gpa += step;
		size -= step;
	}
	return 0;
}
