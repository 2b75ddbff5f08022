/*
 * The reader of an import, over a directory of its own that changes meanwhile: whatever is asked for, frames
 * stay within the ring, and each has the content of its file.
 *
 * Input: room and records, then requests from a small vocabulary, and what changes between them.
 */
#define _GNU_SOURCE
#include "fuzz.h"
#include "reader.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

const size_t fuzz_input_size = 128;

enum { BLOCK = 4096, LIST_SIZE = 32768, LONG = 4200, FILE_SIZE_MAX = 3000 };

static char top_name[] = "fuzz_files.XXXXXX";
static int top = -1;
static unsigned long frames, refused, listed, written;

/* --- The directory --- */

static void remove_all(void)
{
	static const char *const names[] = { "d/x", "d/a", "d", "a", "b", "c", "link", "pipe", "out" };

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		if (unlinkat(top, names[i], 0) && errno == EISDIR)
			(void)unlinkat(top, names[i], AT_REMOVEDIR);
	(void)rmdir(top_name);
}

/* A file whose bytes are all the first letter of its name. */
static void put_file(const char *path, char letter, size_t size, mode_t mode)
{
	uint8_t content[FILE_SIZE_MAX];
	int fd = openat(top, path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, mode);

	MUST(fd >= 0 && size <= sizeof(content));
	memset(content, letter, size);
	MUST(write(fd, content, size) == (ssize_t)size);
	(void)close(fd);
}

static void make_once(void)
{
	if (top >= 0)
		return;
	MUST(mkdtemp(top_name));
	top = open(top_name, O_PATH | O_DIRECTORY | O_CLOEXEC);
	MUST(top >= 0 && !atexit(remove_all));
	MUST(!mkdirat(top, "d", 0700) && !mkfifoat(top, "pipe", 0600));
	MUST(!symlinkat("a", top, "link") && !symlinkat("/etc", top, "out"));
}

static void make_files(struct input *input)
{
	put_file("a", 'a', (size_t)input_take(input, 2) % FILE_SIZE_MAX, 0600);
	put_file("b", 'b', (size_t)input_take(input, 1) % 40, 0700);
	put_file("c", 'c', 0, 0600);
	put_file("d/x", 'x', (size_t)input_take(input, 1), 0600);
	put_file("d/a", 'a', 8, 0600);
}

/* --- Reading --- */

static size_t put_requests(struct input *input, char *to)
{
	static const char *const words[16] = {
		"a", "b", "c", "x", "/d", "/", "/.", "//", "..", "/..", "link", "pipe", "none", "/out",
		"d", "",
	};
	size_t size = 0;
	uint64_t num = 1 + input_take(input, 1) % 10;

	/* Names are in a directory that came before them. */
	if (num % 8) {
		memcpy(to, "/", 2);
		size = 2;
	}

	while (num--) {
		uint64_t choice = input_take(input, 1);
		const char *word = words[choice % 16];

		memcpy(to + size, word, strlen(word) + 1);
		size += strlen(word) + (choice < 0xf0 ? 1 : 0);
	}
	return size;
}

static void check_frame(const struct reader *reader, const struct reader_record *record,
			uint32_t position)
{
	const uint8_t *content = reader->ring + record->offset;

	MUST(record->kind == reader->kind && record->lead < record->frame_size);
	MUST(record->offset == position + record->lead && record->used >= record->frame_size);
	MUST(record->size <= record->frame_size - record->lead && record->file_size == record->size);
	for (uint32_t i = 1; i < record->size; i++)
		MUST(content[i] == content[0]);
	MUST(!record->size || (content[0] == 'a' || content[0] == 'b' || content[0] == 'x'));
	MUST(record->executable == (record->size && content[0] == 'b') || !record->size);
}

