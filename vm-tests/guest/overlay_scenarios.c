// The scenarios of overlay.c: each does something to one of several equal things.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "overlay.h"

int closed(int fd, int result)
{
	int error = errno;

	close(fd);
	errno = error;
	return result;
}

int write_to(const char *path, int flags, const char *text)
{
	int fd = open(at(path), flags | O_CLOEXEC, 0444);
	ssize_t size = (ssize_t)strlen(text);

	return fd < 0 ? -1 : closed(fd, write(fd, text, (size_t)size) == size ? 0 : -1);
}

// --- contents ------------------------------------------------------------------------------------

static int append(void)
{
	return write_to("1/a.conf", O_WRONLY | O_APPEND, "evil\n");
}

static int fill_an_empty_file(void)
{
	return write_to("2/empty-b", O_WRONLY, "evil\n");
}

static int truncate_it(void)
{
	return truncate(at("1/a.conf"), 0);
}

static int truncate_open(void)
{
	return write_to("1/a.conf", O_WRONLY | O_TRUNC, "");
}

static int write_two_at_once(void)
{
	int one = open(at("1/a.conf"), O_RDWR | O_CLOEXEC);
	int other = open(at("1/b.conf"), O_RDWR | O_CLOEXEC);
	int result = one >= 0 && other >= 0 && pwrite(one, "one", 3, 0) == 3 &&
				     pwrite(other, "two", 3, 4) == 3 && fsync(one) == 0
			     ? 0
			     : -1;

	if (result == 0 && (!has_content(one, "oneting = 1\n") || !has_content(other, "setttwo = 1\n")))
		complain("two files written at once have mixed contents");
	closed(other, 0);
	return closed(one, result);
}

static int write_a_map(void)
{
	int one = open(at("1/a.conf"), O_RDWR | O_CLOEXEC);
	int other = open(at("1/b.conf"), O_RDONLY | O_CLOEXEC);
	char *mine = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, one, 0);
	const char *theirs = mmap(NULL, 4096, PROT_READ, MAP_SHARED, other, 0);

	if (mine == MAP_FAILED || theirs == MAP_FAILED)
		return -1;
	memcpy(mine, "SETTING", 7);
	msync(mine, 4096, MS_SYNC);
	if (memcmp(theirs, TEXT, strlen(TEXT)) != 0)
		complain("the map of 1/b.conf has changed");
	munmap(mine, 4096);
	munmap((void *)(size_t)theirs, 4096);
	closed(other, 0);
	return closed(one, 0);
}

// --- attributes ----------------------------------------------------------------------------------

static int change_mode(void)
{
	return chmod(at("1/a.conf"), 0600);
}

static int change_owner(void)
{
	return chown(at("2/a.conf"), 1, 1);
}

static int change_owner_of_link(void)
{
	return lchown(at("1/link-a"), 1, 1);
}

static int change_mode_of_directory(void)
{
	return chmod(at("1/dc171b70cc0"), 0700);
}

static int change_times(void)
{
	const struct timespec times[2] = { { .tv_sec = 5 }, { .tv_sec = 5 } };

	return utimensat(AT_FDCWD, at("1/a.conf"), times, 0);
}

static int set_user_attribute(void)
{
	return setxattr(at("1/a.conf"), "user.new", "value", 5, 0);
}

static int set_trusted_attribute(void)
{
	return setxattr(at("1/dir-a"), "trusted.new", "value", 5, 0);
}

// --- names ---------------------------------------------------------------------------------------

static int rename_onto_equal(void)
{
	return rename(at("1/a.conf"), at("1/b.conf"));
}

static int rename_onto_equal_elsewhere(void)
{
	return rename(at("1/a.conf"), at("2/a.conf"));
}

static int rename_empty(void)
{
	return rename(at("1/empty-a"), at("1/empty-b"));
}

static int rename_link(void)
{
	return rename(at("1/link-a"), at("1/link-b"));
}

static int rename_directory(void)
{
	return rename(at("1/dir-a"), at("1/dir-b"));
}

static int rename_hollow_directory(void)
{
	return rename(at("1/hollow-a"), at("1/hollow-b"));
}

