/*
 * What reads bytes outside the ring: Directories and their images, the cutting of blobs, and the files of an
 * import.
 *
 * Input: a byte that picks one of them, and what it takes. A Directory is well formed, or damaged in a few
 * bytes; where it is well formed, its image must have each entry. A blob is cut at once and in parts, with
 * the same result.
 */
#define _GNU_SOURCE
#include "castore.h"
#include "fastcdc.h"
#include "frames.h"
#include "fuzz.h"
#include "image_view.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const size_t fuzz_input_size = 2048;

enum { ENTRIES_MAX = 3 * IMG_PIECE_ENTRIES, ENTRY_SIZE_MAX = 400, PIECES_MAX = 4 };

static unsigned long directories, refused, entries, chunks;

/* --- Encoded Directories --- */

struct text {
	uint8_t *bytes;
	size_t size;
};

static void put(struct text *to, const void *bytes, size_t size)
{
	memcpy(to->bytes + to->size, bytes, size);
	to->size += size;
}

static void put_varint(struct text *to, uint64_t value)
{
	do {
		uint8_t byte = (uint8_t)((value & 0x7f) | (value > 0x7f ? 0x80 : 0));

		put(to, &byte, 1);
		value >>= 7;
	} while (value);
}

static void put_bytes(struct text *to, uint32_t field, const void *bytes, size_t size)
{
	put_varint(to, field << 3 | 2);
	put_varint(to, size);
	put(to, bytes, size);
}

/* An entry of list `list`, whose name begins with its number, so that all names ascend. */
static void put_entry(struct text *to, struct input *input, uint32_t number, uint32_t list)
{
	uint8_t message[ENTRY_SIZE_MAX], name[255], content[200];
	struct text it = { .bytes = message };
	uint64_t choice = input_take(input, 1);
	uint64_t size = input_take(input, 1);

	memset(name, (int)(choice | 0x40), sizeof(name));
	memset(content, (int)number | 1, sizeof(content));
	(void)snprintf((char *)name, 7, "%06x", number);
	name[6] = '-';
	put_bytes(&it, 1, name, choice & 0x40 ? 7 + choice % 32 : 7);
	if (choice >= 0xf8)
		size = input_take(input, 8);
	if (list == 3) {
		put_bytes(&it, 2, content, 1 + size % sizeof(content));
	} else {
		put_bytes(&it, 2, content, 32);
		if (size) {
			put_varint(&it, 3 << 3);
			put_varint(&it, size);
		}
		if (list == 2 && choice & 1)
			put(&it, "\x20\x01", 2);
	}
	put_bytes(to, list, message, it.size);
}

/* Which list each entry is in follows from a few bits, so the three can be put one after the other. */
static struct text encoded_directory(struct input *input, uint32_t num)
{
	struct text text = { .bytes = take_memory((size_t)num * ENTRY_SIZE_MAX) };
	uint64_t kinds = input_take(input, 8);

	for (uint32_t list = 1; list <= 3; list++)
		for (uint32_t number = 0; number < num; number++)
			if (1 + (kinds >> number % 61) % 3 == list)
				put_entry(&text, input, number, list);
	return text;
}

static void damage(struct input *input, uint8_t *at, size_t size)
{
	uint64_t count = input_take(input, 1) % 8;

	for (uint64_t i = 0; size && i < count; i++) {
		size_t where = (size_t)input_take(input, 4) % (i % 2 && size > 64 ? 64 : size);

		at[where] = (uint8_t)input_take(input, 1);
	}
}

/* --- Images --- */

static void check_bytes(const struct eng_image *image, const struct eng_bytes *bytes)
{
	MUST(bytes->at >= image->at && bytes->at <= image->at + image->size &&
	     bytes->size <= (uint64_t)(image->at + image->size - bytes->at));
}

/* Asks a damaged image whatever can be asked of one; it answers within its bounds. */
static void ask_image(struct input *input, uint8_t *at, uint64_t size)
{
	struct eng_bytes bytes = { at, size };
	struct image_entry entry;
	struct eng_image image;
	uint32_t index = 0;

	if (image_open(&image, bytes))
		return;
	for (uint32_t i = 0; i < 8; i++) {
		uint32_t number = (uint32_t)input_take(input, 2) % (image.count + 3);
		uint64_t place = input_take(input, i % 2 ? 8 : 1);
		char name[16];
		uint32_t name_size = (uint32_t)snprintf(name, sizeof(name), "%06x-", number);

		if (!image_entry(&image, number, &entry)) {
			check_bytes(&image, &entry.record);
			if (!image_target(&image, entry.digest, &bytes))
				check_bytes(&image, &bytes);
		}
		(void)image_find(&image, (const uint8_t *)name, name_size, &index);
		(void)image_index_at(&image, place, &index);
		if (!image_piece_of_name(&image, (const uint8_t *)name, name_size, &index))
			MUST(index < image.pieces_num);
		if (!image_piece_of_place(&image, place, &index))
			MUST(index < image.pieces_num);
		MUST(image_piece_of_cookie(&image, place) < image.pieces_num);
	}
}

