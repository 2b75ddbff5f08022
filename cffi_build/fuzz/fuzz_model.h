/* The chains of a ring, read again by the rules of VIRTIO 1.3, 2.7.5, without the engine. */
#ifndef FUZZ_MODEL_H
#define FUZZ_MODEL_H
#include "fuzz_world.h"

/* What the engine must make of a chain: the ENG_E* code of the rule that it breaks, or 0 and its sizes. */
struct model_chain {
	int code;
	int has_writable, is_indirect;
	uint64_t readable, writable;
};

/* The ring lies where world_new_ring() has put it, and nobody changes guest memory meanwhile. */
struct model_chain model_chain_at(const struct world *world, uint32_t head);
/* `num` is what eng_ring_pop() has returned; `before` was the index of the next chain before that. */
void model_check_pop(const struct world *world, uint16_t before, uint32_t limit, int num);
void model_check_slot(const struct world *world, uint32_t slot);
#endif
