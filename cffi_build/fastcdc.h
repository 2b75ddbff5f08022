/*
 * FastCDC, version 2020: where the content of a blob is cut into chunks, decided while it passes by.
 * [Xia et al., The Design of Fast Content-Defined Chunking for Data Deduplication Based Storage
 * Systems, IEEE TPDS 31 (2020); the crate `fastcdc` of Rust, module v2020, normalization level 1]
 *
 * This file is the cffi cdef, too, as engine.h is. The caller owns every buffer named here.
 */
#ifndef FASTCDC_H
#define FASTCDC_H
#include <stdint.h>

struct fastcdc {
	/* set once; min and normal are even, and 0 < min <= normal <= max */
	uint32_t min;
	uint32_t normal;
	uint32_t max;
	uint64_t mask_short;	/* where a chunk shorter than normal may end */
	uint64_t mask_long;	/* where a longer one may */
	/* zero at the start of a blob */
	uint64_t settled;	/* bytes of the blob of which it is known which chunk they belong to */
	uint64_t fingerprint;
	uint32_t length;	/* bytes of the current chunk that are settled */
	uint8_t held;		/* the byte after them, if is_held */
	uint8_t is_held;
};

/*
 * Takes the next `size` bytes of the blob, and puts the offset in the blob of each end of a chunk that
 * they show into `ends`, which has room for size / min + 2. Returns how many that are. The last byte may
 * be held, until the next one comes or the blob ends: then it belongs to the last chunk.
 */
uint32_t fastcdc_take(struct fastcdc *cdc, const uint8_t *data, uint64_t size, uint64_t *ends);
#endif
