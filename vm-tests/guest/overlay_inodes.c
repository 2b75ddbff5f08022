// Scenarios of overlay.c: what the kernel keeps for an inode besides its content and attributes.

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/wait.h>
#include <unistd.h>

#include "overlay.h"

int lock_by_flock(void)
{
	static const char *const equals[] = { "1/a.conf", "1/b.conf", "2/a.conf", "2/b.conf" };
	int fds[4], result = 0;

	for (size_t i = 0; i < 4; i++) {
		fds[i] = open(at(equals[i]), O_RDONLY | O_CLOEXEC);
		if (result == 0 && flock(fds[i], LOCK_EX | LOCK_NB))
			result = -1;
	}
	for (size_t i = 0; i < 4; i++)
		closed(fds[i], 0);
	return result;
}

// Returns whether another process finds the file locked.
static bool is_locked(const char *path)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	int status = 0;
	pid_t child = fork();

	if (child == 0) {
		int fd = open(at(path), O_RDONLY | O_CLOEXEC);

		_exit(fd < 0 || fcntl(fd, F_GETLK, &lock) || lock.l_type == F_UNLCK ? 0 : 1);
	}
	waitpid(child, &status, 0);
	return WIFEXITED(status) && WEXITSTATUS(status) == 1;
}

int lock_by_fcntl(void)
{
	struct flock lock = { .l_type = F_RDLCK, .l_whence = SEEK_SET };
	int fd = open(at("1/a.conf"), O_RDONLY | O_CLOEXEC);

	if (fd < 0 || fcntl(fd, F_SETLK, &lock))
		return -1;
	if (is_locked("1/b.conf") || is_locked("2/a.conf"))
		complain("the lock of 1/a.conf is one of its equals, too");
	closed(open(at("1/b.conf"), O_RDONLY | O_CLOEXEC), 0);
	closed(open(at("2/a.conf"), O_RDONLY | O_CLOEXEC), 0);
	if (!is_locked("1/a.conf"))
		complain("the lock of 1/a.conf is gone: an equal file was closed");
	return closed(fd, 0);
}

static int read_others(void)
{
	char byte;

	for (const char **path = (const char *[]){ "1/b.conf", "2/a.conf", NULL }; *path; path++) {
		int fd = open(at(*path), O_RDONLY | O_CLOEXEC);

		if (fd < 0 || closed(fd, read(fd, &byte, 1) == 1 ? 0 : -1))
			return -1;
	}
	return 0;
}

static int change_others(void)
{
	return chmod(at("1/b.conf"), 0600) ? -1 : write_to("1/b.conf", O_WRONLY | O_APPEND, "evil\n");
}

// Watches a file while `act` is done to its equals.
static int watch(int (*act)(void))
{
	char events[4096];
	int fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);

	if (fd < 0 || inotify_add_watch(fd, at("1/a.conf"), IN_ALL_EVENTS) < 0 || act())
		return -1;
	if (read(fd, events, sizeof(events)) >= 0)
		complain("who watches 1/a.conf hears of its equals");
	return closed(fd, 0);
}

int watch_reading(void)
{
	return watch(read_others);
}

int watch_changing(void)
{
	return watch(change_others);
}

// Starts a program of the tree; its input ends when `input` is closed, or has ended already.
static pid_t start(const char *path, const char *mode, int *input)
{
	int in[2], out[2];
	char byte;

	if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC))
		return -1;
	pid_t child = fork();
	if (child == 0) {
		dup2(in[0], 0);
		dup2(out[1], 1);
		execl(at(path), path, "be", mode, (char *)NULL);
		_exit(errno & 127);
	}
	closed(in[0], 0);
	closed(out[1], 0);
	if (read(out[0], &byte, 1) < 0) // it runs, or has ended
		complain("read: %s", strerror(errno));
	closed(out[0], 0);
	*input = in[1];
	return child;
}

static int end(pid_t child, int input)
{
	int status = 0;

	close(input);
	if (waitpid(child, &status, 0) < 0)
		return -1;
	errno = WIFEXITED(status) ? WEXITSTATUS(status) : EINTR;
	return status == 0 ? 0 : -1;
}

