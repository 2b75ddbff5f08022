/*
 * The builder of directory images.
 *
 * A Directory is three lists, each sorted by name: directories, files, symlinks. Its canonical
 * encoding has them one after the other, so three readers that stand in it at once (castore.c) merge
 * them into the one order that a listing has. An entry's place is its position in a walk of the tree
 * in pre-order, relative to the directory: the first has place 1, and each takes one place and, if
 * it is a directory, as many more as the size that its node states.
 */
#include "images.h"
#include "castore.h"

#include <linux/fuse.h>
#include <string.h>
#include <sys/stat.h>

#define DIGEST_SIZE 32u
#define SIZE_OF_DIRECTORY 4096u
#define BLOCK_SIZE 4096u
#define SECTOR 512u
#define LINKS_FIRST 2u		/* records of "." and ".." before those of the entries */
/* As in fuse_proto/encode.py: not all kernels cut longer ones alike. */
#define FOREVER_S 0x7fffffffu
#define RECORD_SIZE (sizeof(struct fuse_entry_out) + FUSE_NAME_OFFSET)

static uint64_t places_of(const struct img_entry *entry)
{
	return entry->kind == 'd' ? entry->size : 0;
}

/* Goes through all entries in order; adds up what they take. */
static int measure(struct img_builder *builder)
{
	struct img_list lists[3];
	struct img_entry last = { 0 };
	struct img_list *list;

	memcpy(lists, builder->list, sizeof(lists));
	while ((list = castore_smallest(lists))) {
		int error;

		if (last.name && castore_compare(&last, &list->entry) >= 0)
			return -IMG_EORDER;
		if (__builtin_add_overflow(builder->span, places_of(&list->entry), &builder->span) ||
		    __builtin_add_overflow(builder->span, 1u, &builder->span))
			return -IMG_ESPAN;
		last = list->entry;
		builder->total++;
		error = castore_next(list);
		if (error)
			return error;
	}
	return builder->span > UINT64_MAX - 1 ? -IMG_ESPAN : 0;
}

int img_builder_init(struct img_builder *ret, const uint8_t *encoded, size_t size)
{
	uint64_t pieces_num;
	int error;

	memset(ret, 0, sizeof(*ret));
	ret->place = 1;
	error = castore_open(ret->list, encoded, encoded + size);
	if (!error)
		error = measure(ret);
	if (error)
		return error;
	pieces_num = (ret->total + IMG_PIECE_ENTRIES - 1) / IMG_PIECE_ENTRIES;
	if (ret->total > UINT32_MAX - LINKS_FIRST)
		return -IMG_EROOM;
	ret->pieces_num = pieces_num ? (uint32_t)pieces_num : 1;
	return 0;
}

/* --- A piece --- */

/* Where the parts of a piece begin, and how many entries it has. */
struct shape {
	uint32_t entries, links;
	uint64_t offsets, records, digests, targets, end;
};

static uint64_t padded(uint64_t size)
{
	return (size + 7) & ~(uint64_t)7;
}

static struct shape shape_of(const struct img_builder *builder)
{
	struct shape shape = { .links = builder->index ? 0 : LINKS_FIRST };
	uint64_t records = 0, targets = 0;
	struct img_list lists[3];
	struct img_list *list;

	memcpy(lists, builder->list, sizeof(lists));
	while (shape.entries < IMG_PIECE_ENTRIES && (list = castore_smallest(lists))) {
		records += padded(RECORD_SIZE + list->entry.name_size);
		targets += list->entry.target_size;
		shape.entries++;
		if (castore_next(list))
			break;		/* never: img_builder_init() went this way */
	}
	for (uint32_t i = 0; i < shape.links; i++)
		records += padded(RECORD_SIZE + i + 1);
	shape.offsets = IMG_HEADER_SIZE + 8 * ((uint64_t)shape.entries + 1);
	shape.records = padded(shape.offsets + 4 * ((uint64_t)shape.links + shape.entries + 1));
	shape.digests = shape.records + records;
	shape.targets = shape.digests + DIGEST_SIZE * (uint64_t)shape.entries;
	shape.end = padded(shape.targets + targets);
	return shape;
}

int64_t img_piece_size(const struct img_builder *builder)
{
	struct shape shape = shape_of(builder);

	return shape.end > UINT32_MAX ? -IMG_EROOM : (int64_t)shape.end;
}

static void put32(uint8_t *to, uint32_t value)
{
	memcpy(to, &value, sizeof(value));
}

static void put64(uint8_t *to, uint64_t value)
{
	memcpy(to, &value, sizeof(value));
}

static uint32_t mode_of(uint32_t kind)
{
	switch (kind) {
	case 'd':
		return S_IFDIR | 0555;
	case 'x':
		return S_IFREG | 0555;
	case 'l':
		return S_IFLNK | 0444;
	default:
		return S_IFREG | 0444;
	}
}

static uint64_t size_of(const struct img_entry *entry)
{
	if (entry->kind == 'd')
		return SIZE_OF_DIRECTORY;
	return entry->kind == 'l' ? entry->target_size : entry->size;
}

