/* What was used of a cache; not part of the cdef. */
#ifndef USAGE_H
#define USAGE_H
#include "answers.h"

/* Notes that an entry was used, if that is to be kept and there is room; `kind` is an eng_used_kind. */
void usage_note(struct eng_usage *usage, uint32_t kind, const uint8_t *digest, uint64_t segment,
		uint64_t size);
/* The same of `length` bytes, at least one, from `offset` on of a blob that has `size`. */
void usage_note_read(struct eng_usage *usage, const uint8_t *digest, uint64_t size, uint64_t offset,
		     uint64_t length);
#endif