static void fuzz_reader(struct input *input)
{
	static const uint8_t token[32] = "eight by";
	uint32_t skipped = (uint32_t)input_take(input, 1) % 16;
	uint32_t room = (uint32_t)input_take(input, 2) % 4096;
	uint32_t records_max = (uint32_t)input_take(input, 1) % 8;
	char requests[256];
	size_t size = put_requests(input, requests);
	struct reader_token some = { token, 8 * (uint32_t)(1 + input_take(input, 1) % 4) };
	struct reader reader = {
		.entry = some, .node = some, .regular = some, .executable = some, .close = some,
		.kind = 7, .file_max = 2000, .root = top, .directory = -1,
		.position = skipped, .room = room, .skipped = skipped, .records_max = records_max,
	};
	uint32_t position = reader.position;
	size_t done;

	/* Most often, a few bytes more or less than some frame takes; a name takes 8 bytes. */
	if (room % 4)
		reader.room = room = 4 * some.size + 24 + 8 * (room % 8) + room / 64 % 17;

	/* All of them allocated exactly, so that a byte too far is ASan's. */
	reader.ring = take_memory(room + skipped);
	reader.records = take_memory(records_max * sizeof(*reader.records));
	done = reader_read(&reader, requests, size);
	MUST(done <= size && reader.records_num <= records_max);
	for (uint32_t i = 0; i < reader.records_num; i++) {
		check_frame(&reader, &reader.records[i], position);
		MUST(reader.records[i].used == reader.records[i].frame_size + (i ? 0 : skipped));
		position += reader.records[i].frame_size;
	}
	MUST(position == reader.position && reader.room == room + skipped - position);
	frames += reader.records_num;
	refused += reader.is_refused;
	if (reader.directory >= 0)
		(void)close(reader.directory);
	free(reader.ring);
	free(reader.records);
}

/* --- Opening, listing, writing --- */

static void fuzz_open(struct input *input)
{
	char path[2 * LONG] = "";
	size_t size = (size_t)input_take(input, 1) % 64 == 0 ? LONG : (size_t)input_take(input, 1) % 32;
	uint64_t choice = input_take(input, 1);
	int fd;

	while (strlen(path) < size)
		strcat(path, choice & 1 ? "./" : "d/../");
	if (choice & 2)
		memset(path, 'n', size);
	strcat(path, choice & 4 ? "d" : choice & 8 ? "link" : choice & 16 ? "../.." : "a");
	fd = reader_open(top, path, O_PATH | O_CLOEXEC);
	if (choice & 16 && !(choice & 14))
		MUST(fd < 0);
	if (fd >= 0)
		(void)close(fd);
}

static void fuzz_list(void)
{
	int fd = reader_open(top, "", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	char *to = take_memory(LIST_SIZE);
	unsigned num = 0;
	int size;

	MUST(fd >= 0);
	while ((size = reader_list(fd, to, LIST_SIZE)) > 0) {
		for (char *at = to; at < to + size; num++) {
			at += strlen(at) + 1;
			MUST(strchr("fdlo", *at) && at[1] == '/');
			at += 2;
		}
	}
	MUST(!size && num == 7);
	listed += num;
	(void)close(fd);
	MUST(reader_list(top, to, LIST_SIZE) == -EBADF);
	free(to);
}

/* How many blocks are not all zeros. */
static int64_t blocks_of(const uint8_t *bytes, size_t size)
{
	int64_t num = 0;

	for (size_t at = 0; at < size; at += BLOCK) {
		int is_data = 0;

		for (size_t i = at; i < size && i < at + BLOCK; i++)
			is_data |= bytes[i];
		num += is_data != 0;
	}
	return num;
}

static void fuzz_sparse(struct input *input)
{
	size_t size = (size_t)input_take(input, 2) % (4 * BLOCK);
	uint64_t offset = BLOCK * (input_take(input, 1) % 4);
	uint64_t zeros = input_take(input, 1);
	uint8_t *bytes = take_memory(size), *back = take_memory(size);
	int fd = memfd_create("sparse", MFD_CLOEXEC);
	struct stat status;

	for (size_t i = 0; i < size; i++)
		bytes[i] = zeros >> i / BLOCK & 1 ? 0 : (uint8_t)(i | 1);
	if (size && zeros & 0x80)
		bytes[size / 2] = 1;
	MUST(fd >= 0 && !ftruncate(fd, (off_t)(offset + size)));
	MUST(!reader_write_sparse(fd, bytes, size, offset));
	MUST(pread(fd, back, size, (off_t)offset) == (ssize_t)size && !memcmp(bytes, back, size));
	MUST(!fstat(fd, &status) && status.st_blocks == 8 * blocks_of(bytes, size));
	if (size && zeros & 0x80)
		MUST(reader_write_sparse(-1, bytes, size, offset) == -EBADF);
	(void)close(fd);
	free(bytes);
	free(back);
	written += size;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = { .data = data, .left = size };

	make_once();
	make_files(&input);
	while (input.left > 8) {
		fuzz_reader(&input);
		fuzz_open(&input);
		fuzz_sparse(&input);
	}
	fuzz_list();
	return 0;
}

int fuzz_report(unsigned long count)
{
	printf("%lu inputs, %lu frames, %lu refused, %lu entries listed, %lu bytes written\n", count, frames,
	       refused, listed, written);
	return frames && refused && listed && written ? 0 : 1;
}
