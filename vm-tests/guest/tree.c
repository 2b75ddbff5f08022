// Reads a file tree; see tree.h, and probe.c for the records.

#define _GNU_SOURCE
#define OPENSSL_API_COMPAT 0x10100000L // the plain SHA256_*: the EVP layer is not wanted statically
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <unistd.h>

#include "tree.h"

enum { CHUNK = 1 << 20, DIRECT_ALIGN = 4096, HEX_SIZE = 2 * SHA256_DIGEST_LENGTH + 1 };

void die(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fputs("probe: ", stderr);
	vfprintf(stderr, format, arguments);
	fprintf(stderr, ": %s\n", strerror(errno));
	va_end(arguments);
	exit(2);
}

static void *must_allocate(void *old, size_t size)
{
	void *memory = realloc(old, size);

	if (!memory)
		die("%zu bytes of memory", size);
	return memory;
}

static char *join(const char *directory, const char *name)
{
	char *path;

	if (strcmp(directory, ".") == 0)
		path = strdup(name);
	else if (asprintf(&path, "%s/%s", directory, name) < 0)
		path = NULL;
	if (!path)
		die("memory for a path");
	return path;
}

static char *escape(const char *bytes, size_t size)
{
	char *text = must_allocate(NULL, 4 * size + 1), *next = text;

	for (size_t i = 0; i < size; i++) {
		unsigned char byte = (unsigned char)bytes[i];

		if (byte > 0x20 && byte < 0x7f && byte != '\\')
			*next++ = (char)byte;
		else
			next += sprintf(next, "\\x%02x", byte);
	}
	*next = '\0';
	return text;
}

static char *hex_digest(SHA256_CTX *sum)
{
	unsigned char digest[SHA256_DIGEST_LENGTH];
	char *text = must_allocate(NULL, HEX_SIZE);

	SHA256_Final(digest, sum);
	for (int i = 0; i < SHA256_DIGEST_LENGTH; i++)
		sprintf(text + 2 * i, "%02x", digest[i]);
	return text;
}

// --- four ways to read a file; each returns 0 or an errno --------------------------------------

static int hash_read(int fd, off_t size, SHA256_CTX *sum)
{
	void *buffer = aligned_alloc(DIRECT_ALIGN, CHUNK);
	ssize_t done;

	(void)size;
	if (!buffer)
		return ENOMEM;
	while ((done = read(fd, buffer, CHUNK)) > 0)
		SHA256_Update(sum, buffer, (size_t)done);
	int error = done < 0 ? errno : 0;
	free(buffer);
	return error;
}

static int hash_mmap(int fd, off_t size, SHA256_CTX *sum)
{
	if (size == 0)
		return 0;
	void *memory = mmap(NULL, (size_t)size, PROT_READ, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED)
		return errno;
	SHA256_Update(sum, memory, (size_t)size);
	munmap(memory, (size_t)size);
	return 0;
}

static int drain_pipe(int fd, size_t size, SHA256_CTX *sum)
{
	char buffer[64 * 1024];

	while (size > 0) {
		ssize_t done = read(fd, buffer, size < sizeof(buffer) ? size : sizeof(buffer));

		if (done <= 0)
			return done < 0 ? errno : EPIPE;
		SHA256_Update(sum, buffer, (size_t)done);
		size -= (size_t)done;
	}
	return 0;
}

static int hash_sendfile(int fd, off_t size, SHA256_CTX *sum)
{
	int ends[2], error = 0;
	ssize_t done = 0;

	(void)size;
	if (pipe2(ends, O_CLOEXEC))
		return errno;
	// never more at once than an empty pipe takes, or it would block on itself
	while (!error && (done = sendfile(ends[1], fd, NULL, 64 * 1024)) > 0)
		error = drain_pipe(ends[0], (size_t)done, sum);
	if (done < 0)
		error = errno;
	close(ends[0]);
	close(ends[1]);
	return error;
}

void tree_choose_mode(struct tree *tree, const char *mode)
{
	tree->open_flags = O_RDONLY | O_NOFOLLOW | O_CLOEXEC;
	tree->hash = hash_read;
	if (strcmp(mode, "direct") == 0)
		tree->open_flags |= O_DIRECT;
	else if (strcmp(mode, "mmap") == 0)
		tree->hash = hash_mmap;
	else if (strcmp(mode, "sendfile") == 0)
		tree->hash = hash_sendfile;
	else if (strcmp(mode, "read") != 0) {
		fprintf(stderr, "probe: mode %s: read, mmap, direct or sendfile\n", mode);
		exit(2);
	}
}

// --- the walk ----------------------------------------------------------------------------------

