/*
 * Guest memory for the fuzzers of rings: files that are mapped as a front-end's are, the fuzzer's own
 * view of them, and what the device may have written.
 */
#ifndef FUZZ_WORLD_H
#define FUZZ_WORLD_H
#include "engine.h"
#include "fuzz.h"

enum {
	WORLD_NUM = 16,			/* entries of the ring, and of the record */
	WORLD_FILES = 2,
	WORLD_FILE_SIZE = 0x8000,
	WORLD_PLACES = 6,
	WORLD_RECORD_SIZE = 16 + 16 * WORLD_NUM,
	WORLD_CALLS = 6,

	/* Guest addresses, in the first place. What lies between them belongs to nobody. */
	WORLD_DESC = 0x10000,
	WORLD_AVAIL = 0x10100,
	WORLD_USED = 0x10180,
	WORLD_USED_SIZE = 6 + 8 * WORLD_NUM,
	WORLD_TABLES = 0x10400,		/* indirect ones */
	WORLD_TABLES_NUM = 4,
	WORLD_TABLE_DESCS = 8,
	WORLD_TABLES_END = 0x10800,
	WORLD_BUFFERS = 0x11000,	/* and all other places */
	WORLD_EDGE = 0x12300,		/* where the second place begins */
};

/* Of the first place, and of the others in part. */
#define WORLD_USER(gpa) (0x7f0000000000u + (gpa))

/* A region that may be mapped, and where its bytes are. */
struct world_place {
	uint64_t gpa, size, user_addr, offset;
	uint32_t file;
};

extern const struct world_place WORLD_PLACE[WORLD_PLACES];

struct world {
	struct eng_map map;
	struct eng_ring ring;
	struct eng_inflight *record;	/* ends where memory that cannot be touched begins */
	uint8_t *record_page;
	int fd[WORLD_FILES];
	int call[WORLD_CALLS];		/* one of each kind; the last one is no descriptor */
	int source;			/* a file of WORLD_SOURCE_SIZE bytes to read from */
	uint32_t is_mapped[WORLD_PLACES];
	/* Of each file: what it holds, what it held when it was last compared, what may change. */
	uint8_t *view[WORLD_FILES], *shadow[WORLD_FILES], *allowed[WORLD_FILES];
};

enum { WORLD_SOURCE_SIZE = 5000, WORLD_SOURCE_BYTE = 0xa5 };

/* Makes what outlives an input, once, and clears it; all places but the last two are mapped. */
void world_begin(struct world *world);
void world_end(struct world *world);
void world_map(struct world *world, uint32_t place);
void world_unmap(struct world *world, uint32_t place);
/* Maps until there is no room, and what cannot be mapped; then unmaps all of that. */
void world_fill(struct world *world);
/* A ring over the record, as a new process makes it: started next. */
void world_new_ring(struct world *world);
/* Whether the ring lies where world_new_ring() has put it. */
int world_is_plain(const struct world *world);

/* What the fuzzer itself writes, as guest or front-end; bytes outside all places are left out. */
void world_write(struct world *world, uint64_t gpa, const void *data, uint64_t size);
/* The same for 2 or 8 aligned bytes in one store, while the device may read them. */
void world_store(struct world *world, uint64_t gpa, uint64_t value, uint32_t size);
/* Reads guest memory; returns 0 if part of it is outside all places. */
int world_read(const struct world *world, uint64_t gpa, void *data, uint64_t size);
uint16_t world_word(const struct world *world, uint64_t gpa);

void world_allow(struct world *world, uint64_t gpa, uint64_t size);
void world_allow_nothing(struct world *world);
/* Allows the used ring and whatever can be read as a writable descriptor of the ring now. */
void world_allow_offered(struct world *world);
/* The device has written nowhere else. */
void world_check(struct world *world);
/* What was popped into a slot adds up, and lies in what is mapped. */
void world_check_slot(const struct world *world, uint32_t slot);
#endif
