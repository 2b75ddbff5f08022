/* Clock and request statistics; not part of the cdef. */
#ifndef STATISTICS_H
#define STATISTICS_H
#include "answers.h"

#include <time.h>

/* CLOCK_MONOTONIC, which the vDSO reads without a system call. */
static inline uint64_t statistics_now_ns(void)
{
	struct timespec now;

	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Counts a request that was answered here `ns` after it was taken. */
static inline void statistics_add(struct eng_statistics *statistics, uint32_t opcode, uint64_t ns)
{
	uint32_t log2 = 63u - (uint32_t)__builtin_clzll(ns | 1);

	if (opcode >= ENG_OPCODES)
		opcode = 0;
	if (log2 >= ENG_LATENCY_BUCKETS)
		log2 = ENG_LATENCY_BUCKETS - 1;
	statistics->requests[opcode]++;
	statistics->latency[opcode][log2]++;
	statistics->plain_num++;
}
#endif
