// The tree, the scenarios and the checks of overlay.c; its head comment says what they are for.

#ifndef GUEST_OVERLAY_H
#define GUEST_OVERLAY_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/stat.h>

#define TEXT "setting = 1\n"
#define MAX_AFTER 4

// One name of the tree as it has to be: "1/a.conf" is "a.conf" of the first package.
struct entry {
	const char *path;
	mode_t mode;	     // 0: it is gone, and all below it
	const char *content; // of a file, or the target of a symlink; NULL: a copy of this program
	uid_t owner;
	bool is_linked; // the inode is that of another name, too
};

// What is done to one of several equal things, and all that may have changed then.
struct scenario {
	const char *name;
	int (*act)(void);		// in the tree; 0 or -1 with errno, and then nothing has changed
	struct entry after[MAX_AFTER];	// of names that are not as before; the first without a path ends it
	int (*recheck)(void);		// after the caches were dropped and the overlay was mounted again
	bool rechecks_first;		// before anything was looked up by its name
	bool only_reads;		// so that it can be done without an overlay
};

extern const struct scenario scenarios[];
extern const size_t num_scenarios;

// Of overlay_inodes.c.
int lock_by_flock(void);
int lock_by_fcntl(void);
int watch_reading(void);
int watch_changing(void);
int write_beside_a_program(void);
int run_beside_a_writer(void);
int run_all(void);
int hold_handles(void);
int copy_up(void);
int open_copied_up(void);
int open_handles(void);

// Closes `fd`, keeps errno and returns `result`.
int closed(int fd, int result);

// Opens a file of the tree with `flags` and writes `text`; returns 0 or -1 with errno.
int write_to(const char *path, int flags, const char *text);

// The names of the two packages, which are equal directories beside each other.
extern const char *packages[2];

// Makes one package as the directory `name`.
void make_package(const char *name);

// Returns the file name of "1/..." or "2/..."; valid until the fourth call from now.
const char *at(const char *path);

// Calls `visit` with each name of the two packages as they were made, parents first.
void for_each_entry(void (*visit)(const char *path, const struct entry *entry));

// Whether a file has this content, or is a copy of this program where `content` is NULL.
bool has_content(int fd, const char *content);

// Writes what is not as it must be to `problem` if that is empty still.
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
extern char problem[512];

// What is looked at besides names, kinds, modes, owners, times, contents and inode numbers.
enum checks {
	// Not with nfs_export=on or when mounted again: overlayfs may count its index as a link.
	LINK_COUNTS = 1,
	// Only where one is set: the kernel keeps none, so that every look is a request.
	ATTRIBUTES = 2,
};

// Complains of the first name of the tree that is not as `after` says or, not named there, as made.
void verify(const struct entry *after, int checks);

#endif
