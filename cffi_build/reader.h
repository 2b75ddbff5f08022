/*
 * The reader of an import: small files into a ring, each framed as an entry of a NAR.
 *
 * This file is the cffi cdef, too, as engine.h is. The caller owns every buffer named here.
 */
#ifndef READER_H
#define READER_H
#include <stddef.h>
#include <stdint.h>

/* What one file came to; HASH_RECORD of importer/records.py. */
struct reader_record {
	uint8_t kind;		/* stays 0, as the other fields that are not named below */
	uint8_t executable;
	uint16_t lead;		/* bytes of the frame before the content */
	uint32_t offset;	/* of the content in the ring */
	uint32_t size;
	uint32_t used;		/* bytes of the ring that this takes, the skipped ones included */
	uint64_t file_size;
	uint32_t staged;
	uint32_t frame_size;
	uint8_t digest[32];
};

/* A run of tokens of a NAR. */
struct reader_token {
	const uint8_t *bytes;
	uint32_t size;
};

struct reader {
	/* set once */
	struct reader_token entry, node, regular, executable, close;
	uint8_t kind;		/* what the records get */
	uint32_t file_max;	/* larger files are refused */
	/* set before each call */
	uint8_t *ring;
	uint32_t position;	/* where the next frame goes */
	uint32_t room;		/* bytes from there on that may be written */
	uint32_t skipped;	/* bytes before it that the first record takes along */
	struct reader_record *records;
	uint32_t records_max;
	/* set by the call, as are position, room and skipped */
	uint32_t records_num;
	uint32_t is_refused;	/* the next path is not for this reader; it was left alone */
};

/*
 * Reads the files named in `paths`, which end with a NUL each, and returns the bytes of `paths` that
 * it is done with. It stops where the records or the room are used up, and before a path that it
 * refuses: no regular file, too large, changed while it was read, or any error.
 */
size_t reader_read(struct reader *reader, const char *paths, size_t size);
#endif
