/*
 * The builder of directory images. An image holds the READDIRPLUS records of one castore Directory,
 * ready to send, and tables to search them; appliance/images/layout.py describes it.
 *
 * This file is also the cdef that cffi reads, as engine.h is. The caller owns every buffer that is
 * passed. Nothing is allocated. Functions return 0 or a negated IMG_E* code.
 */
#ifndef IMAGES_H
#define IMAGES_H
#include <stddef.h>
#include <stdint.h>

enum {
	IMG_MAGIC = 0x31474d49,		/* "IMG1" */
	IMG_HEADER_SIZE = 48,
	IMG_PIECE_ENTRIES = 8192,	/* the largest number of entries of a piece */
};

enum img_error {
	IMG_EENCODING = 1,	/* not the canonical encoding of a Directory */
	IMG_ENAME,		/* a name that no entry can have */
	IMG_EORDER,		/* names that are not sorted or not unique */
	IMG_EDIGEST,		/* a digest that is not 32 bytes long */
	IMG_ETARGET,		/* a symlink target that is empty, too long or has a NUL */
	IMG_ESPAN,		/* sizes whose sum does not fit in 64 bits */
	IMG_EROOM,		/* a piece that does not fit in the buffer */
};

/* One entry, pointing into the encoding. */
struct img_entry {
	const uint8_t *name, *digest, *target;
	uint32_t name_size, target_size;
	uint64_t size;		/* as the node states it */
	uint32_t kind;		/* 'd', 'f', 'x' or 'l' */
};

/* A reader of the entries of one type; `entry` is the next one, unless `is_done` is set. */
struct img_list {
	const uint8_t *at, *end;
	uint32_t field;
	uint32_t is_done;
	struct img_entry entry;
};

/* Makes the pieces of one Directory, one after the other. The encoding must not move meanwhile. */
struct img_builder {
	struct img_list list[3];
	uint64_t total;		/* entries */
	uint64_t span;		/* places that they take */
	uint64_t place;		/* of the next entry, relative to the directory's */
	uint32_t index;		/* of the next entry */
	uint32_t pieces_num;
};

/* Checks the whole encoding. The first piece comes next. */
int img_builder_init(struct img_builder *ret, const uint8_t *encoded, size_t size);

/* Returns the size of the next piece in bytes, or a negated IMG_EROOM if 32 bits cannot hold it. */
int64_t img_piece_size(const struct img_builder *builder);

/* Writes the next piece, whose size must be exactly `size`, and moves on to the one after it. */
int img_piece_write(struct img_builder *builder, uint8_t *to, size_t size);
#endif
