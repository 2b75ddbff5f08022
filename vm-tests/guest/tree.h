// A file tree read whole: what each entry is and the hash of what it holds, as lines of text.

#ifndef GUEST_TREE_H
#define GUEST_TREE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <openssl/sha.h>
#include <sys/stat.h>

// Hashes an open file; returns 0 or an errno.
typedef int hash_function(int fd, off_t size, SHA256_CTX *sum);

struct entry {
	char *name; // below the walked directory; "." for itself
	char *content;
	struct stat stat;
	int error;
};

struct tree {
	struct entry *entries; // sorted by name once read
	size_t count, capacity;
	const char *directory;
	hash_function *hash;
	int open_flags;
	_Atomic size_t next; // the entry the next idle thread takes
};

// Ends the program with a message and the text of errno.
void die(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

char type_letter(mode_t mode);

// Sets how files are read: "read", "mmap", "direct" or "sendfile"; ends the program otherwise.
void tree_choose_mode(struct tree *tree, const char *mode);

// Walks tree->directory without following symlinks and reads its files in `jobs` threads.
void tree_read(struct tree *tree, int jobs);

// Makes the tree as empty as before tree_read().
void tree_forget(struct tree *tree);

// Returns the hash of all records, to be freed, and writes them to `output` unless that is NULL.
char *tree_digest(const struct tree *tree, bool is_normalised, FILE *output);

#endif
