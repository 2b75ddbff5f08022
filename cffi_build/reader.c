/* Small files into a ring, each framed as an entry of a NAR. */
#define _GNU_SOURCE
#include "reader.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define OPEN_FLAGS (O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK)
#define DIRECTORY_FLAGS (O_PATH | O_DIRECTORY | O_CLOEXEC)
#define LENGTH_SIZE 8u
#define ALIGNMENT 8u
#define NAME_SIZE_MAX 255u

enum outcome { DONE, NO_ROOM, REFUSED };

static uint32_t padding(uint32_t size)
{
	return -size % ALIGNMENT;
}

static uint8_t *put(uint8_t *to, const void *bytes, uint32_t size)
{
	memcpy(to, bytes, size);
	return to + size;
}

static uint8_t *put_token(uint8_t *to, struct reader_token token)
{
	return put(to, token.bytes, token.size);
}

static uint8_t *put_padding(uint8_t *to, uint32_t size)
{
	memset(to, 0, padding(size));
	return to + padding(size);
}

static uint8_t *put_length(uint8_t *to, uint32_t size)
{
	for (unsigned i = 0; i < LENGTH_SIZE; i++)
		to[i] = i < sizeof(size) ? (uint8_t)(size >> 8 * i) : 0;
	return to + LENGTH_SIZE;
}

/* One byte more than there should be shows the end of the file without another read. */
static int read_exactly(int fd, uint8_t *to, uint32_t size)
{
	uint32_t num = 0;

	while (num <= size) {
		ssize_t more = read(fd, to + num, size + 1 - num);

		if (more < 0 && errno == EINTR)
			continue;
		if (more < 0)
			return 0;
		num += (uint32_t)more;
		if (more == 0 || num == size)
			break;
	}
	return num == size;
}

static int is_unchanged(int fd, const struct stat *before)
{
	struct stat now;

	return fstat(fd, &now) == 0 && now.st_size == before->st_size
		&& now.st_mtim.tv_sec == before->st_mtim.tv_sec
		&& now.st_mtim.tv_nsec == before->st_mtim.tv_nsec
		&& now.st_ctim.tv_sec == before->st_ctim.tv_sec
		&& now.st_ctim.tv_nsec == before->st_ctim.tv_nsec;
}

static enum outcome frame(struct reader *reader, int fd, const char *name, uint32_t name_size)
{
	struct reader_record *record = &reader->records[reader->records_num];
	struct stat before;

	if (fstat(fd, &before) || !S_ISREG(before.st_mode) || before.st_size > reader->file_max)
		return REFUSED;

	uint32_t size = (uint32_t)before.st_size;
	int executable = (before.st_mode & S_IXUSR) != 0;
	struct reader_token kind = executable ? reader->executable : reader->regular;
	uint32_t lead = reader->entry.size + LENGTH_SIZE + name_size + padding(name_size)
		+ reader->node.size + kind.size + LENGTH_SIZE;
	uint32_t frame_size = lead + size + padding(size) + reader->close.size;

	if (frame_size > reader->room)
		return NO_ROOM;

	uint8_t *to = put_token(reader->ring + reader->position, reader->entry);

	to = put_padding(put(put_length(to, name_size), name, name_size), name_size);
	to = put_length(put_token(put_token(to, reader->node), kind), size);
	if (!read_exactly(fd, to, size) || !is_unchanged(fd, &before))
		return REFUSED;
	put_token(put_padding(to + size, size), reader->close);

	*record = (struct reader_record){
		.kind = reader->kind,
		.executable = (uint8_t)executable,
		.lead = (uint16_t)lead,
		.offset = reader->position + lead,
		.size = size,
		.used = reader->skipped + frame_size,
		.file_size = size,
		.frame_size = frame_size,
	};
	reader->records_num++;
	reader->position += frame_size;
	reader->room -= frame_size;
	reader->skipped = 0;
	return DONE;
}

static enum outcome read_file(struct reader *reader, const char *name, size_t name_size)
{
	if (name_size == 0 || name_size > NAME_SIZE_MAX || reader->directory < 0)
		return REFUSED;

	int fd = reader_open(reader->directory, name, OPEN_FLAGS);

	if (fd < 0)
		return REFUSED;

	enum outcome outcome = frame(reader, fd, name, (uint32_t)name_size);

	close(fd);
	return outcome;
}

/* One that cannot be opened is seen by the file that is to be read there. */
static enum outcome enter(struct reader *reader, const char *path)
{
	if (path[0] == '/')
		return REFUSED;
	if (reader->directory >= 0)
		close(reader->directory);
	reader->directory = reader_open(reader->root, path, DIRECTORY_FLAGS);
	return DONE;
}

size_t reader_read(struct reader *reader, const char *requests, size_t size)
{
	const char *request = requests;
	const char *end;

	reader->records_num = 0;
	reader->is_refused = 0;
	while (reader->records_num < reader->records_max
	       && (end = memchr(request, 0, size - (size_t)(request - requests)))) {
		enum outcome outcome = request[0] == '/'
			? enter(reader, request + 1)
			: read_file(reader, request, (size_t)(end - request));

		reader->is_refused = outcome == REFUSED;
		if (outcome != DONE)
			break;
		request = end + 1;
	}
	return (size_t)(request - requests);
}
