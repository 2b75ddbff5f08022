/*
 * The grants of a session (appliance/session/grants_layout.py). The supervisor appends to this memory while
 * we read; nothing that was published moves, and the file only grows.
 */
#include "grants.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>

enum {
	INDEX_AT = 8,
	NUMBERS_AT = 32,
	REVOKED_NUM_AT = 40,
	OPEN_FILES_AT = 56,
	ROWS_AT = 4096,
	ROW_SIZE = 32,
	GRANTS_MAX = 1 << 20,
	ROWS_END = ROWS_AT + GRANTS_MAX * ROW_SIZE,
	RECORD_HEAD_SIZE = 48,
	RECORD_MAX = 8192,		/* every root record has that many bytes behind its start */
	SLOTS_LOG2_MAX = 22,
};

static uint64_t load(const struct eng_grants *grants, uint64_t at)
{
	const void *word = grants->at + at;

	return __atomic_load_n((const uint64_t *)word, __ATOMIC_ACQUIRE);
}

static int map(struct eng_grants *grants)
{
	struct stat status;
	void *at;

	if (fstat(grants->fd, &status) < 0)
		return -errno;
	if ((uint64_t)status.st_size < ROWS_END)
		return -EINVAL;
	at = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_SHARED, grants->fd, 0);
	if (at == MAP_FAILED)
		return -errno;
	eng_grants_deinit(grants);
	grants->at = at;
	grants->size = (uint64_t)status.st_size;
	return 0;
}

int eng_grants_init(struct eng_grants *ret, int fd)
{
	int error;

	memset(ret, 0, sizeof(*ret));
	ret->fd = fd;
	error = map(ret);
	if (error)
		return error;
	ret->generation = image_u32(ret->at + NUMBERS_AT);
	ret->is_by_content = image_u32(ret->at + NUMBERS_AT + 4);
	return 0;
}

void eng_grants_deinit(struct eng_grants *grants)
{
	if (grants->at)
		(void)munmap((void *)(uintptr_t)grants->at, grants->size);
	grants->at = NULL;
	grants->size = 0;
}

/* Returns NULL if there are not that many bytes. May move the mapping: older pointers are dead. */
static const uint8_t *bytes_at(struct eng_grants *grants, uint64_t at, uint64_t size)
{
	if (at > grants->size || size > grants->size - at) {
		if (map(grants) || at > grants->size || size > grants->size - at)
			return NULL;
	}
	return grants->at + at;
}

uint64_t grants_revoked_num(const struct eng_grants *grants)
{
	return load(grants, REVOKED_NUM_AT);
}

uint64_t grants_open_files(const struct eng_grants *grants)
{
	return load(grants, OPEN_FILES_AT);
}

static uint64_t row_word(const struct eng_grants *grants, uint32_t row, uint32_t word)
{
	return load(grants, ROWS_AT + ROW_SIZE * (uint64_t)row + 8 * (uint64_t)word);
}

static uint32_t rows_num(const struct eng_grants *grants)
{
	uint64_t num = load(grants, 0);

	return num > GRANTS_MAX ? GRANTS_MAX : (uint32_t)num;
}

int grants_have_root(const struct eng_grants *grants)
{
	return rows_num(grants) && row_word(grants, 0, 0) == ROOT_NODEID;
}

static int grant_at(struct eng_grants *grants, uint32_t row, struct grant *ret)
{
	const uint8_t *at;
	uint64_t record_size, target_size;

	if (row_word(grants, row, 3))
		return 0;	/* it was revoked */
	at = bytes_at(grants, row_word(grants, row, 2), RECORD_MAX);
	if (!at)
		return 0;
	ret->base = row_word(grants, row, 0);
	ret->span = row_word(grants, row, 1);
	ret->kind = image_u32(at);
	target_size = image_u32(at + 4);
	ret->size = image_u64(at + 8);
	ret->digest = at + 16;
	ret->record.at = at + RECORD_HEAD_SIZE;
	record_size = IMAGE_NAME_AT + (uint64_t)image_u32(ret->record.at + IMAGE_NAMELEN_AT);
	record_size = (record_size + 7) & ~(uint64_t)7;
	if (record_size > RECORD_MAX - RECORD_HEAD_SIZE ||
	    target_size > RECORD_MAX - RECORD_HEAD_SIZE - record_size)
		return 0;
	ret->record.size = record_size;
	ret->target.at = ret->record.at + record_size;
	ret->target.size = target_size;
	return 1;
}

int grants_by_nodeid(struct eng_grants *grants, uint64_t nodeid, struct grant *ret)
{
	uint32_t low = 0;
	uint32_t high = rows_num(grants);

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (row_word(grants, middle, 0) <= nodeid)
			low = middle + 1;
		else
			high = middle;
	}
	return low && grant_at(grants, low - 1, ret) && nodeid - ret->base < ret->span;
}

/* The CRC-32 of zlib, four bits at a time. */
static uint32_t crc32_of(const uint8_t *bytes, uint32_t size)
{
	static const uint32_t table[16] = {
		0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4,
		0x4db26158, 0x5005713c, 0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c,
		0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c,
	};
	uint32_t crc = ~(uint32_t)0;

	for (uint32_t i = 0; i < size; i++) {
		crc ^= bytes[i];
		crc = crc >> 4 ^ table[crc & 15];
		crc = crc >> 4 ^ table[crc & 15];
	}
	return ~crc;
}

static int has_name(struct eng_grants *grants, uint32_t row, const uint8_t *name, uint32_t size)
{
	const uint8_t *record = bytes_at(grants, row_word(grants, row, 2), RECORD_MAX);

	if (!record)
		return 0;
	record += RECORD_HEAD_SIZE;
	return image_u32(record + IMAGE_NAMELEN_AT) == size && size <= UINT8_MAX &&
	       !memcmp(record + IMAGE_NAME_AT, name, size);
}

int grants_by_name(struct eng_grants *grants, const uint8_t *name, uint32_t size,
		   struct grant *ret)
{
	uint64_t index = load(grants, INDEX_AT);
	uint32_t slot = crc32_of(name, size);
	uint32_t num, mask;

	if ((index & 0xff) > SLOTS_LOG2_MAX)
		return 0;
	mask = ((uint32_t)1 << (index & 0xff)) - 1;
	num = rows_num(grants);
	for (uint32_t i = 0; i <= mask; i++, slot++) {
		const uint8_t *word = bytes_at(grants, (index >> 8) + 4 * (uint64_t)(slot & mask), 4);
		uint32_t number = word ? image_u32(word) : 0;

		if (!number || number > num)
			return 0;	/* absent, or a row that is being appended */
		if (has_name(grants, number - 1, name, size))
			return grant_at(grants, number - 1, ret);
	}
	return 0;
}
