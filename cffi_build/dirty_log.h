/*
 * The dirty log: a bitmap in which a front-end that saves or moves its guest finds the pages of guest
 * memory that were written (vhost-user: Migration). This file is the cffi cdef, too; see engine.h.
 */
#ifndef DIRTY_LOG_H
#define DIRTY_LOG_H
#include "engine.h"

/*
 * Both are called after the write, and mark every page that the bytes touch. They return 0, or -1 if
 * the log of `log_size` bytes has no bit for one of the pages.
 */
int eng_log_guest(uint8_t *log, uint64_t log_size, uint64_t gpa, uint64_t size);
/* `size` bytes of the writable part of the chain in `slot`, from `offset` on. */
int eng_log_slot(uint8_t *log, uint64_t log_size, const struct eng_ring *ring, uint32_t slot,
		 uint64_t offset, uint64_t size);

#endif
