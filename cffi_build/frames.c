/* What a Directory comes to in a NAR. One walk measures it, another one of the same steps writes it. */
#include "frames.h"
#include "castore.h"

#include <string.h>

#define DIGEST_SIZE 32u
#define ALIGNMENT 8u

/* Where the walk puts what it comes to; without buffers it only adds up. */
struct frame_output {
	struct frame_sizes sizes;
	uint8_t *structure;
	struct frame_item *items;
};

static void put(struct frame_output *out, const uint8_t *bytes, uint32_t size)
{
	if (out->structure)
		memcpy(out->structure + out->sizes.structure, bytes, size);
	out->sizes.structure += size;
}

static void put_token(struct frame_output *out, struct frame_token token)
{
	put(out, token.bytes, token.size);
}

static void put_length(struct frame_output *out, uint64_t size)
{
	uint8_t bytes[sizeof(size)];

	for (unsigned i = 0; i < sizeof(bytes); i++)
		bytes[i] = (uint8_t)(size >> 8 * i);
	put(out, bytes, sizeof(bytes));
}

static void put_padding(struct frame_output *out, uint64_t size)
{
	static const uint8_t zeros[ALIGNMENT];

	put(out, zeros, (uint32_t)(-size % ALIGNMENT));
}

static void put_string(struct frame_output *out, const uint8_t *bytes, uint32_t size)
{
	put_length(out, size);
	put(out, bytes, size);
	put_padding(out, size);
}

static void put_item(struct frame_output *out, const struct img_entry *entry)
{
	if (out->items) {
		struct frame_item *item = &out->items[out->sizes.items_num];

		*item = (struct frame_item){
			.size = entry->size,
			.at = (uint32_t)out->sizes.structure,
			.kind = entry->kind == 'd' ? 'd' : 'f',
		};
		memcpy(item->digest, entry->digest, DIGEST_SIZE);
	}
	out->sizes.items_num++;
}

static int put_file(struct frame_output *out, const struct frame_tokens *tokens,
		    const struct img_entry *entry)
{
	put_token(out, entry->kind == 'x' ? tokens->executable : tokens->regular);
	put_length(out, entry->size);
	if (__builtin_add_overflow(out->sizes.contents, entry->size, &out->sizes.contents))
		return -IMG_ESPAN;
	if (entry->size)
		put_item(out, entry);
	put_padding(out, entry->size);
	return 0;
}

static int put_entry(struct frame_output *out, const struct frame_tokens *tokens,
		     const struct img_entry *entry)
{
	int error = 0;

	put_token(out, tokens->entry);
	put_string(out, entry->name, entry->name_size);
	put_token(out, tokens->node);
	if (entry->kind == 'd') {
		put_item(out, entry);
	} else if (entry->kind == 'l') {
		put_token(out, tokens->symlink);
		put_string(out, entry->target, entry->target_size);
	} else {
		error = put_file(out, tokens, entry);
	}
	put_token(out, tokens->close);
	out->sizes.entries_num++;
	return error;
}

static int walk(struct frame_output *out, const struct frame_tokens *tokens,
		const uint8_t *encoded, size_t size)
{
	struct img_list lists[3];
	struct img_entry last = { 0 };
	struct img_list *list;
	int error = castore_open(lists, encoded, encoded + size);

	if (error)
		return error;
	put_token(out, tokens->directory);
	while ((list = castore_smallest(lists))) {
		if (last.name && castore_compare(&last, &list->entry) >= 0)
			return -IMG_EORDER;
		last = list->entry;
		error = put_entry(out, tokens, &last);
		if (!error)
			error = castore_next(list);
		if (error)
			return error;
		if (out->sizes.structure > UINT32_MAX / 2)
			return -IMG_EROOM;
	}
	return 0;
}

int frames_measure(struct frame_sizes *ret, const struct frame_tokens *tokens,
		   const uint8_t *encoded, size_t size)
{
	struct frame_output out = { 0 };
	int error = walk(&out, tokens, encoded, size);

	*ret = out.sizes;
	return error;
}

int frames_write(const struct frame_sizes *sizes, const struct frame_tokens *tokens,
		 const uint8_t *encoded, size_t size, uint8_t *structure, struct frame_item *items)
{
	struct frame_output out = { .structure = structure, .items = items };
	int error = walk(&out, tokens, encoded, size);

	if (error)
		return error;
	return out.sizes.structure == sizes->structure && out.sizes.items_num == sizes->items_num
		? 0 : -IMG_EROOM;
}
