/* Which system calls filters have refused; part of the cdef. */
#ifndef REFUSED_H
#define REFUSED_H
#include <stdint.h>

enum { ENG_REFUSALS = 64 };

/* The last system calls that filters refused: number << 32 | pid; 0: none. In shared memory. */
struct eng_refusals {
	uint32_t next, padding;
	uint64_t entry[ENG_REFUSALS];
};

/*
 * Handles SIGSYS in this process and its children by an entry in `shared`, and death. Returns 0, or -1
 * with errno.
 */
int eng_note_refusals(struct eng_refusals *shared);

#endif