/* Every entry is found by its name and by its place. */
static void check_piece(const struct eng_image *image, uint64_t *place)
{
	for (uint32_t i = 0; i < image->count; i++) {
		struct image_entry entry;
		struct eng_bytes target;
		uint32_t index;

		MUST(!image_entry(image, i, &entry));
		check_bytes(image, &entry.record);
		MUST(entry.place > *place);
		*place = entry.place + entry.size_stated;
		MUST(image_find(image, entry.record.at + IMAGE_NAME_AT,
				image_u32(entry.record.at + IMAGE_NAMELEN_AT), &index) == 1 &&
		     index == i);
		MUST(!image_index_at(image, *place, &index) && index == i);
		MUST(entry.kind == 'd' || entry.kind == 'l' || !entry.size_stated);
		if (entry.kind == 'l')
			MUST(!image_target(image, entry.digest, &target) &&
			     target.size == image_u64(entry.record.at + IMAGE_SIZE_AT));
	}
	entries += image->count;
}

/* Adds the guide, of which Python takes care otherwise, to the first of several pieces. */
static uint64_t add_guide(uint8_t *const pieces[], uint32_t num, uint64_t size)
{
	uint32_t at = (uint32_t)size;

	memcpy(pieces[0] + 44, &at, 4);
	for (uint32_t i = 1; i < num; i++) {
		uint32_t guide[4] = { 0, 0, at + 16 * (num - 1) + 6 * (i - 1), 6 };
		char name[8];

		memcpy(guide, pieces[i] + 48, 8);
		(void)snprintf(name, sizeof(name), "%06x", i * IMG_PIECE_ENTRIES);
		memcpy(pieces[0] + at + 16 * (i - 1), guide, 16);
		memcpy(pieces[0] + guide[2], name, 6);
	}
	return size + 22 * (uint64_t)(num - 1);
}

static void build_image(struct input *input, struct img_builder *builder)
{
	uint8_t *piece[PIECES_MAX] = { NULL };
	uint64_t size[PIECES_MAX] = { 0 };
	uint64_t place = 0;
	uint32_t num = builder->pieces_num;

	MUST(num <= PIECES_MAX);
	for (uint32_t i = 0; i < num; i++) {
		int64_t wanted = img_piece_size(builder);
		struct img_builder again = *builder;

		MUST(wanted > 0);
		size[i] = (uint64_t)wanted;
		piece[i] = take_memory(size[i] + (i ? 0 : 22 * (uint64_t)(num - 1)));
		MUST(img_piece_write(&again, piece[i], size[i] - 1) == -IMG_EROOM);
		MUST(!img_piece_write(builder, piece[i], size[i]));
	}
	if (num > 1)
		size[0] = add_guide(piece, num, size[0]);
	for (uint32_t i = 0; i < num; i++) {
		struct eng_bytes bytes = { piece[i], size[i] };
		struct eng_image image;

		MUST(!image_open(&image, bytes));
		MUST(image.span == builder->span && image.first == i * IMG_PIECE_ENTRIES);
		check_piece(&image, &place);
		damage(input, piece[i], (size_t)size[i]);
		ask_image(input, piece[i], size[i]);
		free(piece[i]);
	}
	MUST(place == builder->span);
}

/* --- Frames --- */

static void check_items(const struct frame_item *items, const struct frame_sizes *sizes)
{
	uint64_t contents = 0;
	uint64_t at = 0;

	for (uint32_t i = 0; i < sizes->items_num; i++) {
		MUST(items[i].at >= at && items[i].at <= sizes->structure);
		MUST(items[i].kind == 'd' || (items[i].kind == 'f' && items[i].size));
		at = items[i].at;
		if (items[i].kind == 'f')
			contents += items[i].size;
	}
	MUST(contents == sizes->contents);
}

