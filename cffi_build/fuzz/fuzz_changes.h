/* What a hostile guest and front-end write, chosen by random bits. */
#ifndef FUZZ_CHANGES_H
#define FUZZ_CHANGES_H
#include "fuzz_world.h"

/*
 * Changes a descriptor, a word of the available ring or a byte of the record. What is written while the
 * device runs (`is_racing`) makes no buffer writable that lies before WORLD_TABLES, between
 * WORLD_TABLES_END and WORLD_BUFFERS, or in the used ring, whichever words of two changes the device reads.
 */
void change(struct world *world, uint64_t bits, int is_racing);
void change_record(struct world *world, uint64_t bits);
uint64_t next_random(uint64_t *state);
#endif