static int exchange(void)
{
	if (chmod(at("1/a.conf"), 0600))
		return -1;
	return renameat2(AT_FDCWD, at("1/a.conf"), AT_FDCWD, at("1/b.conf"), RENAME_EXCHANGE);
}

static int make_link(void)
{
	return link(at("1/a.conf"), at("1/dir-a/new"));
}

static int write_through_link(void)
{
	return make_link() ? -1 : write_to("1/dir-a/new", O_WRONLY | O_APPEND, "evil\n");
}

static int link_onto_equal(void)
{
	return link(at("1/a.conf"), at("1/b.conf"));
}

static int remove_file(void)
{
	return unlink(at("1/a.conf"));
}

static int remove_link(void)
{
	return unlink(at("2/link-b"));
}

static int remove_hollow_directory(void)
{
	return rmdir(at("1/hollow-a"));
}

static int remove_full_directory(void)
{
	return rmdir(at("1/dir-a"));
}

static int remove_visited(const char *path, const struct stat *stat, int kind, struct FTW *where)
{
	(void)stat, (void)kind, (void)where;
	return remove(path);
}

static int remove_all(const char *path)
{
	return nftw(at(path), remove_visited, 16, FTW_DEPTH | FTW_PHYS);
}

static int remove_directory(void)
{
	return remove_all("1/dir-a");
}

static int remove_colliding(void)
{
	return remove_all("1/dc171b70cc0");
}

static int remove_package(void)
{
	return remove_all("1");
}

static int replace_file(void)
{
	return remove_file() ? -1 : write_to("1/a.conf", O_WRONLY | O_CREAT | O_EXCL, "new\n");
}

static int replace_directory(void)
{
	return remove_directory() ? -1 : mkdir(at("1/dir-a"), 0555);
}

static int replace_by_link(void)
{
	return remove_file() ? -1 : symlink("b.conf", at("1/a.conf"));
}

static int create_in_directory(void)
{
	return write_to("1/dir-a/new", O_WRONLY | O_CREAT | O_EXCL, "new\n");
}

static int create_deep(void)
{
	return mkdir(at("2/d786671d609/sub/new"), 0555);
}

// --- all of them ---------------------------------------------------------------------------------

#define FILE_OF(name, text) { .path = name, .mode = S_IFREG | 0444, .content = (text) }
#define FILE_WITH(name, bits, text) { .path = name, .mode = S_IFREG | (bits), .content = (text) }
#define LINKED(name, text) \
	{ .path = name, .mode = S_IFREG | 0444, .content = (text), .is_linked = true }
#define LINK_TO(name, target) { .path = name, .mode = S_IFLNK | 0777, .content = (target) }
#define DIRECTORY(name) { .path = name, .mode = S_IFDIR | 0555 }
#define GONE(name) { .path = name }

#define SCENARIO(what, function, ...) { .name = what, .act = function, .after = { __VA_ARGS__ } }

