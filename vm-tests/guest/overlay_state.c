// The tree of overlay.c: how it is made, and whether it is what it must be.

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "overlay.h"

enum { MAX_INODES = 128, COMPARED_BYTES = 4096 };

#define DIRECTORY (S_IFDIR | 0555)
#define FILE_MODE (S_IFREG | 0444)
#define PROGRAM (S_IFREG | 0555)
#define LINK (S_IFLNK | 0777)
#define EQUAL_DIRECTORY(name) \
	{ .path = name, .mode = DIRECTORY }, { .path = name "/x", .mode = FILE_MODE, .content = "x\n" }, \
	{ .path = name "/y", .mode = FILE_MODE, .content = "x\n" }, \
	{ .path = name "/link", .mode = LINK, .content = "x" }, \
	{ .path = name "/sub", .mode = DIRECTORY }, \
	{ .path = name "/sub/x", .mode = FILE_MODE, .content = "x\n" }

// Every thing has its equal beside it, and both have theirs in the other package.
static const struct entry made[] = {
	{ .path = "a.conf", .mode = FILE_MODE, .content = TEXT },
	{ .path = "b.conf", .mode = FILE_MODE, .content = TEXT },
	{ .path = "empty-a", .mode = FILE_MODE, .content = "" },
	{ .path = "empty-b", .mode = FILE_MODE, .content = "" },
	{ .path = "link-a", .mode = LINK, .content = "a.conf" },
	{ .path = "link-b", .mode = LINK, .content = "a.conf" },
	{ .path = "run-a", .mode = PROGRAM },
	{ .path = "run-b", .mode = PROGRAM },
	{ .path = "hollow-a", .mode = DIRECTORY },
	{ .path = "hollow-b", .mode = DIRECTORY },
	EQUAL_DIRECTORY("dir-a"),
	EQUAL_DIRECTORY("dir-b"),
	// CRC-32 of these two names is the same.
	EQUAL_DIRECTORY("dc171b70cc0"),
	EQUAL_DIRECTORY("d786671d609"),
};
static const size_t num_made = sizeof(made) / sizeof(made[0]);

const char *packages[2];
char problem[512];

void complain(const char *format, ...)
{
	va_list arguments;

	if (problem[0])
		return;
	va_start(arguments, format);
	vsnprintf(problem, sizeof(problem), format, arguments);
	va_end(arguments);
}

const char *at(const char *path)
{
	static char names[4][512];
	static unsigned int next;
	char *name = names[next++ % 4];

	snprintf(name, sizeof(names[0]), "%s%s", packages[path[0] - '1'], path + 1);
	return name;
}

void for_each_entry(void (*visit)(const char *path, const struct entry *entry))
{
	static const struct entry root = { .mode = DIRECTORY }; // whoever visits may keep it
	char path[128];

	for (int package = 1; package <= 2; package++) {
		snprintf(path, sizeof(path), "%d", package);
		visit(path, &root);
		for (size_t i = 0; i < num_made; i++) {
			snprintf(path, sizeof(path), "%d/%s", package, made[i].path);
			visit(path, &made[i]);
		}
	}
}

// --- making it -----------------------------------------------------------------------------------

static void must(bool is_done, const char *path)
{
	if (is_done)
		return;
	perror(path);
	exit(2);
}

static void make_file(const char *path, const struct entry *entry)
{
	int to = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

	must(to >= 0, path);
	if (entry->content) {
		ssize_t size = (ssize_t)strlen(entry->content);

		must(write(to, entry->content, (size_t)size) == size, path);
	} else {
		int from = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
		struct stat stat;

		must(from >= 0 && fstat(from, &stat) == 0, path);
		must(sendfile(to, from, NULL, (size_t)stat.st_size) == stat.st_size, path);
		close(from);
	}
	must(fchmod(to, entry->mode & 0777) == 0 && close(to) == 0, path);
}

void make_package(const char *name)
{
	const struct timespec times[2] = { { .tv_sec = 1 }, { .tv_sec = 1 } };

	must(mkdir(name, 0755) == 0 && chdir(name) == 0, name);
	for (size_t i = 0; i < num_made; i++) {
		if (S_ISDIR(made[i].mode))
			must(mkdir(made[i].path, 0755) == 0, made[i].path);
		else if (S_ISLNK(made[i].mode))
			must(symlink(made[i].content, made[i].path) == 0, made[i].path);
		else
			make_file(made[i].path, &made[i]);
	}
	for (size_t i = num_made; i-- > 0;) {
		if (S_ISDIR(made[i].mode))
			must(chmod(made[i].path, made[i].mode & 0777) == 0, made[i].path);
		must(utimensat(AT_FDCWD, made[i].path, times, AT_SYMLINK_NOFOLLOW) == 0, made[i].path);
	}
	must(chmod(".", 0555) == 0 && utimensat(AT_FDCWD, ".", times, 0) == 0, name);
	must(chdir("..") == 0, name);
}

// --- checking it ---------------------------------------------------------------------------------

static const struct entry *changes;
static struct {
	dev_t device;
	ino_t inode;
	char path[128];
} seen[MAX_INODES];
static size_t num_seen;
static int checked;

static const struct entry *changed(const char *path)
{
	const struct entry *found = NULL;

	for (size_t i = 0; i < MAX_AFTER && changes[i].path; i++)
		if (strcmp(changes[i].path, path) == 0)
			found = &changes[i];
	return found;
}

static bool is_gone(const char *path)
{
	for (size_t i = 0; i < MAX_AFTER && changes[i].path; i++) {
		size_t size = strlen(changes[i].path);

		if (changes[i].mode == 0 && strncmp(path, changes[i].path, size) == 0 &&
		    (path[size] == '/' || path[size] == '\0'))
			return true;
	}
	return false;
}