int write_beside_a_program(void)
{
	int input = -1;
	pid_t child = start("1/run-a", "wait", &input);
	int fd = open(at("1/run-b"), O_WRONLY | O_CLOEXEC);
	int other = open(at("2/run-a"), O_WRONLY | O_CLOEXEC);
	int result = fd < 0 || other < 0 || pwrite(fd, "\x7f", 1, 0) != 1 ? -1 : 0, error = errno;

	closed(fd, 0);
	closed(other, 0);
	if (end(child, input))
		return -1;
	errno = error;
	return result;
}

int run_beside_a_writer(void)
{
	static const char *const equals[] = { "1/run-b", "2/run-a" };
	int fd = open(at("1/run-a"), O_RDWR | O_CLOEXEC), input = -1, result = fd < 0 ? -1 : 0;

	for (size_t i = 0; i < 2 && result == 0; i++) {
		pid_t child = start(equals[i], "nothing", &input);

		result = end(child, input);
	}
	return closed(fd, result);
}

int run_all(void)
{
	static const char *const equals[] = { "1/run-a", "1/run-b", "2/run-a", "2/run-b" };
	int result = 0, input = -1;

	for (size_t i = 0; i < 4 && result == 0; i++) {
		pid_t child = start(equals[i], "wait", &input);

		result = end(child, input);
	}
	return result;
}

// --- handles -------------------------------------------------------------------------------------

enum { MAX_HANDLES = 80 };

static struct {
	char path[128];
	const struct entry *entry;
	union {
		struct file_handle handle;
		char room[sizeof(struct file_handle) + MAX_HANDLE_SZ];
	};
	int fd;
} held[MAX_HANDLES];
static size_t num_held;

static void hold(const char *path, const struct entry *entry)
{
	int mount_id;

	held[num_held].handle.handle_bytes = MAX_HANDLE_SZ;
	held[num_held].entry = entry;
	snprintf(held[num_held].path, sizeof(held[0].path), "%s", path);
	if (name_to_handle_at(AT_FDCWD, at(path), &held[num_held].handle, &mount_id, 0) == 0)
		num_held++;
}

int hold_handles(void)
{
	num_held = 0;
	errno = 0;
	for_each_entry(hold);
	return num_held > 0 && errno == 0 ? 0 : -1;
}

// The handles of directories are as good as their names; those of others lead to their content.
static void check_held(size_t number, struct stat *found)
{
	const struct entry *entry = held[number].entry;
	const char *path = held[number].path;
	struct stat named;
	char target[64];

	if (lstat(at(path), &named) || named.st_ino != found->st_ino || named.st_dev != found->st_dev)
		complain("the handle of %s leads to another inode", path);
	if (S_ISREG(entry->mode) && !has_content(held[number].fd, entry->content))
		complain("the handle of %s leads to another content", path);
	if (S_ISLNK(entry->mode) && readlinkat(held[number].fd, "", target, sizeof(target)) !=
					    (ssize_t)strlen(entry->content))
		complain("the handle of %s leads to another target", path);
}

// The deepest names first: a file system has to find their parents.
int open_handles(void)
{
	int here = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	struct stat stat;

	for (size_t i = num_held; i-- > 0;) {
		int flags = S_ISLNK(held[i].entry->mode) ? O_PATH | O_NOFOLLOW : O_RDONLY;

		held[i].fd = open_by_handle_at(here, &held[i].handle, flags | O_CLOEXEC);
		if (held[i].fd < 0)
			complain("the handle of %s: %s", held[i].path, strerror(errno));
	}
	for (size_t i = 0; i < num_held; i++) {
		if (held[i].fd < 0)
			continue;
		if (fstat(held[i].fd, &stat))
			complain("the handle of %s: %s", held[i].path, strerror(errno));
		else
			check_held(i, &stat);
		close(held[i].fd);
	}
	return closed(here, 0);
}

// --- what a file was copied from ------------------------------------------------------------------

int copy_up(void)
{
	if (write_to("1/dir-a/sub/x", O_WRONLY | O_APPEND, "evil\n"))
		return -1;
	return chmod(at("2/dir-b/sub/x"), 0600);
}

// Overlayfs keeps a handle of the original, finds it by that, and asks whether it still stands.
int open_copied_up(void)
{
	static const char *const paths[] = { "1/dir-a/sub/x", "2/dir-b/sub/x" };

	for (size_t i = 0; i < 6; i++) {
		int fd = open(at(paths[i % 2]), O_RDONLY | O_CLOEXEC);

		if (fd < 0)
			complain("%s: %s", paths[i % 2], strerror(errno));
		closed(fd, 0);
	}
	return 0;
}
