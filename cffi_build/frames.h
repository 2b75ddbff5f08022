/*
 * What a Directory comes to in a NAR: the tokens, names and targets of its entries, and between them
 * the places where contents of files and the bodies of subdirectories go; appliance/nix/nar_frames.py
 * describes it.
 *
 * This file is part of the cdef of images.h. The caller owns every buffer that is passed. Nothing is
 * allocated. Functions return 0 or a negated IMG_E* code.
 */
#ifndef FRAMES_H
#define FRAMES_H
#include "images.h"

/* A run of tokens. */
struct frame_token {
	const uint8_t *bytes;
	uint32_t size;
};

struct frame_tokens {
	struct frame_token directory, symlink, regular, executable, entry, node, close;
};

/* What goes between two parts of the structure. */
struct frame_item {
	uint64_t size;		/* of a content; as its node states it, of a subdirectory */
	uint32_t at;		/* bytes of structure before it */
	uint32_t kind;		/* 'f' or 'd' */
	uint8_t digest[32];
};

/* How much there is. */
struct frame_sizes {
	uint64_t entries_num, structure, contents;	/* the latter two in bytes */
	uint32_t items_num;
};

/* Checks the whole encoding. */
int frames_measure(struct frame_sizes *ret, const struct frame_tokens *tokens,
		   const uint8_t *encoded, size_t size);

/* Writes the structure and the items of an encoding that was measured. */
int frames_write(const struct frame_sizes *sizes, const struct frame_tokens *tokens,
		 const uint8_t *encoded, size_t size, uint8_t *structure, struct frame_item *items);
#endif