bool has_content(int fd, const char *content)
{
	char found[COMPARED_BYTES], wanted[COMPARED_BYTES];
	ssize_t size = pread(fd, found, sizeof(found), 0);
	struct stat own, stat;

	if (content)
		return size == (ssize_t)strlen(content) && memcmp(found, content, (size_t)size) == 0;
	int self = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	bool is_equal = fstat(self, &own) == 0 && fstat(fd, &stat) == 0 &&
			own.st_size == stat.st_size && size == sizeof(found) &&
			pread(self, wanted, sizeof(wanted), 0) == size &&
			memcmp(found, wanted, sizeof(found)) == 0;

	close(self);
	return is_equal;
}

static void check_content(const char *path, const struct entry *entry)
{
	char target[256];

	if (S_ISLNK(entry->mode)) {
		ssize_t size = readlink(at(path), target, sizeof(target));

		if (size != (ssize_t)strlen(entry->content) ||
		    memcmp(target, entry->content, (size_t)size) != 0)
			complain("%s has another target", path);
	} else if (S_ISREG(entry->mode)) {
		int fd = open(at(path), O_RDONLY | O_CLOEXEC);

		if (fd < 0)
			complain("%s cannot be opened: %s", path, strerror(errno));
		else if (!has_content(fd, entry->content))
			complain("%s has another content", path);
		if (fd >= 0)
			close(fd);
	}
}

static void check_inode(const char *path, const struct stat *stat)
{
	for (size_t i = 0; i < num_seen; i++)
		if (seen[i].device == stat->st_dev && seen[i].inode == stat->st_ino)
			complain("%s and %s have one st_ino", seen[i].path, path);
	if (num_seen < MAX_INODES) {
		seen[num_seen].device = stat->st_dev;
		seen[num_seen].inode = stat->st_ino;
		snprintf(seen[num_seen++].path, sizeof(seen[0].path), "%s", path);
	}
}

static void check_status(const char *path, const struct entry *entry, bool is_changed)
{
	char value[16];
	struct stat stat;

	if (lstat(at(path), &stat)) {
		complain("%s: %s", path, strerror(errno));
		return;
	}
	// Linux shows 0777 for its own symlinks, others show what they like.
	if (S_ISLNK(entry->mode) ? !S_ISLNK(stat.st_mode) : stat.st_mode != entry->mode)
		complain("%s has mode %o", path, stat.st_mode);
	if (stat.st_uid != entry->owner)
		complain("%s belongs to %u", path, stat.st_uid);
	if ((checked & LINK_COUNTS) && !S_ISDIR(entry->mode) &&
	    stat.st_nlink != (entry->is_linked ? 2 : 1))
		complain("%s has %u links", path, (unsigned int)stat.st_nlink);
	if (!is_changed && (checked & ATTRIBUTES) &&
	    (lgetxattr(at(path), "user.new", value, sizeof(value)) >= 0 ||
	     lgetxattr(at(path), "trusted.new", value, sizeof(value)) >= 0))
		complain("%s has an attribute", path);
	if (!is_changed && !S_ISDIR(entry->mode) && stat.st_mtime != 1)
		complain("%s has another mtime", path);
	if (!entry->is_linked)
		check_inode(path, &stat);
}

static bool is_child(const char *directory, const char *path)
{
	size_t size = strlen(directory);

	return strncmp(path, directory, size) == 0 && path[size] == '/' && !strchr(path + size + 1, '/');
}

static int children_expected(const char *directory)
{
	char path[128];
	int count = 0;

	for (size_t i = 0; i < num_made; i++) {
		snprintf(path, sizeof(path), "%c/%s", directory[0], made[i].path);
		count += is_child(directory, path) && !is_gone(path) && !changed(path);
	}
	for (size_t i = 0; i < MAX_AFTER && changes[i].path; i++)
		count += is_child(directory, changes[i].path) && changes[i].mode != 0;
	return count;
}

static void check_listing(const char *path)
{
	DIR *directory = opendir(at(path));
	int count = 0;

	if (!directory) {
		complain("%s cannot be listed: %s", path, strerror(errno));
		return;
	}
	errno = 0;
	for (struct dirent *found; (found = readdir(directory));)
		count += strcmp(found->d_name, ".") != 0 && strcmp(found->d_name, "..") != 0;
	if (errno)
		complain("%s cannot be listed: %s", path, strerror(errno));
	if (count != children_expected(path))
		complain("%s lists %d names instead of %d", path, count, children_expected(path));
	closedir(directory);
}

static void check_entry(const char *path, const struct entry *entry, bool is_changed)
{
	check_status(path, entry, is_changed);
	check_content(path, entry);
	if (S_ISDIR(entry->mode))
		check_listing(path);
}

static void check_if_unchanged(const char *path, const struct entry *entry)
{
	struct stat stat;

	const struct entry *change = changed(path);

	if (is_gone(path)) {
		if (change && change->mode != 0)
			return; // something else is there now
		if (lstat(at(path), &stat) == 0 || errno != ENOENT)
			complain("%s is still there", path);
	} else if (!change) {
		check_entry(path, entry, false);
	}
}

void verify(const struct entry *after, int checks)
{
	checked = checks;
	changes = after;
	num_seen = 0;
	for_each_entry(check_if_unchanged);
	for (size_t i = 0; i < MAX_AFTER && after[i].path; i++)
		if (after[i].mode != 0)
			check_entry(after[i].path, &after[i], true);
}
