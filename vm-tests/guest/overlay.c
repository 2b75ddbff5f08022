// What is done to one of several equal files, directories or symlinks of a read-only tree under
// overlayfs must not happen to the others. A store finds equal contents and keeps them once, and a
// file system that then gives them one inode makes them one file to all that write.
//
//   overlay make DIR                                 makes one package; import it under two names
//   overlay run OPTIONS LOWER SCRATCH ONE OTHER      does every scenario in an overlay of its own
//   overlay read LOWER ONE OTHER                     does those that only read, in LOWER itself
//
// LOWER has two packages, ONE and OTHER. SCRATCH is a directory where file systems may be mounted.
// OPTIONS are of overlayfs, or "plain". Writes a line for each scenario, "OPTIONS NAME ERRNO":
// ERRNO is 0 if the thing was done, and behind it is "FAILED: ..." if something else has changed.
// What was done is checked at once, and when all were mounted again with no inode in memory.
//
// Another lower file system may refuse the same (rename of a directory, say), so whoever runs this
// compares the lines with those of a LOWER of ext4 or tmpfs. Run it as root.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#include "overlay.h"

static const struct entry nothing[MAX_AFTER];

static struct {
	int error; // of the act; 0 if it was done
	char problem[sizeof(problem)];
} outcomes[64];

static void must(int result, const char *what)
{
	if (result == 0)
		return;
	perror(what);
	exit(2);
}

// Returns DIRECTORY/NAME with the number behind it; valid until the fourth call from now.
static const char *numbered(const char *directory, const char *name, size_t number)
{
	static char paths[4][512];
	static unsigned int next;
	char *path = paths[next++ % 4];

	snprintf(path, sizeof(paths[0]), "%s/%s-%zu", directory, name, number);
	return path;
}

// Every scenario has an upper directory of its own, and "merged-0" below `scratch` for a while.
static void mount_overlay(const char *options, const char *lower, const char *scratch,
			  size_t number)
{
	const char *merged = numbered(scratch, "merged", 0);
	bool is_plain = strcmp(options, "plain") == 0;
	char words[4096];

	snprintf(words, sizeof(words), "lowerdir=%s,upperdir=%s,workdir=%s%s%s", lower,
		 numbered(scratch, "upper", number), numbered(scratch, "work", number),
		 is_plain ? "" : ",", is_plain ? "" : options);
	must(mount("overlay", merged, "overlay", 0, words), words);
	must(chdir(merged), merged);
}

static void unmount_overlay(const char *scratch)
{
	must(chdir("/"), "/");
	must(umount2(numbered(scratch, "merged", 0), 0), "umount");
}

// Keeps the first problem of a scenario and when it was seen.
static void keep_problem(size_t number, const char *when)
{
	char *kept = outcomes[number].problem;

	if (problem[0] && !kept[0])
		snprintf(kept, sizeof(outcomes[0].problem), " FAILED: %.400s, %s", problem, when);
	problem[0] = '\0';
}

static void check(size_t number, int checks)
{
	bool is_about_attributes = strncmp(scenarios[number].name, "setxattr", 8) == 0;

	verify(outcomes[number].error ? nothing : scenarios[number].after,
	       checks | (is_about_attributes ? ATTRIBUTES : 0));
}

static void act(const char *options, size_t number)
{
	outcomes[number].error = scenarios[number].act() ? errno : 0;
	check(number, strstr(options, "nfs_export=on") ? 0 : LINK_COUNTS);
	keep_problem(number, "at once");
}

static void recheck(size_t number)
{
	if (outcomes[number].error == 0 && scenarios[number].recheck())
		complain("%s", strerror(errno));
	keep_problem(number, "looked at again");
}

static void act_again(size_t number)
{
	const struct scenario *scenario = &scenarios[number];

	if (scenario->recheck && scenario->rechecks_first)
		recheck(number);
	check(number, 0);
	keep_problem(number, "mounted again");
	if (scenario->recheck && !scenario->rechecks_first)
		recheck(number);
}

static void drop_inodes(void)
{
	int fd = open("/proc/sys/vm/drop_caches", O_WRONLY | O_CLOEXEC);

	must(fd >= 0 && write(fd, "2", 1) == 1 ? 0 : -1, "drop_caches");
	close(fd);
}

static void print_outcome(const char *options, size_t number)
{
	printf("%s %s %d%s\n", options, scenarios[number].name, outcomes[number].error,
	       outcomes[number].problem);
}

static void run(const char *options, const char *lower, const char *scratch)
{
	must(mount("scratch", scratch, "tmpfs", 0, NULL), scratch);
	must(mkdir(numbered(scratch, "merged", 0), 0755), "merged");
	for (size_t i = 0; i < num_scenarios; i++) {
		must(mkdir(numbered(scratch, "upper", i), 0755), "upper");
		must(mkdir(numbered(scratch, "work", i), 0755), "work");
		mount_overlay(options, lower, scratch, i);
		act(options, i);
		unmount_overlay(scratch);
	}
	drop_inodes();
	for (size_t i = 0; i < num_scenarios; i++) {
		if (scenarios[i].rechecks_first)
			drop_inodes();
		mount_overlay(options, lower, scratch, i);
		act_again(i);
		unmount_overlay(scratch);
		print_outcome(options, i);
	}
	must(umount2(scratch, 0), "umount");
}

static void run_in_lower(const char *lower)
{
	must(chdir(lower), lower);
	for (size_t i = 0; i < num_scenarios; i++) {
		if (!scenarios[i].only_reads)
			continue;
		act("none", i);
		if (scenarios[i].recheck) {
			drop_inodes();
			recheck(i);
		}
		print_outcome("none", i);
	}
}

// What a copy of this program does: writes a byte and waits for the end of its input, or nothing.
static int be_a_program(const char *mode)
{
	char byte = 'r';

	if (strcmp(mode, "wait") == 0)
		return write(1, &byte, 1) == 1 && read(0, &byte, 1) == 0 ? 0 : 1;
	return 0;
}

int main(int argc, char **argv)
{
	const char *command = argc > 1 ? argv[1] : "";

	packages[0] = argc > 2 ? argv[argc - 2] : NULL;
	packages[1] = argc > 2 ? argv[argc - 1] : NULL;
	umask(0);
	if (strcmp(command, "be") == 0 && argc == 3)
		return be_a_program(argv[2]);
	if (strcmp(command, "make") == 0 && argc == 3)
		make_package(argv[2]);
	else if (strcmp(command, "run") == 0 && argc == 7)
		run(argv[2], argv[3], argv[4]);
	else if (strcmp(command, "read") == 0 && argc == 5)
		run_in_lower(argv[2]);
	else
		return 2;
	return fflush(stdout) ? 1 : 0;
}
