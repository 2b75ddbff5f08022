/*
 * A store, grants and requests for the fuzzers of the answers.
 *
 * The store is this file's: it takes the place of lmdb_reader.c. Each value is allocated by itself, so
 * a byte too far is ASan's.
 */
#define _GNU_SOURCE
#include "fuzz_store.h"
#include "images.h"
#include "statistics.h"
#include "usage.h"

#include <fcntl.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
	VALUES = 10,
	DIRECTORIES = 3,
	ROWS_AT = 4096,
	ROWS_END = ROWS_AT + (1 << 25),
	GRANTS_SIZE = ROWS_END + 65536,
	GENERATION = 7,
	CONTENT_SIZE = 100,
	FILE_SIZE = 120,		/* of the blobs that are kept in files */
	OPEN_FILES_AT = 56,
	FUZZ_FILE = 0xb2,		/* and the number of its directory: the digest of a blob in a file */
	FILE_NAME_SIZE = 80,
};

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
	size += put_node(encoded + size, 2, "big", (uint8_t)(FUZZ_FILE + number), FILE_SIZE);
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
	static const uint8_t in_file[9] = { 1, FILE_SIZE };
	uint8_t content[1 + CONTENT_SIZE] = { 0 };

	values_num = 0;
	put_directory(1, 2, 10);
	put_directory(2, 3, 4);
	put_directory(3, 0, 0);
	for (uint8_t number = 1; number <= DIRECTORIES; number++)
		store_put(ENG_BLOBS, 0, (uint8_t)(FUZZ_FILE + number), in_file, sizeof(in_file));
	store_put(ENG_BLOBS, 0, 0xb1, content, sizeof(content));
	store_put(ENG_BLOBS, 0, 0xb2, content, 1 + CONTENT_SIZE / 2);
}

static void store_empty(void)
{
	for (uint32_t i = 0; i < values_num; i++)
		free(values[i].at);
}

/* --- Blobs in files; those of an input are made anew, each as it should be, of another size or not at all --- */

static char top_name[] = "fuzz_blobs.XXXXXX";
static int top = -1;

static void file_name(char *to, uint32_t number)
{
	to += sprintf(to, "blobs/%02x/", FUZZ_FILE + number);
	for (uint32_t i = 0; i < ENG_DIGEST_SIZE; i++)
		to += sprintf(to, "%02x", FUZZ_FILE + number);
}

static void files_remove(void)
{
	char name[FILE_NAME_SIZE];

	for (uint32_t number = 1; number <= DIRECTORIES; number++) {
		file_name(name, number);
		(void)unlinkat(top, name, 0);
		name[8] = 0;
		(void)unlinkat(top, name, AT_REMOVEDIR);
	}
	(void)unlinkat(top, "blobs", AT_REMOVEDIR);
	(void)rmdir(top_name);
}

