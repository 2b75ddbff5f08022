/*
 * The builder of directory images: ready READDIRPLUS records and search tables of one castore
 * Directory. appliance/images/images.py describes the layout.
 *
 * This file is the cffi cdef, too, as engine.h is. The caller owns every buffer named here, and
 * nothing is allocated. Functions return 0 or a negated IMG_E* code.
 */
#ifndef IMAGES_H
#define IMAGES_H
#include <stddef.h>
#include <stdint.h>

enum {
	IMG_MAGIC = 0x31474d49,		/* "IMG1" */
	IMG_HEADER_SIZE = 48,
	IMG_PIECE_ENTRIES = 8192,	/* entries of a piece at the most */
};

enum img_error {
	IMG_EENCODING = 1,	/* not the canonical encoding of a Directory */
	IMG_ENAME,		/* a name that no entry can have */
	IMG_EORDER,		/* names that are not sorted, or not unique */
	IMG_EDIGEST,		/* a digest that is not 32 bytes long */
	IMG_ETARGET,		/* a symlink target that is empty, too long or has a NUL */
	IMG_ESPAN,		/* sizes that add up to more than 64 bits */
	IMG_EROOM,		/* the piece does not fit the buffer */
};

/* One entry, pointing into the encoding. */
struct img_entry {
	const uint8_t *name, *digest, *target;
	uint32_t name_size, target_size;
	uint64_t size;		/* as the node states it */
	uint32_t kind;		/* 'd', 'f', 'x' or 'l' */
};

/* A list of entries of one type that is being read: `entry` is the next one unless `is_done`. */
struct img_list {
	const uint8_t *at, *end;
	uint32_t field;
	uint32_t is_done;
	struct img_entry entry;
};

/* A Directory from which pieces are made one after the other; the encoding must stay in place. */
struct img_builder {
	struct img_list list[3];
	uint64_t total;		/* entries */
	uint64_t span;		/* places that they take */
	uint64_t place;		/* of the next entry, relative to the directory's */
	uint32_t index;		/* of the next entry */
	uint32_t pieces_num;
};

/* Checks all of `encoded` and stands before the first piece. */
int img_builder_init(struct img_builder *ret, const uint8_t *encoded, size_t size);

/* Returns the size of the next piece, or a negated IMG_EROOM if it would outgrow 32 bits. */
int64_t img_piece_size(const struct img_builder *builder);

/* Writes the next piece, which has exactly `size` bytes, and stands behind it. */
int img_piece_write(struct img_builder *builder, uint8_t *to, size_t size);
#endif
