/* The dirty log of the fuzzers of rings. */
#ifndef FUZZ_LOG_H
#define FUZZ_LOG_H
#include "dirty_log.h"
#include "fuzz_world.h"

/*
 * Logs what was written to a slot in a log of `log_size` bytes, and compares it, bit by bit, with the pages
 * of the guest addresses that belong to these bytes.
 */
void log_slot(const struct world *world, uint32_t slot, uint64_t offset, uint64_t size, uint64_t log_size);
#endif
