/* One piece of a directory image, read only within its bounds; not part of the cdef. */
#ifndef IMAGE_VIEW_H
#define IMAGE_VIEW_H
#include "answers.h"

#include <string.h>

enum {
	IMAGE_LINKS = 2,		/* cookies of "." and ".." */
	IMAGE_INO_AT = 40,
	IMAGE_SIZE_AT = 48,
	IMAGE_MODE_AT = 100,
	IMAGE_NAMELEN_AT = 144,
	IMAGE_NAME_AT = 152,
};

/* What an entry is. */
enum image_kind {
	IMAGE_DIRECTORY = 'd', IMAGE_FILE = 'f', IMAGE_EXECUTABLE = 'x', IMAGE_SYMLINK = 'l',
};

/* LMDB aligns values to 2 bytes only. */
static inline uint32_t image_u32(const uint8_t *at)
{
	uint32_t value;

	memcpy(&value, at, sizeof(value));
	return value;
}

static inline uint64_t image_u64(const uint8_t *at)
{
	uint64_t value;

	memcpy(&value, at, sizeof(value));
	return value;
}

static inline void image_put64(uint8_t *to, uint64_t value)
{
	memcpy(to, &value, sizeof(value));
}

/* An entry, pointing into an image or a grant. */
struct image_entry {
	struct eng_bytes record;
	const uint8_t *digest;
	uint64_t place, size_stated;
	uint32_t kind;
};

/* Functions return 0, or -1 if the image is inconsistent or what is looked for is not there. */
int image_open(struct eng_image *ret, struct eng_bytes bytes);
/* The record at an index that counts the records of "." and "..", too. */
int image_record(const struct eng_image *image, uint32_t index, struct eng_bytes *ret);
/* `index` counts entries. */
int image_entry(const struct eng_image *image, uint32_t index, struct image_entry *ret);
int image_target(const struct eng_image *image, const uint8_t *digest, struct eng_bytes *ret);
/* The kind that a record's mode stands for; 0 if for none. */
uint32_t image_kind_of(const uint8_t *record);

/* Returns 1 and the index of the entry `name`, 0 if there is none, or -1. */
int image_find(const struct eng_image *image, const uint8_t *name, uint32_t size, uint32_t *ret);
/* The index of the last entry whose place is at most `place`. */
int image_index_at(const struct eng_image *image, uint64_t place, uint32_t *ret);

/* The piece that has a name, a place or a cookie; asked of the first piece. */
int image_piece_of_name(const struct eng_image *image, const uint8_t *name, uint32_t size,
			uint32_t *ret);
int image_piece_of_place(const struct eng_image *image, uint64_t place, uint32_t *ret);
uint32_t image_piece_of_cookie(const struct eng_image *image, uint64_t cookie);
#endif