static struct fuse_entry_out entry_out_of(const struct img_entry *entry, uint64_t place)
{
	uint64_t size = size_of(entry);
	struct fuse_entry_out out = {
		.nodeid = place,
		.entry_valid = FOREVER_S,
		.attr_valid = FOREVER_S,
		.attr = {
			.ino = place,
			.size = size,
			.blocks = size / SECTOR + (size % SECTOR != 0),
			.atime = 1,
			.mtime = 1,
			.ctime = 1,
			.mode = mode_of(entry->kind),
			.nlink = 1,
			.blksize = BLOCK_SIZE,
		},
	};

	return out;
}

/* Returns the end of the record. */
static uint8_t *put_record(uint8_t *to, const struct fuse_entry_out *out, uint64_t ino,
			   uint64_t off, uint32_t type, const uint8_t *name, uint32_t size)
{
	struct fuse_dirent dirent = { .ino = ino, .off = off, .namelen = size, .type = type };
	uint8_t *name_at = to + RECORD_SIZE;
	uint8_t *end = to + padded(RECORD_SIZE + size);

	memcpy(to, out, sizeof(*out));
	memcpy(to + sizeof(*out), &dirent, FUSE_NAME_OFFSET);
	memcpy(name_at, name, size);
	memset(name_at + size, 0, (size_t)(end - (name_at + size)));
	return end;
}

/* FNV-1a: what stands for the content of a symlink. */
static uint64_t hash(const uint8_t *bytes, uint32_t size)
{
	uint64_t value = 0xcbf29ce484222325u;

	for (uint32_t i = 0; i < size; i++)
		value = (value ^ bytes[i]) * 0x100000001b3u;
	return value;
}

/* What is being written. */
struct output {
	uint8_t *start, *place, *offset, *record, *digest, *target;
	uint64_t cookie;
};

static void put_links(struct output *out, uint32_t num)
{
	static const struct fuse_entry_out no_entry;
	static const uint8_t dots[] = "..";

	for (uint32_t size = 1; size <= num; size++) {
		put32(out->offset, (uint32_t)(out->record - out->start));
		out->offset += 4;
		out->record = put_record(out->record, &no_entry, 0, ++out->cookie, S_IFDIR >> 12,
					 dots, size);
	}
}

static void put_content(struct output *out, const struct img_entry *entry)
{
	if (entry->kind == 'l') {
		memset(out->digest, 0, DIGEST_SIZE);
		put64(out->digest, hash(entry->target, entry->target_size));
		put32(out->digest + 8, (uint32_t)(out->target - out->start));
		put32(out->digest + 12, entry->target_size);
		memcpy(out->target, entry->target, entry->target_size);
		out->target += entry->target_size;
	} else {
		memcpy(out->digest, entry->digest, DIGEST_SIZE);
	}
	out->digest += DIGEST_SIZE;
}

static void put_entry(struct output *out, const struct img_entry *entry, uint64_t place)
{
	struct fuse_entry_out entry_out = entry_out_of(entry, place);

	put64(out->place, place);
	out->place += 8;
	put32(out->offset, (uint32_t)(out->record - out->start));
	out->offset += 4;
	out->record = put_record(out->record, &entry_out, place, ++out->cookie,
				 entry_out.attr.mode >> 12, entry->name, entry->name_size);
	put_content(out, entry);
}

static void put_header(uint8_t *to, const struct img_builder *builder, const struct shape *shape)
{
	put32(to, IMG_MAGIC);
	put32(to + 4, shape->entries);
	put64(to + 8, builder->total);
	put64(to + 16, builder->span);
	put32(to + 24, builder->index);
	put32(to + 28, builder->pieces_num);
	put32(to + 32, (uint32_t)shape->offsets);
	put32(to + 36, (uint32_t)shape->digests);
	put32(to + 40, shape->links);
	put32(to + 44, 0);
}

int img_piece_write(struct img_builder *builder, uint8_t *to, size_t size)
{
	struct shape shape = shape_of(builder);
	struct output out = {
		.start = to,
		.place = to + IMG_HEADER_SIZE,
		.offset = to + shape.offsets,
		.record = to + shape.records,
		.digest = to + shape.digests,
		.target = to + shape.targets,
		.cookie = builder->index ? LINKS_FIRST + (uint64_t)builder->index : 0,
	};

	if (shape.end > UINT32_MAX || shape.end != size)
		return -IMG_EROOM;
	put_header(to, builder, &shape);
	put_links(&out, shape.links);
	for (uint32_t i = 0; i < shape.entries; i++) {
		struct img_list *list = castore_smallest(builder->list);
		int error;

		if (!list)
			return -IMG_EROOM;
		put_entry(&out, &list->entry, builder->place);
		builder->place += 1 + places_of(&list->entry);
		builder->index++;
		error = castore_next(list);
		if (error)
			return error;
	}
	put64(out.place, builder->place);
	put32(out.offset, (uint32_t)shape.digests);
	memset(out.offset + 4, 0, (size_t)(to + shape.records - (out.offset + 4)));
	memset(out.target, 0, (size_t)(to + shape.end - out.target));
	return 0;
}
