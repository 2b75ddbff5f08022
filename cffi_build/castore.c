/*
 * Reading the canonical encoding of a castore Directory (castore.proto: Directory).
 *
 * The encoding may come from a peer or a damaged disk: every length is compared by subtraction with
 * what is left, and whatever is not canonical is refused.
 */
#include "castore.h"

#include <string.h>

#define DIGEST_SIZE 32u
#define NAME_SIZE_MAX 255u
#define TARGET_SIZE_MAX 4095u

enum wire_type { VARINT = 0, BYTES = 2 };

struct span {
	const uint8_t *at, *end;
};

static size_t left(const struct span *span)
{
	return (size_t)(span->end - span->at);
}

static int get_varint(struct span *span, uint64_t *ret)
{
	uint64_t value = 0;

	for (unsigned shift = 0; shift < 64; shift += 7) {
		uint8_t byte;

		if (span->at == span->end)
			return -IMG_EENCODING;
		byte = *span->at++;
		if (shift == 63 && byte > 1)
			return -IMG_EENCODING;
		value |= (uint64_t)(byte & 0x7f) << shift;
		if (byte < 0x80) {
			*ret = value;
			return byte || !shift ? 0 : -IMG_EENCODING;
		}
	}
	return -IMG_EENCODING;
}

static int get_bytes(struct span *span, struct span *ret)
{
	uint64_t size;
	int error = get_varint(span, &size);

	if (error)
		return error;
	if (size > left(span))
		return -IMG_EENCODING;
	ret->at = span->at;
	ret->end = span->at + size;
	span->at = ret->end;
	return 0;
}

static int check_name(const struct img_entry *entry)
{
	const uint8_t *name = entry->name;
	uint32_t size = entry->name_size;

	if (size == 0 || size > NAME_SIZE_MAX || memchr(name, '/', size) || memchr(name, 0, size))
		return -IMG_ENAME;
	if (name[0] == '.' && (size == 1 || (size == 2 && name[1] == '.')))
		return -IMG_ENAME;
	return 0;
}

static int check_entry(const struct img_entry *entry)
{
	int error = entry->name ? check_name(entry) : -IMG_ENAME;

	if (error)
		return error;
	if (entry->kind != 'l')
		return entry->digest ? 0 : -IMG_EDIGEST;
	if (!entry->target || entry->target_size == 0 || entry->target_size > TARGET_SIZE_MAX ||
	    memchr(entry->target, 0, entry->target_size))
		return -IMG_ETARGET;
	return 0;
}

/* Field 2: the digest of a directory or file, or the target of a symlink. */
static int set_second(struct img_entry *entry, struct span bytes)
{
	if (entry->kind == 'l') {
		entry->target = bytes.at;
		entry->target_size = left(&bytes) > TARGET_SIZE_MAX ? UINT32_MAX
								    : (uint32_t)left(&bytes);
		return 0;
	}
	if (left(&bytes) != DIGEST_SIZE)
		return -IMG_EDIGEST;
	entry->digest = bytes.at;
	return 0;
}

static int set_number(struct img_entry *entry, uint32_t field, uint64_t value)
{
	if (field == 3 && entry->kind != 'l')
		entry->size = value;
	else if (field == 4 && entry->kind == 'f' && value == 1)
		entry->kind = 'x';
	else
		return -IMG_EENCODING;
	return 0;
}

static int set_field(struct img_entry *entry, uint32_t field, uint32_t type, struct span *message)
{
	struct span bytes;
	uint64_t value;
	int error;

	if (type == VARINT) {
		error = get_varint(message, &value);
		return error ? error : set_number(entry, field, value);
	}
	error = get_bytes(message, &bytes);
	if (error)
		return error;
	if (field == 2)
		return set_second(entry, bytes);
	if (field != 1)
		return -IMG_EENCODING;
	entry->name = bytes.at;
	entry->name_size = left(&bytes) > NAME_SIZE_MAX ? UINT32_MAX : (uint32_t)left(&bytes);
	return 0;
}

/* Fields come in the order of their numbers, each once at the most. */
static int get_entry(struct span *message, uint32_t kind, struct img_entry *ret)
{
	uint64_t last = 0;

	memset(ret, 0, sizeof(*ret));
	ret->kind = kind;
	while (left(message)) {
		uint64_t tag;
		int error = get_varint(message, &tag);

		if (error)
			return error;
		if (tag >> 3 <= last || tag >> 3 > 4 || ((tag & 7) != VARINT && (tag & 7) != BYTES))
			return -IMG_EENCODING;
		last = tag >> 3;
		error = set_field(ret, (uint32_t)last, (uint32_t)(tag & 7), message);
		if (error)
			return error;
	}
	return check_entry(ret);
}

/* --- The three lists --- */

static const uint32_t kind_of_list[3] = { 'd', 'f', 'l' };

int castore_next(struct img_list *list)
{
	struct span span = { list->at, list->end }, message;
	uint32_t tag = list->field << 3 | BYTES;
	int error;

	if (list->at == list->end || *list->at != tag) {
		list->is_done = 1;
		return 0;
	}
	span.at++;
	error = get_bytes(&span, &message);
	if (error)
		return error;
	list->at = span.at;
	return get_entry(&message, kind_of_list[list->field - 1], &list->entry);
}

int castore_compare(const struct img_entry *one, const struct img_entry *other)
{
	uint32_t size = one->name_size < other->name_size ? one->name_size : other->name_size;
	int order = memcmp(one->name, other->name, size);

	if (order)
		return order;
	return (one->name_size > other->name_size) - (one->name_size < other->name_size);
}

/* Returns the list with the smallest name, or NULL at the end. */
struct img_list *castore_smallest(struct img_list lists[3])
{
	struct img_list *found = NULL;

	for (unsigned i = 0; i < 3; i++) {
		if (lists[i].is_done)
			continue;
		if (!found || castore_compare(&lists[i].entry, &found->entry) < 0)
			found = &lists[i];
	}
	return found;
}

/* Goes through one list to where the next begins. */
static int skip_list(struct img_list *list)
{
	while (!list->is_done) {
		int error = castore_next(list);

		if (error)
			return error;
	}
	return 0;
}

int castore_open(struct img_list lists[3], const uint8_t *at, const uint8_t *end)
{
	for (unsigned i = 0; i < 3; i++) {
		struct img_list reader = { .at = at, .end = end, .field = i + 1 };
		int error;

		lists[i] = reader;
		error = skip_list(&reader);
		if (error)
			return error;
		at = lists[i].end = reader.at;
		lists[i].is_done = 0;
		error = castore_next(&lists[i]);
		if (error)
			return error;
		end = reader.end;
	}
	return at == end ? 0 : -IMG_EENCODING;
}
