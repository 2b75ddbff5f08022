// What a test makes a guest do to a mounted tree beyond reading it whole (that is probe.c).
//
//   acts change DIR                      tries every way to change DIR, which has a file "file", an
//                                        empty directory "empty" and a symlink "link"; writes
//                                        "WAY ERRNO" for each, ERRNO 0 if it went through
//   acts pieces MODE FILE SIZE OFFSET... writes the SIZE bytes at each OFFSET, fewer at the end of
//                                        the file. MODE: read, mmap or direct; then both numbers
//                                        are multiples of 4096

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

enum { ALIGNMENT = 4096 };

// --- ways to change a tree; each is run in it and returns 0 or -1 with errno ---------------------

// Opens "file" for writing, does `act` to it and keeps the first error.
static int with_open_file(int flags, int (*act)(int fd))
{
	int fd = open("file", flags | O_CLOEXEC);

	if (fd < 0)
		return -1;
	int result = act(fd), error = errno;
	close(fd);
	errno = error;
	return result;
}

static int act_nothing(int fd)
{
	(void)fd;
	return 0;
}

static int act_write(int fd)
{
	return pwrite(fd, "changed", 7, 0) < 0 ? -1 : 0;
}

static int act_truncate(int fd)
{
	return ftruncate(fd, 1);
}

static int act_allocate(int fd)
{
	return fallocate(fd, 0, 0, 1 << 20);
}

static int act_copy(int fd)
{
	int source_fd = open("file", O_RDONLY | O_CLOEXEC);
	loff_t from = 0, to = 100;

	if (source_fd < 0)
		return -1;
	ssize_t done = copy_file_range(source_fd, &from, fd, &to, 4, 0);
	int error = errno;
	close(source_fd);
	errno = error;
	return done < 0 ? -1 : 0;
}

static int way_create(void)
{
	int fd = open("new", O_CREAT | O_WRONLY | O_CLOEXEC, 0644);

	return fd < 0 ? -1 : close(fd);
}

static int way_write(void)
{
	return with_open_file(O_WRONLY, act_write);
}

static int way_append(void)
{
	return with_open_file(O_WRONLY | O_APPEND, act_write);
}

static int way_write_sync(void)
{
	return with_open_file(O_WRONLY | O_SYNC, act_write);
}

static int way_open_truncate(void)
{
	return with_open_file(O_WRONLY | O_TRUNC, act_nothing);
}

static int way_ftruncate(void)
{
	return with_open_file(O_RDWR, act_truncate);
}

static int way_fallocate(void)
{
	return with_open_file(O_RDWR, act_allocate);
}

static int way_copy(void)
{
	return with_open_file(O_WRONLY, act_copy);
}

static int way_truncate(void)
{
	return truncate("file", 0);
}

static int way_mkdir(void)
{
	return mkdir("new", 0755);
}

static int way_mkfifo(void)
{
	return mkfifo("new", 0644);
}

static int way_symlink(void)
{
	return symlink("target", "new");
}

static int way_link(void)
{
	return link("file", "new");
}

static int way_unlink(void)
{
	return unlink("file");
}

static int way_unlink_symlink(void)
{
	return unlink("link");
}

static int way_rmdir(void)
{
	return rmdir("empty");
}

static int way_rename(void)
{
	return rename("file", "new");
}

static int way_exchange(void)
{
	return renameat2(AT_FDCWD, "file", AT_FDCWD, "link", RENAME_EXCHANGE);
}

static int way_chmod(void)
{
	return chmod("file", 0777);
}

static int way_chown(void)
{
	return lchown("link", 1, 1);
}

static int way_utimes(void)
{
	return utimensat(AT_FDCWD, "empty", NULL, 0);
}

static int way_setxattr(void)
{
	return setxattr("file", "user.new", "value", 5, 0);
}

static int way_removexattr(void)
{
	return removexattr("file", "user.new");
}

static const struct {
	const char *name;
	int (*run)(void);
} ways[] = {
	{ "create", way_create },
	{ "write", way_write },
	{ "append", way_append },
	{ "write-sync", way_write_sync },
	{ "open-truncate", way_open_truncate },
	{ "ftruncate", way_ftruncate },
	{ "fallocate", way_fallocate },
	{ "copy", way_copy },
	{ "truncate", way_truncate },
	{ "mkdir", way_mkdir },
	{ "mkfifo", way_mkfifo },
	{ "symlink", way_symlink },
	{ "link", way_link },
	{ "unlink", way_unlink },
	{ "unlink-symlink", way_unlink_symlink },
	{ "rmdir", way_rmdir },
	{ "rename", way_rename },
	{ "exchange", way_exchange },
	{ "chmod", way_chmod },
	{ "chown", way_chown },
	{ "utimes", way_utimes },
	{ "setxattr", way_setxattr },
	{ "removexattr", way_removexattr },
};

static int change(const char *directory)
{
	if (chdir(directory)) {
		perror(directory);
		return 2;
	}
	for (size_t i = 0; i < sizeof(ways) / sizeof(*ways); i++)
		printf("%s %d\n", ways[i].name, ways[i].run() ? errno : 0);
	return 0;
}

// --- pieces of a file ----------------------------------------------------------------------------

static ssize_t map_piece(int fd, char *buffer, size_t size, off_t offset)
{
	struct stat stat;

	if (fstat(fd, &stat) || offset >= stat.st_size)
		return -1;
	if ((off_t)size > stat.st_size - offset)
		size = (size_t)(stat.st_size - offset);
	char *memory = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, offset);
	if (memory == MAP_FAILED)
		return -1;
	memcpy(buffer, memory, size);
	munmap(memory, size);
	return (ssize_t)size;
}

static int write_pieces(const char *mode, const char *path, size_t size, char **offsets)
{
	bool is_mapped = strcmp(mode, "mmap") == 0, is_direct = strcmp(mode, "direct") == 0;
	int fd = open(path, O_RDONLY | O_CLOEXEC | (is_direct ? O_DIRECT : 0));
	char *buffer = aligned_alloc(ALIGNMENT, size);

	if (fd < 0 || !buffer) {
		perror(path);
		return 2;
	}
	for (; *offsets; offsets++) {
		off_t offset = strtoll(*offsets, NULL, 10);
		ssize_t done = is_mapped ? map_piece(fd, buffer, size, offset)
					 : pread(fd, buffer, size, offset);

		if (done < 0) {
			perror(path);
			return 1;
		}
		fwrite(buffer, 1, (size_t)done, stdout);
	}
	return fflush(stdout) ? 1 : 0;
}

int main(int argc, char **argv)
{
	const char *command = argc > 1 ? argv[1] : "";

	if (argc == 3 && strcmp(command, "change") == 0)
		return change(argv[2]);
	if (argc > 5 && strcmp(command, "pieces") == 0)
		return write_pieces(argv[2], argv[3], strtoul(argv[4], NULL, 10), argv + 5);
	fputs("usage: acts change DIR\n       acts pieces MODE FILE SIZE OFFSET...\n", stderr);
	return 2;
}
