/* What was used, each entry once, until Python reports it. */
#include "usage.h"

#include <string.h>

#define REPORT_EVERY_NS 1000000000u
#define RECORD_EVERY_NS 100000000u
#define SLOTS ((uint32_t)(sizeof(((struct eng_usage *)0)->slot) / sizeof(uint16_t)))

_Static_assert(SLOTS >= 2 * ENG_USED_MAX, "a search ends at a free slot");

static void note(struct eng_usage *usage, uint32_t kind, const uint8_t *digest, uint32_t segment,
		 uint64_t size)
{
	uint32_t slot;

	if (!usage->is_kept[kind] || usage->num == ENG_USED_MAX)
		return;
	/* A digest is as good as a hash. */
	memcpy(&slot, digest, sizeof(slot));
	slot += segment;
	for (slot %= SLOTS; usage->slot[slot]; slot = (slot + 1) % SLOTS) {
		const struct eng_used *used = &usage->used[usage->slot[slot] - 1];

		if (used->kind == kind && used->segment == segment &&
		    !memcmp(used->digest, digest, ENG_DIGEST_SIZE))
			return;
	}
	usage->used[usage->num].kind = kind;
	usage->used[usage->num].segment = segment;
	usage->used[usage->num].size = size;
	usage->used[usage->num].used_ns = usage->now_ns;
	memcpy(usage->used[usage->num].digest, digest, ENG_DIGEST_SIZE);
	usage->slot[slot] = (uint16_t)++usage->num;
}

void usage_note(struct eng_usage *usage, uint32_t kind, const uint8_t *digest)
{
	note(usage, kind, digest, 0, 0);
}

void usage_note_read(struct eng_usage *usage, const uint8_t *digest, uint64_t size, uint64_t offset,
		     uint64_t length)
{
	uint64_t segment = 0, last = 0;

	if (!usage->is_kept[ENG_USED_BLOB])
		return;
	if (usage->is_recorded) {
		segment = offset / ENG_SEGMENT_SIZE;
		last = (offset + length - 1) / ENG_SEGMENT_SIZE;
		/* Behind 2^50 bytes, nothing is recorded. */
		if (last > UINT32_MAX)
			return;
	}
	for (; segment <= last; segment++)
		note(usage, ENG_USED_BLOB, digest, (uint32_t)segment, size);
}

int eng_usage_is_due(const struct eng_usage *usage, uint64_t now_ns)
{
	if (usage->is_recorded)
		return usage->num >= ENG_USED_MAX / 2 ||
		       (usage->num && now_ns - usage->reported_ns >= RECORD_EVERY_NS);
	return usage->num == ENG_USED_MAX ||
	       (usage->num && now_ns - usage->reported_ns >= REPORT_EVERY_NS);
}

int usage_wait_ms(const struct eng_usage *usage)
{
	return usage->is_recorded && usage->num ? (int)(RECORD_EVERY_NS / 1000000) : -1;
}

void eng_usage_clear(struct eng_usage *usage, uint64_t now_ns)
{
	usage->num = 0;
	usage->reported_ns = now_ns;
	memset(usage->slot, 0, sizeof(usage->slot));
}
