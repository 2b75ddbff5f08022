/* What was used, each entry once, until Python reports it. */
#include "usage.h"

#include <string.h>

#define SLOTS ((uint32_t)(sizeof(((struct eng_usage *)0)->slot) / sizeof(uint16_t)))

_Static_assert(SLOTS >= 2 * ENG_USED_MAX, "a search ends at a free slot");

void usage_note(struct eng_usage *usage, uint32_t kind, const uint8_t *digest, uint64_t segment,
		uint64_t size)
{
	uint32_t slot;

	if (!usage->is_kept[kind] || usage->num == ENG_USED_MAX)
		return;
	/* A digest is as good as a hash. */
	memcpy(&slot, digest, sizeof(slot));
	for (slot = (slot + (uint32_t)segment) % SLOTS; usage->slot[slot]; slot = (slot + 1) % SLOTS) {
		const struct eng_used *used = &usage->used[usage->slot[slot] - 1];

		if (used->kind == kind && used->segment == segment &&
		    !memcmp(used->digest, digest, ENG_DIGEST_SIZE))
			return;
	}
	usage->used[usage->num] = (struct eng_used){ kind, segment, size, usage->now_ns, { 0 } };
	memcpy(usage->used[usage->num].digest, digest, ENG_DIGEST_SIZE);
	usage->slot[slot] = (uint16_t)++usage->num;
}

void usage_note_read(struct eng_usage *usage, const uint8_t *digest, uint64_t size, uint64_t offset,
		     uint64_t length)
{
	for (uint64_t at = offset >> usage->shift; at <= (offset + length - 1) >> usage->shift; at++)
		usage_note(usage, ENG_USED_BLOB, digest, at, size);
}

int eng_usage_is_due(const struct eng_usage *usage, uint64_t now_ns)
{
	return usage->num >= ENG_USED_MAX / 2 ||
	       (usage->num && now_ns - usage->reported_ns >= usage->every_ns);
}

void eng_usage_clear(struct eng_usage *usage, uint64_t now_ns)
{
	usage->num = 0;
	usage->reported_ns = now_ns;
	memset(usage->slot, 0, sizeof(usage->slot));
}
