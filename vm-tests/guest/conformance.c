// What POSIX promises of a read-only file system, checked on a mount of a known tree.
//
//   conformance make DIR     makes the tree at DIR, which must not be there yet
//   conformance check DIR    checks the tree at DIR, mounted read-only; run it as root
//
// One line per check, "ok NAME" or "FAILED NAME" behind the line of what was wanted. Status 0 if all
// are ok. Nothing is expected to be there but the kernel: this runs in guests, too.

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "conformance.h"

#define FUSE_SUPER_MAGIC 0x65735546

// The call must fail with `code`.
#define REFUSED(call, code) (errno = 0, WANT((call) == -1 && errno == (code)))

static jmp_buf failed;

void fail(const char *expression, int line)
{
	printf("FAILED: %s at line %d (errno %d)\n", expression, line, errno);
	longjmp(failed, 1);
}

// Each check starts in the tree's directory.

static struct stat status_of(const char *name)
{
	struct stat stat;

	WANT(lstat(name, &stat) == 0);
	return stat;
}

static void check_attributes(void)
{
	dev_t device = status_of(".").st_dev;
	static const char *const names[] = { ".", "sizes", "hollow", "many", "run", "program", "link",
					     "dangling", "sizes/0", "sizes/513", "here/same" };

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
		struct stat stat = status_of(names[i]);

		WANT(stat.st_dev == device && stat.st_ino != 0 && stat.st_nlink > 0);
		WANT(stat.st_uid == 0 && stat.st_gid == 0);
		WANT(stat.st_mtime == 1 && stat.st_atime == 1 && stat.st_ctime == 1);
		WANT(stat.st_blksize > 0);
		WANT(stat.st_blocks == (stat.st_size + 511) / 512);
	}
	WANT(status_of("hollow").st_mode == (S_IFDIR | 0555));
	WANT(status_of("sizes/513").st_mode == (S_IFREG | 0444));
	WANT(status_of("run").st_mode == (S_IFREG | 0555));
	WANT(S_ISLNK(status_of("link").st_mode) && status_of("link").st_size == 9);
	WANT(status_of("hollow").st_size == status_of("many").st_size);
	for (size_t i = 0; i < NUM_SIZES; i++)
		WANT(status_of(sized_name(sizes[i])).st_size == (off_t)sizes[i]);
}

static void check_identity(void)
{
	static const char *const equal[][2] = { { "many/entry-0000", "many/entry-0999" },
						{ "many/entry-0000", "sizes/1" },
						{ "link", "link2" },
						{ "here", "there" },
						{ "here/same/inner", "there/same/inner" } };

	for (size_t i = 0; i < sizeof(equal) / sizeof(equal[0]); i++)
		WANT(status_of(equal[i][0]).st_ino != status_of(equal[i][1]).st_ino);
	WANT(status_of("run").st_ino != status_of("sizes/1").st_ino); // the executable bit is kept
	WANT(status_of("here").st_ino != status_of("hollow").st_ino);
	WANT(status_of("here/same/..").st_ino == status_of("here").st_ino);
}

static void check_content_of(size_t size)
{
	int fd = open(sized_name(size), O_RDONLY | O_CLOEXEC);
	unsigned char *bytes = malloc(size + 100);

	WANT(fd >= 0 && bytes);
	WANT(pread(fd, bytes, size + 100, 0) == (ssize_t)size);
	for (size_t i = 0; i < size; i++)
		WANT(bytes[i] == byte_at(size, i));
	for (size_t at = 0; at < size; at += size / 7 + 1) {
		WANT(pread(fd, bytes, 1, (off_t)at) == 1 && bytes[0] == byte_at(size, at));
		WANT(pread(fd, bytes, size + 100, (off_t)at) == (ssize_t)(size - at));
		WANT(bytes[size - at - 1] == byte_at(size, size - 1));
	}
	WANT(pread(fd, bytes, 1, (off_t)size) == 0 && pread(fd, bytes, 1, (off_t)size + 9999) == 0);
	WANT(lseek(fd, 0, SEEK_END) == (off_t)size && lseek(fd, -1, SEEK_SET) == -1);
	if (size) {
		WANT(lseek(fd, 0, SEEK_DATA) == 0 && lseek(fd, 0, SEEK_HOLE) == (off_t)size);
		REFUSED(lseek(fd, (off_t)size, SEEK_DATA), ENXIO);
	}
	WANT(close(fd) == 0);
	free(bytes);
}

