/*
 * Reading the image of a directory (appliance/images/layout.py). It comes from our own store, but
 * every offset in it is checked against its length all the same.
 */
#include "image_view.h"

#include <sys/stat.h>

enum { MAGIC = 0x31474d49, HEADER_SIZE = 48, PIECE_ENTRIES = 8192, GUIDE_ENTRY_SIZE = 16 };

/* Whether `num` items of `item` bytes at `at` end by `end`. */
static int fits(uint64_t at, uint64_t num, uint64_t item, uint64_t end)
{
	return at <= end && num * item <= end - at;
}

int image_open(struct eng_image *ret, struct eng_bytes bytes)
{
	const uint8_t *at = bytes.at;

	if (bytes.size < HEADER_SIZE || bytes.size > UINT32_MAX || image_u32(at) != MAGIC)
		return -1;
	*ret = (struct eng_image){
		.at = at, .size = bytes.size,
		.count = image_u32(at + 4),
		.span = image_u64(at + 16),
		.first = image_u32(at + 24), .pieces_num = image_u32(at + 28),
		.offsets_at = image_u32(at + 32), .digests_at = image_u32(at + 36),
		.links = image_u32(at + 40), .guide_at = image_u32(at + 44),
	};
	if (ret->links != (ret->first ? 0 : IMAGE_LINKS) || ret->count > PIECE_ENTRIES ||
	    !ret->pieces_num || (ret->pieces_num > 1 && !ret->first && !ret->guide_at))
		return -1;
	if (!fits(HEADER_SIZE, (uint64_t)ret->count + 1, 8, ret->offsets_at) ||
	    !fits(ret->offsets_at, (uint64_t)ret->links + ret->count + 1, 4, ret->digests_at) ||
	    !fits(ret->digests_at, ret->count, ENG_DIGEST_SIZE, ret->size))
		return -1;
	if (ret->guide_at &&
	    !fits(ret->guide_at, ret->pieces_num - 1, GUIDE_ENTRY_SIZE, ret->size))
		return -1;
	return 0;
}

int image_record(const struct eng_image *image, uint32_t index, struct eng_bytes *ret)
{
	const uint8_t *offset;
	uint32_t at, end;

	if (index >= image->links + image->count)
		return -1;
	offset = image->at + image->offsets_at + 4 * (uint64_t)index;
	at = image_u32(offset);
	end = image_u32(offset + 4);
	if (end > image->digests_at || at > end || end - at < IMAGE_NAME_AT || end % 8 || at % 8)
		return -1;
	ret->at = image->at + at;
	ret->size = end - at;
	if (image_u32(ret->at + IMAGE_NAMELEN_AT) > ret->size - IMAGE_NAME_AT)
		return -1;
	return 0;
}

uint32_t image_kind_of(const uint8_t *record)
{
	uint32_t mode = image_u32(record + IMAGE_MODE_AT);

	switch (mode & S_IFMT) {
	case S_IFDIR:
		return IMAGE_DIRECTORY;
	case S_IFREG:
		return mode & 0111 ? IMAGE_EXECUTABLE : IMAGE_FILE;
	case S_IFLNK:
		return IMAGE_SYMLINK;
	default:
		return 0;
	}
}

static uint64_t place_at(const struct eng_image *image, uint32_t index)
{
	return image_u64(image->at + HEADER_SIZE + 8 * (uint64_t)index);
}

int image_entry(const struct eng_image *image, uint32_t index, struct image_entry *ret)
{
	uint64_t following;

	if (index >= image->count || image_record(image, image->links + index, &ret->record))
		return -1;
	ret->place = place_at(image, index);
	following = place_at(image, index + 1);
	ret->kind = image_kind_of(ret->record.at);
	if (!ret->place || following <= ret->place || !ret->kind)
		return -1;
	ret->size_stated = following - ret->place - 1;
	ret->digest = image->at + image->digests_at + ENG_DIGEST_SIZE * (uint64_t)index;
	return 0;
}

int image_target(const struct eng_image *image, const uint8_t *digest, struct eng_bytes *ret)
{
	uint32_t at = image_u32(digest + 8);
	uint32_t size = image_u32(digest + 12);

	if (!fits(at, size, 1, image->size))
		return -1;
	ret->at = image->at + at;
	ret->size = size;
	return 0;
}

static int compare(const uint8_t *one, uint32_t one_size, const uint8_t *other, uint32_t other_size)
{
	int order = memcmp(one, other, one_size < other_size ? one_size : other_size);

	return order ? order : (one_size > other_size) - (one_size < other_size);
}

int image_find(const struct eng_image *image, const uint8_t *name, uint32_t size, uint32_t *ret)
{
	uint32_t low = 0;
	uint32_t high = image->count;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;
		struct eng_bytes record;
		int order;

		if (image_record(image, image->links + middle, &record))
			return -1;
		order = compare(record.at + IMAGE_NAME_AT, image_u32(record.at + IMAGE_NAMELEN_AT),
				name, size);
		if (!order) {
			*ret = middle;
			return 1;
		}
		if (order < 0)
			low = middle + 1;
		else
			high = middle;
	}
	return 0;
}

int image_index_at(const struct eng_image *image, uint64_t place, uint32_t *ret)
{
	uint32_t low = 0;
	uint32_t high = image->count;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (place_at(image, middle) <= place)
			low = middle + 1;
		else
			high = middle;
	}
	*ret = low - 1;
	return low ? 0 : -1;
}

/* --- The guide: where the other pieces begin --- */

/* `number` is at least 1, and less than `pieces_num`: the caller's search keeps to that. */
static const uint8_t *guide_entry(const struct eng_image *image, uint32_t number)
{
	return image->at + image->guide_at + GUIDE_ENTRY_SIZE * (uint64_t)(number - 1);
}

int image_piece_of_name(const struct eng_image *image, const uint8_t *name, uint32_t size,
			uint32_t *ret)
{
	uint32_t low = 0;
	uint32_t high = image->pieces_num - 1;

	if (high && !image->guide_at)
		return -1;
	while (low < high) {
		uint32_t middle = low + (high - low + 1) / 2;
		const uint8_t *entry = guide_entry(image, middle);
		uint32_t at = image_u32(entry + 8);
		uint32_t name_size = image_u32(entry + 12);

		if (!fits(at, name_size, 1, image->size))
			return -1;
		if (compare(image->at + at, name_size, name, size) <= 0)
			low = middle;
		else
			high = middle - 1;
	}
	*ret = low;
	return 0;
}

int image_piece_of_place(const struct eng_image *image, uint64_t place, uint32_t *ret)
{
	uint32_t low = 0;
	uint32_t high = image->pieces_num - 1;

	if (high && !image->guide_at)
		return -1;
	while (low < high) {
		uint32_t middle = low + (high - low + 1) / 2;

		if (image_u64(guide_entry(image, middle)) <= place)
			low = middle;
		else
			high = middle - 1;
	}
	*ret = low;
	return 0;
}

uint32_t image_piece_of_cookie(const struct eng_image *image, uint64_t cookie)
{
	uint64_t piece = cookie < IMAGE_LINKS ? 0 : (cookie - IMAGE_LINKS) / PIECE_ENTRIES;

	return piece < image->pieces_num ? (uint32_t)piece : image->pieces_num - 1;
}
