/*
 * A store, grants and requests for the fuzzers of the answers.
 *
 * The store is this file's: it takes the place of lmdb_reader.c. Each value is allocated by itself, so
 * a byte too far is ASan's.
 */
#define _GNU_SOURCE
#include "fuzz_store.h"
#include "images.h"

#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
	VALUES = 7,
	ROWS_AT = 4096,
	ROWS_END = ROWS_AT + (1 << 25),
	GRANTS_SIZE = ROWS_END + 65536,
	GENERATION = 7,
	CONTENT_SIZE = 100,
};

uint64_t input_take(struct input *input, size_t size)
{
	uint64_t value = 0;

	if (size > input->left)
		size = input->left;
	memcpy(&value, input->data, size);
	input->data += size;
	input->left -= size;
	return value;
}

void *take_memory(size_t size)
{
	void *memory = calloc(1, size ? size : 1);

	if (!memory)
		abort();
	return memory;
}

/* --- The store: digests are a number, repeated --- */

static struct value {
	uint32_t table, piece;
	uint8_t number;
	uint8_t *at;
	uint64_t size;
} values[VALUES];
static uint32_t values_num;

int eng_store_begin(struct eng_store *store)
{
	store->is_open = 1;
	return 0;
}

void eng_store_end(struct eng_store *store)
{
	store->is_open = 0;
}

int eng_store_get(struct eng_store *store, uint32_t table, const void *key, uint32_t key_size,
		  struct eng_bytes *ret)
{
	if (!store->is_open || key_size < ENG_DIGEST_SIZE)
		abort();
	for (uint32_t i = 0; i < values_num; i++) {
		const struct value *value = &values[i];
		uint8_t digest[ENG_DIGEST_SIZE];

		memset(digest, value->number, sizeof(digest));
		if (value->table == table && value->piece == (key_size > ENG_DIGEST_SIZE) &&
		    !memcmp(key, digest, sizeof(digest))) {
			*ret = (struct eng_bytes){ value->at, value->size };
			return 1;
		}
	}
	return 0;
}

static void store_put(uint32_t table, uint32_t piece, uint8_t number, const uint8_t *bytes,
		      uint64_t size)
{
	struct value *value = &values[values_num++];

	value->table = table;
	value->piece = piece;
	value->number = number;
	value->size = size;
	value->at = take_memory(size);
	memcpy(value->at, bytes, size);
}

/* --- What is in it: directory `number` has directories, files and a link, in three lists --- */

static size_t put_node(uint8_t *to, uint32_t list, const char *name, uint8_t digest, uint8_t size)
{
	uint8_t name_size = (uint8_t)strlen(name);
	uint8_t *start = to;

	*to++ = (uint8_t)(list << 3 | 2);
	*to++ = (uint8_t)(2 + name_size + 2 + (list == 3 ? size : ENG_DIGEST_SIZE + 2));
	*to++ = 1 << 3 | 2;
	*to++ = name_size;
	memcpy(to, name, name_size);
	to += name_size;
	*to++ = 2 << 3 | 2;
	*to++ = list == 3 ? size : ENG_DIGEST_SIZE;
	memset(to, list == 3 ? 't' : digest, list == 3 ? size : ENG_DIGEST_SIZE);
	to += list == 3 ? size : ENG_DIGEST_SIZE;
	if (list != 3) {
		*to++ = 3 << 3;
		*to++ = size;
	}
	return (size_t)(to - start);
}

static void put_u32(uint8_t *to, uint32_t value)
{
	memcpy(to, &value, sizeof(value));
}

/* Adds the image as two pieces; the guide says that the second begins with "file". */
static void put_pieces(uint8_t number, const uint8_t *image, uint64_t size)
{
	uint8_t *head = take_memory(size + 20);
	uint8_t *other = take_memory(size);

	memcpy(head, image, size);
	put_u32(head + 28, 2);
	put_u32(head + 44, (uint32_t)size);
	put_u32(head + size, 3);
	put_u32(head + size + 8, (uint32_t)size + 16);
	put_u32(head + size + 12, 4);
	memcpy(head + size + 16, "file", 4);
	store_put(ENG_IMAGES, 0, number, head, size + 20);
	memcpy(other, image, size);
	put_u32(other + 24, IMG_PIECE_ENTRIES);
	put_u32(other + 40, 0);
	store_put(ENG_IMAGES, 1, number, other, size);
	free(head);
	free(other);
}

static void put_directory(uint8_t number, uint8_t child, uint8_t child_size)
{
	uint8_t encoded[512];
	struct img_builder builder;
	uint8_t *image;
	size_t size = 0;
	int64_t image_size;

	if (child)
		size += put_node(encoded, 1, "dir", child, child_size);
	size += put_node(encoded + size, 2, "a", 0xb1, CONTENT_SIZE);
	size += put_node(encoded + size, 2, "file", 0xb2, CONTENT_SIZE);
	size += put_node(encoded + size, 3, "link", 0, 20);
	if (img_builder_init(&builder, encoded, size))
		abort();
	image_size = img_piece_size(&builder);
	if (image_size < 0)
		abort();
	image = take_memory((size_t)image_size);
	if (img_piece_write(&builder, image, (size_t)image_size))
		abort();
	if (number == 2)
		put_pieces(number, image, (uint64_t)image_size);
	else
		store_put(ENG_IMAGES, 0, number, image, (uint64_t)image_size);
	free(image);
}

static void store_fill(void)
{
	uint8_t content[1 + CONTENT_SIZE] = { 0 };

	values_num = 0;
	put_directory(1, 2, 8);
	put_directory(2, 3, 3);
	put_directory(3, 0, 0);
	store_put(ENG_BLOBS, 0, 0xb1, content, sizeof(content));
	store_put(ENG_BLOBS, 0, 0xb2, content, 1 + CONTENT_SIZE / 2);
}