static void add_entry(struct tree *tree, char *name)
{
	char *path = join(tree->directory, name);
	struct entry *entry;

	if (tree->count == tree->capacity) {
		tree->capacity = tree->capacity ? 2 * tree->capacity : 1024;
		tree->entries = must_allocate(tree->entries, tree->capacity * sizeof(*entry));
	}
	entry = &tree->entries[tree->count++];
	*entry = (struct entry){ .name = name };
	if (lstat(path, &entry->stat))
		entry->error = errno;
	free(path);
}

static void add_children(struct tree *tree, size_t parent)
{
	char *path = join(tree->directory, tree->entries[parent].name);
	DIR *stream = opendir(path);
	struct dirent *child;

	free(path);
	if (!stream) {
		tree->entries[parent].error = errno;
		return;
	}
	for (errno = 0; (child = readdir(stream)); errno = 0)
		if (strcmp(child->d_name, ".") && strcmp(child->d_name, ".."))
			add_entry(tree, join(tree->entries[parent].name, child->d_name));
	if (errno)
		tree->entries[parent].error = errno;
	closedir(stream);
}

static void read_entry(const struct tree *tree, struct entry *entry)
{
	char *path = join(tree->directory, entry->name);

	if (S_ISREG(entry->stat.st_mode)) {
		SHA256_CTX sum;
		int fd = open(path, tree->open_flags);

		SHA256_Init(&sum);
		entry->error = fd < 0 ? errno : tree->hash(fd, entry->stat.st_size, &sum);
		entry->content = hex_digest(&sum);
		if (fd >= 0)
			close(fd);
	} else if (S_ISLNK(entry->stat.st_mode)) {
		char target[PATH_MAX];
		ssize_t size = readlink(path, target, sizeof(target));

		entry->error = size < 0 ? errno : 0;
		entry->content = escape(target, size < 0 ? 0 : (size_t)size);
	}
	free(path);
}

static void *read_entries(void *argument)
{
	struct tree *tree = argument;
	size_t index;

	while ((index = atomic_fetch_add(&tree->next, 1)) < tree->count)
		if (!tree->entries[index].error)
			read_entry(tree, &tree->entries[index]);
	return NULL;
}

static int compare_names(const void *left, const void *right)
{
	return strcmp(((const struct entry *)left)->name, ((const struct entry *)right)->name);
}

void tree_read(struct tree *tree, int jobs)
{
	pthread_t *threads = must_allocate(NULL, (size_t)jobs * sizeof(*threads));

	tree->next = 0;
	add_entry(tree, join(".", "."));
	for (size_t i = 0; i < tree->count; i++)
		if (S_ISDIR(tree->entries[i].stat.st_mode))
			add_children(tree, i);
	for (int i = 0; i < jobs; i++)
		if ((errno = pthread_create(&threads[i], NULL, read_entries, tree)))
			die("thread %d", i);
	for (int i = 0; i < jobs; i++)
		pthread_join(threads[i], NULL);
	free(threads);
	qsort(tree->entries, tree->count, sizeof(*tree->entries), compare_names);
}

void tree_forget(struct tree *tree)
{
	for (size_t i = 0; i < tree->count; i++) {
		free(tree->entries[i].name);
		free(tree->entries[i].content);
	}
	tree->count = 0;
}

// --- records -----------------------------------------------------------------------------------

char type_letter(mode_t mode)
{
	return S_ISREG(mode) ? 'f' : S_ISDIR(mode) ? 'd' : S_ISLNK(mode) ? 'l' : '?';
}

static mode_t normalised_mode(mode_t mode)
{
	if (S_ISLNK(mode))
		return 0777;
	return S_ISDIR(mode) || (mode & S_IXUSR) ? 0555 : 0444;
}

static char *format_record(const struct entry *entry, bool is_normalised)
{
	const struct stat *stat = &entry->stat;
	mode_t mode = is_normalised ? normalised_mode(stat->st_mode) : stat->st_mode & 07777;
	off_t size = is_normalised && S_ISDIR(stat->st_mode) ? 0 : stat->st_size;
	nlink_t nlink = is_normalised ? 1 : stat->st_nlink;
	char *name = escape(entry->name, strlen(entry->name)), *record, failure[16];

	snprintf(failure, sizeof(failure), "!%d", entry->error);
	if (asprintf(&record, "%c %04o %jd %ju %s %s\n", type_letter(stat->st_mode), mode,
		     (intmax_t)size, (uintmax_t)nlink, name,
		     entry->error ? failure : entry->content ? entry->content : "-") < 0)
		die("memory for a record");
	free(name);
	return record;
}

char *tree_digest(const struct tree *tree, bool is_normalised, FILE *output)
{
	SHA256_CTX sum;

	SHA256_Init(&sum);
	for (size_t i = 0; i < tree->count; i++) {
		char *record = format_record(&tree->entries[i], is_normalised);

		SHA256_Update(&sum, record, strlen(record));
		if (output)
			fputs(record, output);
		free(record);
	}
	return hex_digest(&sum);
}
