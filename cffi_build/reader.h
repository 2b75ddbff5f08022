/*
 * The reader of an import: small files into a ring, each framed as an entry of a NAR; and what else an
 * import needs of the file system (files.c).
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
	/* set for each tree */
	int32_t root;		/* descriptor of the directory below which everything is opened */
	int32_t directory;	/* of the one that names are in, or negative; the reader opens and closes it */
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
 * Serves `requests`, which end with a NUL each, and returns the bytes of them that it is done with. One
 * that begins with a slash, and not with two, names the directory, by its path from the root, of the
 * files that follow; any other is the name of a file to read. It stops where the records or the room
 * are used up, and before a request that it refuses: two slashes, no regular file, too large, changed
 * while it was read, or any error.
 */
size_t reader_read(struct reader *reader, const char *requests, size_t size);

/*
 * Opens `path`, of any length, below the directory `root`, itself if it is empty; it and all on the way
 * to it must be no symlinks. Returns a descriptor, which is the caller's, or a negative errno.
 */
int reader_open(int root, const char *path, int flags);

/*
 * Puts the next entries of the open directory into `to`, in no order: name, NUL, a letter for the kind,
 * slash. Returns their bytes, 0 at the end, or a negative errno. `size` is 32 KiB at least.
 */
int reader_list(int directory, char *to, size_t size);

enum {
	READER_FILE = 'f',
	READER_DIRECTORY = 'd',
	READER_SYMLINK = 'l',
	READER_OTHER = 'o',	/* or not known */
};

/*
 * Writes `data` at `offset`, a multiple of the block size of 4 KiB, but for blocks of zeros: they stay
 * holes in a new file, whose size the caller sets. Returns 0 or a negative errno.
 */
int reader_write_sparse(int fd, const uint8_t *data, size_t size, uint64_t offset);
#endif