static void store_empty(void)
{
	for (uint32_t i = 0; i < values_num; i++)
		free(values[i].at);
}

/* --- The grants: one path, whose root is directory 1 --- */

static uint8_t *grants_memory;
static int grants_fd;

static void put_u64(uint64_t at, uint64_t value)
{
	memcpy(grants_memory + at, &value, sizeof(value));
}

static void grants_fill(void)
{
	static const uint64_t row[4] = { 2, 13, ROWS_END };
	struct fuse_direntplus record = { .dirent = { .namelen = 4 } };
	uint32_t kind = 'd';
	uint64_t size = 12;

	memset(grants_memory, 0, 4096);
	memset(grants_memory + ROWS_END, 0, 65536);
	put_u64(0, 1);
	put_u64(8, (uint64_t)(ROWS_END + 32768) << 8 | 0);
	put_u64(32, GENERATION);
	memcpy(grants_memory + ROWS_AT, row, sizeof(row));
	memcpy(grants_memory + ROWS_END, &kind, sizeof(kind));
	memcpy(grants_memory + ROWS_END + 8, &size, sizeof(size));
	memset(grants_memory + ROWS_END + 16, 1, ENG_DIGEST_SIZE);
	record.entry_out.nodeid = 2;
	memcpy(grants_memory + ROWS_END + 48, &record, FUSE_NAME_OFFSET_DIRENTPLUS);
	memcpy(grants_memory + ROWS_END + 48 + FUSE_NAME_OFFSET_DIRENTPLUS, "path", 4);
	grants_memory[ROWS_END + 32768] = 1;
}

static void grants_make(void)
{
	if (grants_memory)
		return;
	grants_fd = memfd_create("grants", 0);
	if (grants_fd < 0 || ftruncate(grants_fd, GRANTS_SIZE))
		abort();
	grants_memory = mmap(NULL, GRANTS_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, grants_fd, 0);
	if (grants_memory == MAP_FAILED)
		abort();
}

/* Overwrites a byte or a word: near the start, where headers and tables are, or anywhere. */
static void damage(struct input *input, uint8_t *at, uint64_t size)
{
	uint64_t kind = input_take(input, 1);
	uint64_t where = input_take(input, 2) % (kind & 0x31 || size < 64 ? size : 64);
	uint64_t what = input_take(input, 2);
	uint32_t width = kind & 2 ? 4 : 1;

	if (kind & 4)
		what *= 0x00010001;
	if (kind & 8)
		what = 0 - what;
	where &= ~(uint64_t)(width - 1);
	if (where <= size - width)
		memcpy(at + where, &what, width);
}

/* --- Requests --- */

uint32_t request_make(struct input *input, uint8_t *to)
{
	static const uint32_t opcodes[8] = {
		FUSE_LOOKUP, FUSE_LOOKUP, FUSE_GETATTR, FUSE_READLINK,
		FUSE_READ, FUSE_READDIR, FUSE_READDIRPLUS, FUSE_FORGET,
	};
	static const char *const names[8] = { "a", "dir", "file", "link", "", "..", "path", "zz" };
	struct fuse_in_header header = { .unique = 1 };
	uint64_t choice = input_take(input, 1);
	struct fuse_read_in args = { 0 };
	uint32_t size = sizeof(header);

	memset(to, 0, FUZZ_REQUEST_SIZE);
	header.opcode = opcodes[choice & 7];
	header.nodeid = input_take(input, 1) % 18;
	if (choice & 0x80)
		header.nodeid = input_take(input, 8);
	args.offset = input_take(input, 1) % 12;
	args.size = (uint32_t)input_take(input, 2);
	if (choice & 0x40)
		args.offset = input_take(input, 8);
	if (header.opcode == FUSE_LOOKUP) {
		const char *name = names[input_take(input, 1) & 7];

		memcpy(to + size, name, strlen(name));
		size += (uint32_t)strlen(name) + 1;
	} else {
		memcpy(to + size, &args, sizeof(args));
		size += sizeof(args);
	}
	header.len = size;
	if ((choice & 0x38) == 0x38)
		header.len = (uint32_t)input_take(input, 1);
	memcpy(to, &header, sizeof(header));
	return size;
}

/* --- All of it --- */

void fuzz_begin(struct eng_answers *answers, struct input *input)
{
	static struct eng_store store;
	static struct eng_statistics statistics;
	static uint64_t listing[ENG_LISTING_SIZE / 8];
	static const uint8_t session[1] = { 1 };
	uint64_t num;

	grants_make();
	grants_fill();
	store_fill();
	for (num = input_take(input, 1) % 6; num > 2; num--) {
		struct value *value = &values[input_take(input, 1) % values_num];

		damage(input, value->at, value->size);
	}
	if (input_take(input, 1) % 16 == 0)
		damage(input, grants_memory + ROWS_END, 512);
	if (input_take(input, 1) % 16 == 0)
		damage(input, grants_memory + ROWS_AT, 32);
	memset(answers, 0, sizeof(*answers));
	answers->session = session;
	answers->statistics = &statistics;
	answers->listing = (uint8_t *)listing;
	answers->places.usage = &answers->usage;
	answers->usage.is_kept[ENG_USED_BLOB] = answers->usage.is_kept[ENG_USED_DIRECTORY] = 1;
	answers->store = answers->places.store = &store;
	eng_blob_fds_init(&answers->blobs, -1, 0, 1);
	if (eng_grants_init(&answers->places.grants, grants_fd))
		abort();
	answers->places.grants.is_by_content = input_take(input, 1) & 1;
}

void fuzz_end(struct eng_answers *answers)
{
	eng_grants_deinit(&answers->places.grants);
	store_empty();
}
