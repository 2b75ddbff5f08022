/* What was used of a cache; not part of the cdef. */
#ifndef USAGE_H
#define USAGE_H
#include "answers.h"

/* Notes that an entry was used, if that is to be kept and there is room; `kind` is an eng_used_kind. */
void usage_note(struct eng_usage *usage, uint32_t kind, const uint8_t *digest);
#endif