static void check_reading(void)
{
	for (size_t i = 0; i < NUM_SIZES; i++)
		check_content_of(sizes[i]);
	int fd = open(sized_name(300000), O_RDONLY | O_CLOEXEC);
	unsigned char first[10], second[4090];
	void *volatile nowhere = (void *)1;
	struct iovec vector[] = { { first, sizeof(first) }, { second, sizeof(second) } };

	WANT(preadv(fd, vector, 2, 70001) == 4100 && second[4089] == byte_at(300000, 74100));
	REFUSED(read(fd, nowhere, 100), EFAULT);
	WANT(posix_fadvise(fd, 0, 0, POSIX_FADV_WILLNEED) == 0 && fsync(fd) == 0);
	WANT(close(fd) == 0);
}

static void check_mapping(void)
{
	for (size_t i = 1; i < NUM_SIZES; i++) {
		size_t size = sizes[i], page = (size_t)sysconf(_SC_PAGESIZE);
		size_t end = (size + page - 1) / page * page;
		int fd = open(sized_name(size), O_RDONLY | O_CLOEXEC);
		unsigned char *bytes = mmap(NULL, end, PROT_READ, MAP_SHARED, fd, 0);

		WANT(bytes != MAP_FAILED && close(fd) == 0);
		for (size_t at = 0; at < end; at++) // zeros behind the end of the file
			WANT(bytes[at] == (at < size ? byte_at(size, at) : 0));
		REFUSED(mprotect(bytes, end, PROT_READ | PROT_WRITE), EACCES);
		WANT(munmap(bytes, end) == 0);
		fd = open(sized_name(size), O_RDONLY | O_CLOEXEC);
		bytes = mmap(NULL, end, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
		WANT(bytes != MAP_FAILED);
		bytes[0] = (unsigned char)~bytes[0];
		WANT(pread(fd, &bytes[1], 1, 0) == 1 && bytes[1] == byte_at(size, 0));
		WANT(munmap(bytes, end) == 0 && close(fd) == 0);
	}
}

static void check_direct_and_sendfile(void)
{
	int fd = open(sized_name(300000), O_RDONLY | O_DIRECT | O_CLOEXEC);
	int out = memfd_create("copy", MFD_CLOEXEC);
	unsigned char *bytes = aligned_alloc(4096, 303104);

	WANT(fd >= 0 && out >= 0 && bytes);
	WANT(pread(fd, bytes, 303104, 0) == 300000 && bytes[299999] == byte_at(300000, 299999));
	WANT(pread(fd, bytes, 4096, 8192) == 4096 && bytes[5] == byte_at(300000, 8197));
	WANT(close(fd) == 0);
	fd = open(sized_name(300000), O_RDONLY | O_CLOEXEC);
	for (ssize_t done, left = 300000; left; left -= done)
		WANT((done = sendfile(out, fd, NULL, (size_t)left)) > 0);
	WANT(pread(out, bytes, 303104, 0) == 300000);
	for (size_t at = 0; at < 300000; at++)
		WANT(bytes[at] == byte_at(300000, at));
	WANT(close(fd) == 0 && close(out) == 0);
	free(bytes);
}

static void check_listing(void)
{
	DIR *many = opendir("many");
	struct dirent *entry;
	long marks[MANY];
	char name[32];

	WANT(many && (entry = readdir(many)) && strcmp(entry->d_name, ".") == 0);
	WANT(entry->d_ino == status_of("many").st_ino && entry->d_type == DT_DIR);
	WANT((entry = readdir(many)) && strcmp(entry->d_name, "..") == 0);
	for (int i = 0; i < MANY; i++) { // sorted, each once
		marks[i] = telldir(many);
		snprintf(name, sizeof(name), "many/entry-%04d", i);
		WANT((entry = readdir(many)) && strcmp(entry->d_name, name + 5) == 0);
		WANT(entry->d_type == DT_REG && entry->d_ino == status_of(name).st_ino);
	}
	errno = 0;
	WANT(!readdir(many) && errno == 0);
	for (int i = MANY - 1; i >= 0; i -= 37) {
		seekdir(many, marks[i]);
		snprintf(name, sizeof(name), "entry-%04d", i);
		WANT((entry = readdir(many)) && strcmp(entry->d_name, name) == 0);
	}
	rewinddir(many);
	WANT((entry = readdir(many)) && strcmp(entry->d_name, ".") == 0);
	WANT(closedir(many) == 0);
}

static void check_types_in_listing(void)
{
	DIR *here = opendir(".");
	struct dirent *entry;
	int count = 0;

	for (; (entry = readdir(here)); count++) {
		struct stat stat = status_of(entry->d_name);

		WANT(entry->d_type == (stat.st_mode & S_IFMT) >> 12);
		WANT(entry->d_ino == stat.st_ino);
	}
	WANT(count == 2 + 14 && closedir(here) == 0);
	here = opendir("hollow");
	WANT(readdir(here) && readdir(here) && !readdir(here) && closedir(here) == 0);
}

static void check_symlinks(void)
{
	char target[100];
	struct stat through;

	WANT(readlink("link", target, sizeof(target)) == 9 && memcmp(target, "sizes/513", 9) == 0);
	WANT(readlink("link", target, 4) == 4);
	WANT(readlink("dangling", target, sizeof(target)) == 14);
	WANT(stat("link", &through) == 0 && through.st_ino == status_of("sizes/513").st_ino);
	WANT(stat("dirlink/513", &through) == 0 && through.st_size == 513);
	REFUSED(stat("dangling", &through), ENOENT);
	REFUSED(stat("loop", &through), ELOOP);
	REFUSED(open("link", O_RDONLY | O_NOFOLLOW), ELOOP);
	REFUSED(readlink("run", target, sizeof(target)), EINVAL);
}

static void check_wrong_paths(void)
{
	char name[LONG_NAME_SIZE + 2];
	struct stat stat;

	memset(name, 'x', sizeof(name) - 1);
	name[sizeof(name) - 1] = 0;
	for (int twice = 0; twice < 2; twice++) { // asked for, then remembered
		REFUSED(lstat("absent", &stat), ENOENT);
		REFUSED(lstat("hollow/absent", &stat), ENOENT);
		REFUSED(lstat("run/below", &stat), ENOTDIR);
		REFUSED(lstat("run/", &stat), ENOTDIR);
		REFUSED(lstat(name, &stat), ENAMETOOLONG);
	}
	REFUSED(open("run", O_RDONLY | O_DIRECTORY), ENOTDIR);
	WANT(!opendir("run") && errno == ENOTDIR);
	int fd = open("hollow", O_RDONLY | O_CLOEXEC);

	REFUSED(read(fd, name, 1), EISDIR);
	WANT(close(fd) == 0);
	REFUSED(execl("sizes/513", "513", NULL), EACCES);
}

static void check_names_and_depth(void)
{
	char path[2 * DEPTH + 16] = "deep/";

	WANT(status_of("names/with space\n\\ and \xff\xfe").st_size == 2);
	WANT(chdir("names") == 0 && status_of(long_name()).st_size == 3);
	WANT(chdir("..") == 0);
	for (int i = 0; i < DEPTH; i++)
		strcat(path, "d/");
	WANT(status_of(strcat(path, "bottom")).st_size == 7);
}

static void check_writes_are_refused(void)
{
	struct timespec now[2] = { { 0 } };

	REFUSED(open("run", O_WRONLY), EROFS);
	REFUSED(open("run", O_RDWR), EROFS);
	REFUSED(open("run", O_RDONLY | O_TRUNC), EROFS);
	REFUSED(open("new", O_WRONLY | O_CREAT, 0644), EROFS);
	REFUSED(open("hollow", O_RDWR | O_TMPFILE, 0600), EROFS);
	REFUSED(truncate("run", 0), EROFS);
	REFUSED(mkdir("new", 0755), EROFS);
	REFUSED(rmdir("hollow"), EROFS);
	REFUSED(unlink("run"), EROFS);
	REFUSED(rename("run", "ran"), EROFS);
	REFUSED(link("run", "ran"), EROFS);
	REFUSED(symlink("run", "ran"), EROFS);
	REFUSED(mknod("fifo", S_IFIFO | 0644, 0), EROFS);
	REFUSED(chmod("run", 0644), EROFS);
	REFUSED(lchown("run", 1, 1), EROFS);
	REFUSED(utimensat(AT_FDCWD, "run", now, 0), EROFS);
	REFUSED(lsetxattr("run", "user.new", "1", 1, 0), EROFS);
	REFUSED(lremovexattr("run", "user.snix.castore.blob.digest"), EROFS);
	REFUSED(access("run", W_OK), EROFS);
	WANT(access("run", R_OK | X_OK) == 0 && access("hollow", R_OK | X_OK) == 0);
	REFUSED(access("sizes/513", X_OK), EACCES);
}

static void check_xattr_pair(const char *name, const char *kind)
{
	static const struct {
		const char *prefix, *start;
	} dialects[] = { { "user.snix.castore", "blake3-" }, { "user.tvix.castore", "b3:" } };
	char list[1000], attribute[64], value[100];

	// not listed, or copies would have them too
	WANT(llistxattr(name, list, sizeof(list)) == 0 && llistxattr(name, NULL, 0) == 0);
	for (int i = 0; i < 2; i++) {
		size_t start = strlen(dialects[i].start);

		snprintf(attribute, sizeof(attribute), "%s.%s.digest", dialects[i].prefix, kind);
		// base64 of 32 bytes
		WANT(lgetxattr(name, attribute, value, sizeof(value)) == (ssize_t)start + 44);
		WANT(memcmp(value, dialects[i].start, start) == 0 && value[start + 43] == '=');
		WANT(lgetxattr(name, attribute, NULL, 0) == (ssize_t)start + 44);
		REFUSED(lgetxattr(name, attribute, value, 10), ERANGE);
	}
	REFUSED(lgetxattr(name, "user.absent", value, sizeof(value)), ENODATA);
	REFUSED(lgetxattr(name, "security.capability", value, sizeof(value)), ENODATA);
	REFUSED(lgetxattr(name, "trusted.overlay.opaque", value, sizeof(value)), ENODATA);
}

static void check_xattrs(void)
{
	char list[1000];

	check_xattr_pair("run", "blob");
	check_xattr_pair("sizes/300000", "blob");
	check_xattr_pair("hollow", "directory");
	WANT(llistxattr("link", list, sizeof(list)) == 0);
	WANT(lgetxattr("run", "system.posix_acl_access", list, sizeof(list)) == -1);
	WANT(errno == ENODATA || errno == EOPNOTSUPP);
}

static void check_statfs(void)
{
	struct statvfs portable;
	struct statfs own;

	WANT(statfs("run", &own) == 0 && own.f_type == FUSE_SUPER_MAGIC);
	WANT(statvfs(".", &portable) == 0 && portable.f_namemax == LONG_NAME_SIZE);
	WANT(portable.f_blocks > 0 && portable.f_bsize >= 512 && portable.f_frsize >= 512);
	WANT(portable.f_bfree <= portable.f_blocks && portable.f_flag & ST_RDONLY);
}

static void check_descriptors(void)
{
	int fd = open("run", O_RDONLY | O_CLOEXEC), other = open("run", O_RDONLY | O_CLOEXEC);
	struct pollfd ready = { .fd = fd, .events = POLLIN };
	struct flock lock = { .l_type = F_RDLCK };

	WANT(fd >= 0 && other >= 0 && poll(&ready, 1, 1000) == 1 && ready.revents & POLLIN);
	WANT(flock(fd, LOCK_EX) == 0);
	REFUSED(flock(other, LOCK_EX | LOCK_NB), EWOULDBLOCK);
	WANT(flock(fd, LOCK_UN) == 0 && fcntl(fd, F_SETLK, &lock) == 0);
	REFUSED(ioctl(fd, 0x1234), ENOTTY);
	REFUSED(write(fd, "x", 1), EBADF);
	WANT(close(fd) == 0 && close(other) == 0);
}

static void check_execution(void)
{
	int status, fd = open("program", O_RDONLY | O_CLOEXEC);
	pid_t pid = fork();

	WANT(mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0) != MAP_FAILED);
	if (pid == 0) {
		execl("program", "program", "seven", NULL);
		_exit(1);
	}
	WANT(pid > 0 && waitpid(pid, &status, 0) == pid);
	WANT(WIFEXITED(status) && WEXITSTATUS(status) == 7 && close(fd) == 0);
}

