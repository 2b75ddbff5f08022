/* From nodeids to nodes; not part of the cdef. */
#ifndef PLACES_H
#define PLACES_H
#include "grants.h"

/* A node of a granted path; `target` is valid until the next call, and of symlinks only. */
struct node {
	uint64_t nodeid;
	uint64_t size;			/* st_size; of a directory, as its node states it */
	uint64_t ino, parent_ino;
	uint32_t kind;
	uint8_t digest[ENG_DIGEST_SIZE];
	uint8_t entry[ENG_NODE_ENTRY_SIZE];	/* the answer to a LOOKUP of it */
	struct eng_bytes target;
};

/* Functions return 0, or -1 if what is asked for is not there or not as it should be. */
int places_node(struct eng_places *places, uint64_t nodeid, struct node *ret);
/* The first piece of the image of a directory, once it was found to fit what the node states. */
int places_image(struct eng_places *places, const struct node *directory, struct eng_image *ret);
/* A piece of an image by its number. */
int places_piece(struct eng_places *places, const struct node *directory, uint32_t number,
		 struct eng_image *ret);
/* The answer to a LOOKUP of an entry of a directory. */
void places_entry_out(const struct eng_places *places, const struct node *directory,
		      const struct image_entry *entry, uint8_t ret[ENG_NODE_ENTRY_SIZE]);
uint64_t places_ino(const struct eng_places *places, const struct node *directory,
		    const struct image_entry *entry);
/* Drops what is cached if a grant was revoked meanwhile, and what was seen in an older snapshot. */
void places_begin(struct eng_places *places);
#endif
