/*
 * What an import needs of the file system and Python does not offer.
 *
 * Whoever can write to a tree may exchange its directories for symlinks at any moment, so no path below
 * the root of an import is resolved by the ordinary rules: openat2(2) refuses symlinks and everything
 * that leads out of the directory it begins at.
 */
#define _GNU_SOURCE
#include "reader.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Bytes of a path that are resolved at once; PATH_MAX is 4096 with the final NUL. */
#define STEP_MAX 4000u
#define STEP_FLAGS (O_PATH | O_DIRECTORY | O_CLOEXEC)
#define BLOCK_SIZE 4096u

static int open_step(int directory, const char *path, int flags)
{
	struct open_how how = {
		.flags = (unsigned int)flags,
		.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS,
	};
	long fd;

	do
		fd = syscall(SYS_openat2, directory, path, &how, sizeof(how));
	while (fd < 0 && (errno == EINTR || errno == EAGAIN));
	return fd < 0 ? -errno : (int)fd;
}

/* Opens the directory that the first `size` bytes of `path` name. */
static int open_part(int directory, const char *path, size_t size)
{
	char part[STEP_MAX + 1];

	memcpy(part, path, size);
	part[size] = 0;
	return open_step(directory, part, STEP_FLAGS);
}

int reader_open(int root, const char *path, int flags)
{
	size_t left = strlen(path);
	int directory = root;

	while (left > STEP_MAX) {
		const char *slash = memrchr(path, '/', STEP_MAX);
		size_t size = slash ? (size_t)(slash - path) : 0;
		int next = slash ? open_part(directory, path, size) : -ENAMETOOLONG;

		if (directory != root)
			close(directory);
		if (next < 0)
			return next;
		directory = next;
		path += size + 1;
		left -= size + 1;
	}

	int fd = open_step(directory, left ? path : ".", flags);

	if (directory != root)
		close(directory);
	return fd;
}

static char kind_letter(unsigned char type)
{
	switch (type) {
	case DT_REG:
		return READER_FILE;
	case DT_DIR:
		return READER_DIRECTORY;
	case DT_LNK:
		return READER_SYMLINK;
	default:
		return READER_OTHER;
	}
}

/* "." and "..", which every directory has. */
static int is_dots(const char *name)
{
	return name[0] == '.' && (name[1] == 0 || (name[1] == '.' && name[2] == 0));
}

int reader_list(int directory, char *to, size_t size)
{
	size_t num = 0;

	/* Until there is an entry to tell: "." and ".." may come alone. */
	while (num == 0) {
		ssize_t got = getdents64(directory, to, size);

		if (got < 0)
			return -errno;
		if (got == 0)
			break;
		/* A record is longer than what is made of it, which goes over those before it. */
		for (size_t at = 0; at < (size_t)got;) {
			struct dirent64 entry;
			size_t head = offsetof(struct dirent64, d_name);

			memcpy(&entry, to + at, head);

			const char *name = to + at + head;
			size_t name_size = strnlen(name, entry.d_reclen - head);

			at += entry.d_reclen;
			if (is_dots(name))
				continue;
			memmove(to + num, name, name_size);
			num += name_size;
			to[num++] = 0;
			to[num++] = kind_letter(entry.d_type);
			to[num++] = '/';
		}
	}
	return (int)num;
}

static int is_zero(const uint8_t *data, size_t size)
{
	return data[0] == 0 && memcmp(data, data + 1, size - 1) == 0;
}

static int write_all(int fd, const uint8_t *data, size_t size, uint64_t offset)
{
	while (size) {
		ssize_t num = pwrite(fd, data, size, (off_t)offset);

		if (num < 0 && errno == EINTR)
			continue;
		if (num < 0)
			return -errno;
		data += num;
		size -= (size_t)num;
		offset += (uint64_t)num;
	}
	return 0;
}

int reader_write_sparse(int fd, const uint8_t *data, size_t size, uint64_t offset)
{
	size_t start = 0; /* of the blocks to be written next */

	for (size_t at = 0; at < size;) {
		size_t block = size - at < BLOCK_SIZE ? size - at : BLOCK_SIZE;

		if (is_zero(data + at, block)) {
			int status = write_all(fd, data + start, at - start, offset + start);

			if (status)
				return status;
			start = at + block;
		}
		at += block;
	}
	return write_all(fd, data + start, size - start, offset + start);
}