static void check_places_of_equal_directories(void)
{
	char before[4096], after[4096];
	struct stat up;

	WANT(chdir("here/same/inner") == 0 && getcwd(before, sizeof(before)));
	for (int i = 0; i < 3; i++) {
		status_of("../../../there/same/inner/file");
		WANT(getcwd(after, sizeof(after)) && strcmp(before, after) == 0);
		WANT(stat("../..", &up) == 0 && access("../../../there", F_OK) == 0);
	}
	WANT(chdir("../../..") == 0 && access("hollow", F_OK) == 0);
}

static const struct {
	const char *name;
	void (*run)(void);
} checks[] = {
	{ "attributes", check_attributes },
	{ "identity", check_identity },
	{ "reading", check_reading },
	{ "mapping", check_mapping },
	{ "direct and sendfile", check_direct_and_sendfile },
	{ "listing", check_listing },
	{ "types in listing", check_types_in_listing },
	{ "symlinks", check_symlinks },
	{ "wrong paths", check_wrong_paths },
	{ "names and depth", check_names_and_depth },
	{ "writes are refused", check_writes_are_refused },
	{ "xattrs", check_xattrs },
	{ "statfs", check_statfs },
	{ "descriptors", check_descriptors },
	{ "execution", check_execution },
	{ "places of equal directories", check_places_of_equal_directories },
};

int main(int argc, char **argv)
{
	static volatile int status;

	if (argc == 2 && strcmp(argv[1], "seven") == 0)
		return 7;
	if (argc == 3 && strcmp(argv[1], "make") == 0) {
		if (setjmp(failed))
			return 1;
		umask(022);
		WANT(mkdir(argv[2], 0755) == 0 && chdir(argv[2]) == 0);
		make_tree();
		return 0;
	}
	if (argc != 3 || strcmp(argv[1], "check") != 0) {
		fputs("usage: conformance make|check DIR\n", stderr);
		return 2;
	}
	for (volatile size_t i = 0; i < sizeof(checks) / sizeof(checks[0]); i++) {
		if (setjmp(failed)) {
			printf("FAILED %s\n", checks[i].name);
			status = 1;
			continue;
		}
		WANT(chdir(argv[2]) == 0);
		checks[i].run();
		printf("ok %s\n", checks[i].name);
	}
	return status;
}
