// The tree that conformance.c checks, and what both halves of the program need.

#ifndef GUEST_CONFORMANCE_H
#define GUEST_CONFORMANCE_H

#include <errno.h>
#include <stddef.h>

#define MANY 1000	   // entries in "many"
#define DEPTH 40	   // directories below "deep"
#define LONG_NAME_SIZE 255
#define NUM_SIZES 12

// Of the files in "sizes".
extern const size_t sizes[NUM_SIZES];

// Ends the check with a message.
void fail(const char *expression, int line) __attribute__((noreturn));

#define WANT(expression) ((expression) ? (void)0 : fail(#expression, __LINE__))

// The byte at `offset` of a file of `size` bytes.
unsigned char byte_at(size_t size, size_t offset);

// The path of a file in "sizes"; valid until the next call.
const char *sized_name(size_t size);

const char *long_name(void);

// Makes the tree in the working directory.
void make_tree(void);

#endif
