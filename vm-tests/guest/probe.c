// What the tests ask of a file tree: run inside a guest, and on the host to hold both to one answer.
//
//   probe hash [-n] MODE DIR [JOBS]          one record per entry, in the order of the names
//   probe tree-digest [-n] MODE DIR [JOBS]   "DIGEST entries=N files=N bytes=N errors=N"
//   probe loop-read [-d] MODE DIR [JOBS]     reads all again and again until stdin ends; writes
//                                            "pass N" after each; status 1 if two passes differ
//   probe stat PATH...                       "ino=... mode=..." and so on, one line per path
//   probe stand DIR                          enters DIR; for each line on stdin "cwd=... ino=..."
//
// MODE: read, mmap, direct (O_DIRECT) or sendfile. JOBS threads read files (default 1).
// -n  normalised: what two stores of equal content agree on (see vmharness/tree.py)
// -d  drops the guest's caches before each pass
// Record: "TYPE MODE SIZE NLINK NAME CONTENT\n". CONTENT is the SHA-256 of a file, the target of a
// symlink, "-" otherwise, "!ERRNO" if it cannot be read. Names and targets are bytes with \xNN for
// all but printable ASCII and for the backslash.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tree.h"

static size_t print_summary(const struct tree *tree, const char *digest)
{
	size_t files = 0, errors = 0;
	intmax_t bytes = 0;

	for (size_t i = 0; i < tree->count; i++) {
		const struct entry *entry = &tree->entries[i];

		errors += entry->error != 0;
		files += S_ISREG(entry->stat.st_mode);
		bytes += S_ISREG(entry->stat.st_mode) ? entry->stat.st_size : 0;
	}
	printf("%s entries=%zu files=%zu bytes=%jd errors=%zu\n", digest, tree->count, files, bytes,
	       errors);
	return errors;
}

static void drop_caches(void)
{
	int fd = open("/proc/sys/vm/drop_caches", O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, "3", 1) != 1)
		die("/proc/sys/vm/drop_caches");
	close(fd);
}

static bool input_has_ended(void)
{
	struct pollfd input = { .fd = STDIN_FILENO, .events = POLLIN };
	char ignored[256];

	return poll(&input, 1, 0) > 0 && read(STDIN_FILENO, ignored, sizeof(ignored)) <= 0;
}

static int loop_read(struct tree *tree, int jobs, bool is_cold)
{
	char *first = NULL;
	bool is_equal = true;

	for (unsigned long pass = 1; is_equal && !(first && input_has_ended()); pass++) {
		char *digest;

		if (is_cold)
			drop_caches();
		tree_read(tree, jobs);
		digest = tree_digest(tree, false, NULL);
		is_equal = !first || strcmp(first, digest) == 0;
		printf("pass %lu %s\n", pass, digest);
		if (!is_equal)
			free(tree_digest(tree, false, stdout));
		fflush(stdout);
		tree_forget(tree);
		if (!first)
			first = digest;
		else
			free(digest);
	}
	free(first);
	return is_equal ? 0 : 1;
}

static int print_stat(char **paths)
{
	struct stat stat;
	int status = 0;

	for (; *paths; paths++) {
		if (lstat(*paths, &stat)) {
			printf("error=%d\n", errno);
			status = 1;
			continue;
		}
		printf("type=%c ino=%ju mode=%04o nlink=%ju size=%jd blocks=%jd blksize=%jd uid=%u gid=%u "
		       "mtime=%jd dev=%ju\n", type_letter(stat.st_mode), (uintmax_t)stat.st_ino,
		       stat.st_mode & 07777, (uintmax_t)stat.st_nlink, (intmax_t)stat.st_size,
		       (intmax_t)stat.st_blocks, (intmax_t)stat.st_blksize, stat.st_uid, stat.st_gid,
		       (intmax_t)stat.st_mtime, (uintmax_t)stat.st_dev);
	}
	return status;
}

static int stand(const char *directory)
{
	char line[256], cwd[PATH_MAX];
	struct stat here, parent;

	if (chdir(directory))
		die("%s", directory);
	for (puts("standing"); !fflush(stdout) && fgets(line, sizeof(line), stdin);) {
		if (!getcwd(cwd, sizeof(cwd)) || stat(".", &here) || stat("..", &parent))
			printf("error=%d\n", errno);
		else
			printf("cwd=%s ino=%ju parent=%ju\n", cwd, (uintmax_t)here.st_ino,
			       (uintmax_t)parent.st_ino);
	}
	return 0;
}

static int usage(void)
{
	fputs("usage: probe hash|tree-digest [-n] MODE DIR [JOBS]\n"
	      "       probe loop-read [-d] MODE DIR [JOBS]\n"
	      "       probe stat PATH...\n"
	      "       probe stand DIR\n", stderr);
	return 2;
}

int main(int argc, char **argv)
{
	struct tree tree = { 0 };
	const char *command = argc > 2 ? argv[1] : "";
	bool has_flag = argc > 2 && argv[2][0] == '-' && argv[2][1] && !argv[2][2];
	char **words = argv + 2 + has_flag;
	int count = argc - 2 - has_flag, jobs = count > 2 ? atoi(words[2]) : 1;

	if (strcmp(command, "stat") == 0)
		return print_stat(argv + 2);
	if (strcmp(command, "stand") == 0)
		return stand(argv[2]);
	if (count < 2 || count > 3 || jobs < 1)
		return usage();
	tree_choose_mode(&tree, words[0]);
	tree.directory = words[1];
	if (strcmp(command, "loop-read") == 0)
		return loop_read(&tree, jobs, has_flag && argv[2][1] == 'd');
	bool is_normalised = has_flag && argv[2][1] == 'n';
	bool is_listed = strcmp(command, "hash") == 0;
	if (!is_listed && strcmp(command, "tree-digest") != 0)
		return usage();
	tree_read(&tree, jobs);
	char *digest = tree_digest(&tree, is_normalised, is_listed ? stdout : NULL);
	if (is_listed)
		return 0;
	return print_summary(&tree, digest) ? 1 : 0;
}
