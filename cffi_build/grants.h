/* Reading the grants of a session; not part of the cdef. */
#ifndef GRANTS_H
#define GRANTS_H
#include "image_view.h"

enum { ROOT_NODEID = 1 };

/* The root node of a granted path; what it points to is valid until the next call. */
struct grant {
	uint64_t base, span;
	uint64_t size;			/* as the node states it */
	uint32_t kind;
	const uint8_t *digest;
	struct eng_bytes record, target;
};

/* Both return 1 and the grant, or 0: there is none that this process can see and use. */
int grants_by_nodeid(struct eng_grants *grants, uint64_t nodeid, struct grant *ret);
int grants_by_name(struct eng_grants *grants, const uint8_t *name, uint32_t size,
		   struct grant *ret);
/* Whether the root directory is a store path, and not the directory of their names. */
int grants_have_root(const struct eng_grants *grants);
/* The number of grants that were revoked. */
uint64_t grants_revoked_num(const struct eng_grants *grants);
/* How many blob files each worker of the session may hold open. */
uint64_t grants_open_files(const struct eng_grants *grants);
#endif
