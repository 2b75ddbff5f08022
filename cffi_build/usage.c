/* What was used of a cache, each entry once, until Python reports it. */
#include "usage.h"

#include <string.h>

#define REPORT_EVERY_NS 1000000000u
#define SLOTS ((uint32_t)(sizeof(((struct eng_usage *)0)->slot) / sizeof(uint16_t)))

_Static_assert(SLOTS >= 2 * ENG_USED_MAX, "a search ends at a free slot");

void usage_note(struct eng_usage *usage, uint32_t kind, const uint8_t *digest)
{
	uint32_t slot;

	if (!usage->is_kept[kind] || usage->num == ENG_USED_MAX)
		return;
	/* A digest is as good as a hash. */
	memcpy(&slot, digest, sizeof(slot));
	for (slot %= SLOTS; usage->slot[slot]; slot = (slot + 1) % SLOTS) {
		const struct eng_used *used = &usage->used[usage->slot[slot] - 1];

		if (used->kind == kind && !memcmp(used->digest, digest, ENG_DIGEST_SIZE))
			return;
	}
	usage->used[usage->num].kind = kind;
	memcpy(usage->used[usage->num].digest, digest, ENG_DIGEST_SIZE);
	usage->slot[slot] = (uint16_t)++usage->num;
}

int eng_usage_is_due(const struct eng_usage *usage, uint64_t now_ns)
{
	return usage->num == ENG_USED_MAX ||
	       (usage->num && now_ns - usage->reported_ns >= REPORT_EVERY_NS);
}

void eng_usage_clear(struct eng_usage *usage, uint64_t now_ns)
{
	usage->num = 0;
	usage->reported_ns = now_ns;
	memset(usage->slot, 0, sizeof(usage->slot));
}