/* What is measured is written, exactly; `error` and `total` are what the builder of images has found. */
static void make_frames(const uint8_t *encoded, size_t size, int error, uint64_t total)
{
	static const uint8_t token[24] = "some token";
	struct frame_token some = { token, 24 };
	struct frame_tokens tokens = { some, some, some, some, some, some, some };
	struct frame_sizes sizes, less;
	struct frame_item *items;
	uint8_t *structure;
	int status = frames_measure(&sizes, &tokens, encoded, size);

	/* Only the sums differ: one is of places, the other of bytes. */
	MUST(status == error || status == -IMG_ESPAN || error == -IMG_ESPAN);
	if (status)
		return;
	MUST((sizes.structure + sizes.contents) % 8 == 0 && (error || sizes.entries_num == total));
	structure = take_memory(sizes.structure);
	items = take_memory(sizes.items_num * sizeof(*items));
	MUST(!frames_write(&sizes, &tokens, encoded, size, structure, items));
	check_items(items, &sizes);
	less = sizes;
	less.structure -= 8;
	MUST(frames_write(&less, &tokens, encoded, size, structure, items) == -IMG_EROOM);
	free(structure);
	free(items);
}

/* --- All of a Directory --- */

static void fuzz_directory(struct input *input)
{
	uint64_t choice = input_take(input, 1);
	uint32_t num = (uint32_t)input_take(input, 1) % 24;
	struct text text;
	struct img_builder builder;
	uint8_t *encoded;
	int error;

	if (choice == 0xfe)
		num = (uint32_t)input_take(input, 2) % ENTRIES_MAX;
	text = encoded_directory(input, num);
	if (choice & 1)
		damage(input, text.bytes, text.size);
	if (choice & 1 && choice & 2)
		text.size -= (size_t)input_take(input, 2) % (text.size + 1);
	/* Allocated exactly, so that a byte too far is ASan's. */
	encoded = take_memory(text.size);
	memcpy(encoded, text.bytes, text.size);
	free(text.bytes);
	directories++;
	error = img_builder_init(&builder, encoded, text.size);
	make_frames(encoded, text.size, error, error ? 0 : builder.total);
	if (!error && builder.pieces_num <= PIECES_MAX) {
		build_image(input, &builder);
	} else {
		/* Without damage, only the sizes may be too much. */
		MUST(error < 0 && (choice & 1 || error == -IMG_ESPAN));
		refused++;
	}
	free(encoded);
}

/* --- Chunks --- */

static uint32_t cut(struct fastcdc *cdc, const uint8_t *bytes, uint64_t size, uint64_t *ends)
{
	uint64_t *found = take_memory((size / cdc->min + 2) * sizeof(*found));
	uint32_t num = fastcdc_take(cdc, bytes, size, found);

	MUST(num <= size / cdc->min + 2);
	memcpy(ends, found, num * sizeof(*found));
	free(found);
	return num;
}

static void fuzz_chunks(struct input *input)
{
	enum { SIZE = 3000 };
	static uint64_t whole[SIZE + 2], parts[SIZE + 2 + 2 * SIZE];
	struct fastcdc cdc = { .min = 2 * (1 + (uint32_t)input_take(input, 1) % 40) };
	struct fastcdc other;
	uint64_t size = input_take(input, 2) % SIZE;
	uint64_t alphabet = input_take(input, 1);
	uint8_t *bytes = take_memory(size);
	uint32_t num, parts_num = 0;

	cdc.normal = cdc.min + 2 * ((uint32_t)input_take(input, 1) % 40);
	cdc.max = cdc.normal + (uint32_t)input_take(input, 1) % 80;
	cdc.mask_short = input_take(input, 8) & input_take(input, 8) & input_take(input, 8);
	cdc.mask_long = cdc.mask_short & input_take(input, 8);
	for (uint64_t i = 0; i < size; i++)
		bytes[i] = (uint8_t)((input->left ? input_take(input, 1) : i) & alphabet);
	other = cdc;
	num = cut(&cdc, bytes, size, whole);
	for (uint64_t at = 0; at < size;) {
		uint64_t step = 1 + (at * 7 + num) % 61;

		if (step > size - at)
			step = size - at;
		parts_num += cut(&other, bytes + at, step, parts + parts_num);
		at += step;
	}
	free(bytes);
	MUST(num == parts_num && !memcmp(whole, parts, num * sizeof(*whole)));
	MUST(cdc.settled == other.settled && cdc.is_held == other.is_held &&
	     cdc.settled + cdc.is_held == size);
	for (uint32_t i = 0; i < num; i++) {
		uint64_t length = whole[i] - (i ? whole[i - 1] : 0);

		MUST(length >= cdc.min && length <= cdc.max);
	}
	chunks += num;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = { .data = data, .left = size };

	if (input_take(&input, 1) % 4)
		fuzz_directory(&input);
	else
		fuzz_chunks(&input);
	return 0;
}

int fuzz_report(unsigned long count)
{
	printf("%lu inputs, %lu directories, %lu refused, %lu entries, %lu chunks\n", count, directories,
	       refused, entries, chunks);
	return refused && entries && chunks ? 0 : 1;
}