static void files_make(struct input *input)
{
	static const uint8_t content[FILE_SIZE];
	char name[FILE_NAME_SIZE];

	if (top < 0) {
		MUST(mkdtemp(top_name));
		top = open(top_name, O_PATH | O_DIRECTORY | O_CLOEXEC);
		MUST(top >= 0 && !atexit(files_remove) && !mkdirat(top, "blobs", 0700));
	}
	for (uint32_t number = 1; number <= DIRECTORIES; number++) {
		uint64_t choice = input_take(input, 1);
		size_t size = choice % 8 == 1 ? (size_t)choice / 4 : FILE_SIZE;
		int fd;

		file_name(name, number);
		(void)unlinkat(top, name, 0);
		if (choice % 8 == 0)
			continue;
		name[8] = 0;
		(void)mkdirat(top, name, 0700);
		name[8] = '/';
		fd = openat(top, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
		MUST(fd >= 0 && write(fd, content, size) == (ssize_t)size);
		(void)close(fd);
	}
}

void fuzz_shrink(void)
{
	char name[FILE_NAME_SIZE];

	for (uint32_t number = 1; number <= DIRECTORIES; number++) {
		int fd;

		file_name(name, number);
		fd = openat(top, name, O_WRONLY | O_CLOEXEC);
		if (fd < 0)
			continue;
		MUST(!ftruncate(fd, FILE_SIZE / 4));
		(void)close(fd);
	}
}

/* The cache has more entries than can be reported at once. */
static void use_all(struct eng_usage *usage)
{
	for (uint32_t i = 0; i <= ENG_USED_MAX; i++) {
		uint8_t digest[ENG_DIGEST_SIZE] = { (uint8_t)i, (uint8_t)(i >> 8) };

		usage_note(usage, ENG_USED_BLOB, digest, 0, 0);
		usage_note(usage, ENG_USED_DIRECTORY, digest, 0, 0);
	}
	MUST(usage->num == ENG_USED_MAX && eng_usage_is_due(usage, 0));
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
	static const uint64_t row[4] = { 2, 16, ROWS_END };
	struct fuse_direntplus record = { .dirent = { .namelen = 4 } };
	uint32_t kind = 'd';
	uint64_t size = 15;

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

/* A node that the request is meant for, most often; their numbers follow from store_fill(). */
static uint64_t node_for(uint32_t opcode, uint64_t choice)
{
	static const uint8_t directories[4] = { 2, 5, 8, 1 };
	static const uint8_t files[8] = { 3, 4, 6, 7, 9, 10, 11, 16 };
	static const uint8_t links[4] = { 12, 14, 17, 17 };

	switch (opcode) {
	case FUSE_LOOKUP: case FUSE_READDIR: case FUSE_READDIRPLUS:
		return directories[choice % 4];
	case FUSE_READ:
		return files[choice % 8];
	case FUSE_READLINK:
		return links[choice % 4];
	default:
		return choice % 21;
	}
}

uint32_t request_make(struct input *input, uint8_t *to)
{
	static const uint32_t opcodes[8] = {
		FUSE_LOOKUP, FUSE_LOOKUP, FUSE_GETATTR, FUSE_READLINK,
		FUSE_READ, FUSE_READDIR, FUSE_READDIRPLUS, FUSE_FORGET,
	};
	static const char *const names[16] = {
		"a", "dir", "file", "link", "", "..", "path", "zz",
		"big", "dir", "dir", "file", ".", "a/b", "path", "d",
	};
	struct fuse_in_header header = { .unique = 1 };
	uint64_t choice = input_take(input, 1);
	uint64_t odd = input_take(input, 1) % 16;
	struct fuse_read_in args = { 0 };
	uint32_t size = sizeof(header);

	memset(to, 0, FUZZ_REQUEST_SIZE);
	header.opcode = odd == 3 ? (uint32_t)choice : opcodes[choice & 7];
	header.nodeid = odd == 0 ? input_take(input, 8) : node_for(header.opcode, choice >> 3);
	args.offset = odd == 1 ? input_take(input, 8) : input_take(input, 1) % 12;
	args.size = (uint32_t)input_take(input, 2);
	if (header.opcode == FUSE_LOOKUP) {
		const char *name = names[input_take(input, 1) & 15];

		memcpy(to + size, name, strlen(name));
		size += (uint32_t)strlen(name) + 1;
	} else {
		memcpy(to + size, &args, sizeof(args));
		size += sizeof(args);
	}
	header.len = size;
	if (odd == 2)
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

	files_make(input);
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
	answers->usage = (struct eng_usage){ .is_kept = { 1, 1 }, .shift = 12, .every_ns = 1u << 30 };
	answers->store = answers->places.store = &store;
	num = input_take(input, 1);
	eng_blob_fds_init(&answers->blobs, top, 0, 1 + (num >> 1 & 3));
	put_u64(OPEN_FILES_AT, num >> 3 & 3);
	if (num & 0x80)
		eng_usage_clear(&answers->usage, statistics_now_ns());
	if (num == 0xff)
		use_all(&answers->usage);
	if (eng_grants_init(&answers->places.grants, grants_fd))
		abort();
	answers->places.grants.is_by_content = input_take(input, 1) & 1;
}

void fuzz_end(struct eng_answers *answers)
{
	char name[FILE_NAME_SIZE];

	file_name(name, 2);
	(void)unlinkat(top, name, 0);
	eng_blob_fds_close_unlinked(&answers->blobs);
	eng_blob_fds_close(&answers->blobs);
	MUST(!answers->blobs.num);
	eng_grants_deinit(&answers->places.grants);
	store_empty();
}