const struct scenario scenarios[] = {
	SCENARIO("append", append, FILE_OF("1/a.conf", TEXT "evil\n")),
	SCENARIO("fill-an-empty-file", fill_an_empty_file, FILE_OF("2/empty-b", "evil\n")),
	SCENARIO("truncate", truncate_it, FILE_OF("1/a.conf", "")),
	SCENARIO("open-truncate", truncate_open, FILE_OF("1/a.conf", "")),
	SCENARIO("write-two-at-once", write_two_at_once,
		 FILE_OF("1/a.conf", "oneting = 1\n"), FILE_OF("1/b.conf", "setttwo = 1\n")),
	SCENARIO("write-a-map", write_a_map, FILE_OF("1/a.conf", "SETTING = 1\n")),
	SCENARIO("chmod", change_mode, FILE_WITH("1/a.conf", 0600, TEXT)),
	SCENARIO("chown", change_owner,
		 { .path = "2/a.conf", .mode = S_IFREG | 0444, .content = TEXT, .owner = 1 }),
	SCENARIO("chown-link", change_owner_of_link,
		 { .path = "1/link-a", .mode = S_IFLNK | 0777, .content = "a.conf", .owner = 1 }),
	SCENARIO("chmod-directory", change_mode_of_directory,
		 { .path = "1/dc171b70cc0", .mode = S_IFDIR | 0700 }),
	SCENARIO("utimes", change_times, FILE_OF("1/a.conf", TEXT)),
	SCENARIO("setxattr-user", set_user_attribute, FILE_OF("1/a.conf", TEXT)),
	SCENARIO("setxattr-trusted", set_trusted_attribute, DIRECTORY("1/dir-a")),
	SCENARIO("rename-onto-equal", rename_onto_equal,
		 GONE("1/a.conf"), FILE_OF("1/b.conf", TEXT)),
	SCENARIO("rename-onto-equal-elsewhere", rename_onto_equal_elsewhere,
		 GONE("1/a.conf"), FILE_OF("2/a.conf", TEXT)),
	SCENARIO("rename-empty", rename_empty, GONE("1/empty-a"), FILE_OF("1/empty-b", "")),
	SCENARIO("rename-link", rename_link, GONE("1/link-a"), LINK_TO("1/link-b", "a.conf")),
	SCENARIO("rename-directory", rename_directory, GONE("1/dir-a"), DIRECTORY("1/dir-b")),
	SCENARIO("rename-hollow-directory", rename_hollow_directory,
		 GONE("1/hollow-a"), DIRECTORY("1/hollow-b")),
	SCENARIO("exchange", exchange,
		 FILE_OF("1/a.conf", TEXT), FILE_WITH("1/b.conf", 0600, TEXT)),
	SCENARIO("link", make_link,
		 LINKED("1/a.conf", TEXT), LINKED("1/dir-a/new", TEXT)),
	SCENARIO("write-through-link", write_through_link,
		 LINKED("1/a.conf", TEXT "evil\n"), LINKED("1/dir-a/new", TEXT "evil\n")),
	SCENARIO("link-onto-equal", link_onto_equal),
	SCENARIO("unlink", remove_file, GONE("1/a.conf")),
	SCENARIO("unlink-link", remove_link, GONE("2/link-b")),
	SCENARIO("rmdir", remove_hollow_directory, GONE("1/hollow-a")),
	SCENARIO("rmdir-full", remove_full_directory),
	SCENARIO("remove-directory", remove_directory, GONE("1/dir-a")),
	SCENARIO("remove-colliding-directory", remove_colliding, GONE("1/dc171b70cc0")),
	SCENARIO("remove-package", remove_package, GONE("1")),
	SCENARIO("replace-file", replace_file, FILE_OF("1/a.conf", "new\n")),
	SCENARIO("replace-directory", replace_directory,
		 GONE("1/dir-a"), { .path = "1/dir-a", .mode = S_IFDIR | 0555 }),
	SCENARIO("replace-by-link", replace_by_link, LINK_TO("1/a.conf", "b.conf")),
	SCENARIO("create-in-directory", create_in_directory, FILE_OF("1/dir-a/new", "new\n")),
	SCENARIO("create-deep", create_deep, DIRECTORY("2/d786671d609/sub/new")),
	{ .name = "flock", .act = lock_by_flock, .only_reads = true },
	{ .name = "fcntl-lock", .act = lock_by_fcntl, .only_reads = true },
	{ .name = "watch-reading", .act = watch_reading, .only_reads = true },
	SCENARIO("watch-changing", watch_changing, FILE_WITH("1/b.conf", 0600, TEXT "evil\n")),
	SCENARIO("write-beside-a-program", write_beside_a_program,
		 { .path = "1/run-b", .mode = S_IFREG | 0555 }),
	SCENARIO("run-beside-a-writer", run_beside_a_writer),
	{ .name = "run", .act = run_all, .only_reads = true },
	{ .name = "handles", .act = hold_handles, .recheck = open_handles },
	{ .name = "handles-first", .act = hold_handles, .recheck = open_handles,
	  .rechecks_first = true, .only_reads = true },
	{ .name = "copied-up", .act = copy_up, .recheck = open_copied_up, .rechecks_first = true,
	  .after = { FILE_OF("1/dir-a/sub/x", "x\nevil\n"),
		     FILE_WITH("2/dir-b/sub/x", 0600, "x\n") } },
};
const size_t num_scenarios = sizeof(scenarios) / sizeof(scenarios[0]);
