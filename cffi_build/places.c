/*
 * From nodeids to nodes, by arithmetic over the images of directories; as appliance/images/places.py
 * does it, which is the reference. A nodeid comes from the guest and may be any number.
 *
 * The walk goes down from the root of the grant, or from a directory that is known and above the
 * node. Known directories are in a table with one slot per hash value: what is not in it costs a
 * walk, and nothing else.
 */
#include "places.h"
#include "usage.h"

enum {
	IMAGE_KEY_SIZE = ENG_DIGEST_SIZE + 4,
	PIECE_ENTRIES = 8192,
	DEPTH_MAX = 4096,		/* of a walk: more than a path name can have */
};

/* --- Images --- */

static int get_image(struct eng_places *places, const uint8_t *digest, uint32_t piece,
		     struct eng_image *ret)
{
	uint8_t key[IMAGE_KEY_SIZE];
	struct eng_bytes found;

	memcpy(key, digest, ENG_DIGEST_SIZE);
	for (uint32_t i = 0; i < 4; i++)
		key[ENG_DIGEST_SIZE + i] = (uint8_t)(piece >> (24 - 8 * i));
	if (eng_store_get(places->store, ENG_IMAGES, key,
			  piece ? IMAGE_KEY_SIZE : ENG_DIGEST_SIZE, &found) != 1)
		return -1;
	if (image_open(ret, found) || ret->first != piece * PIECE_ENTRIES)
		return -1;
	usage_note(places->usage, ENG_USED_DIRECTORY, digest, 0, 0);
	return 0;
}

int places_piece(struct eng_places *places, const struct node *directory, uint32_t number,
		 struct eng_image *ret)
{
	struct eng_seen_image *seen = &places->seen[number != 0];

	if (!seen->is_valid || seen->piece != number ||
	    memcmp(seen->digest, directory->digest, ENG_DIGEST_SIZE) != 0) {
		seen->is_valid = 0;
		if (number > UINT32_MAX / PIECE_ENTRIES ||
		    get_image(places, directory->digest, number, &seen->image))
			return -1;
		memcpy(seen->digest, directory->digest, ENG_DIGEST_SIZE);
		seen->piece = number;
		seen->is_valid = 1;
	}
	*ret = seen->image;
	return 0;
}

int places_image(struct eng_places *places, const struct node *directory, struct eng_image *ret)
{
	if (directory->kind != IMAGE_DIRECTORY || places_piece(places, directory, 0, ret))
		return -1;
	return ret->span > directory->size ? -1 : 0;
}

/* --- Entries --- */

/* As appliance/images/entries.py: ino_of_content. */
static uint64_t ino_of_content(uint32_t kind, uint64_t content)
{
	uint64_t ino = (content ^ kind) & (UINT64_MAX >> 1);

	return ino >> 32 ? ino : ino + ((uint64_t)1 << 32);
}

uint64_t places_ino(const struct eng_places *places, const struct node *directory,
		    const struct image_entry *entry)
{
	if (places->grants.is_by_content)
		return ino_of_content(entry->kind, image_u64(entry->digest));
	return directory->nodeid + entry->place;
}

void places_entry_out(const struct eng_places *places, const struct node *directory,
		      const struct image_entry *entry, uint8_t ret[ENG_NODE_ENTRY_SIZE])
{
	memcpy(ret, entry->record.at, ENG_NODE_ENTRY_SIZE);
	image_put64(ret, directory->nodeid + entry->place);
	image_put64(ret + 8, places->grants.generation);
	image_put64(ret + IMAGE_INO_AT, places_ino(places, directory, entry));
}

static int node_of_entry(const struct eng_places *places, const struct node *directory,
			 const struct eng_image *image, uint32_t index, struct node *ret)
{
	struct image_entry entry;

	if (image_entry(image, index, &entry))
		return -1;
	/* A place beyond the directory's would be another node's. */
	if (entry.place > directory->size)
		return -1;
	ret->nodeid = directory->nodeid + entry.place;
	ret->kind = entry.kind;
	ret->size = entry.kind == IMAGE_DIRECTORY ? entry.size_stated :
						    image_u64(entry.record.at + IMAGE_SIZE_AT);
	ret->ino = places_ino(places, directory, &entry);
	ret->parent_ino = directory->ino;
	memcpy(ret->digest, entry.digest, ENG_DIGEST_SIZE);
	places_entry_out(places, directory, &entry, ret->entry);
	ret->target = (struct eng_bytes){ 0 };
	if (entry.kind == IMAGE_SYMLINK)
		return image_target(image, entry.digest, &ret->target);
	return 0;
}

static int node_of_grant(struct eng_places *places, uint64_t nodeid, struct node *ret)
{
	struct grant grant;

	if (!grants_by_nodeid(&places->grants, nodeid, &grant))
		return -1;
	ret->nodeid = grant.base;
	ret->kind = grant.kind;
	ret->size = grant.size;
	ret->ino = image_u64(grant.record.at + IMAGE_INO_AT);
	ret->parent_ino = grant.base == ROOT_NODEID ? ret->ino : ROOT_NODEID;
	memcpy(ret->digest, grant.digest, ENG_DIGEST_SIZE);
	memcpy(ret->entry, grant.record.at, ENG_NODE_ENTRY_SIZE);
	ret->target = grant.target;
	return 0;
}

/* --- Known directories --- */

static uint32_t slot_of(uint64_t nodeid)
{
	return (uint32_t)((nodeid * 0x9e3779b97f4a7c15u) >> 32) % ENG_DIRECTORIES_MAX;
}

static void keep(struct eng_places *places, const struct node *node)
{
	uint32_t slot = slot_of(node->nodeid);
	struct eng_directory *directory = &places->directory[slot];

	places->last = slot;
	if (directory->nodeid == node->nodeid)
		return;
	directory->nodeid = node->nodeid;
	directory->size = node->size;
	directory->ino = node->ino;
	directory->parent_ino = node->parent_ino;
	memcpy(directory->digest, node->digest, ENG_DIGEST_SIZE);
	memcpy(directory->entry, node->entry, ENG_NODE_ENTRY_SIZE);
}

static void node_of_slot(const struct eng_places *places, uint32_t slot, struct node *ret)
{
	const struct eng_directory *directory = &places->directory[slot];

	ret->nodeid = directory->nodeid;
	ret->kind = IMAGE_DIRECTORY;
	ret->size = directory->size;
	ret->ino = directory->ino;
	ret->parent_ino = directory->parent_ino;
	memcpy(ret->digest, directory->digest, ENG_DIGEST_SIZE);
	memcpy(ret->entry, directory->entry, ENG_NODE_ENTRY_SIZE);
	ret->target = (struct eng_bytes){ 0 };
}

void places_begin(struct eng_places *places)
{
	uint64_t revoked_num = grants_revoked_num(&places->grants);

	places->seen[0].is_valid = places->seen[1].is_valid = 0;
	if (revoked_num == places->grants.revoked_num)
		return;
	places->grants.revoked_num = revoked_num;
	for (uint32_t i = 0; i < ENG_DIRECTORIES_MAX; i++)
		places->directory[i].nodeid = 0;
}

/* --- The walk --- */

/* Whether `nodeid` is among the places that the node of a directory states for what is below it. */
static int is_below(const struct node *node, uint64_t nodeid)
{
	return node->kind == IMAGE_DIRECTORY && nodeid > node->nodeid &&
	       nodeid - node->nodeid <= node->size;
}

static int step(struct eng_places *places, struct node *node, uint64_t nodeid)
{
	uint64_t place = nodeid - node->nodeid;
	struct eng_image image;
	struct node found;
	uint32_t piece = 0;
	uint32_t index;

	if (places_image(places, node, &image))
		return -1;
	if (image.pieces_num > 1 && image_piece_of_place(&image, place, &piece))
		return -1;
	if (piece && places_piece(places, node, piece, &image))
		return -1;
	if (image_index_at(&image, place, &index) ||
	    node_of_entry(places, node, &image, index, &found))
		return -1;
	*node = found;
	return 0;
}

int places_node(struct eng_places *places, uint64_t nodeid, struct node *ret)
{
	uint32_t slot = slot_of(nodeid);

	if (!nodeid)
		return -1;
	if (places->directory[slot].nodeid == nodeid) {
		places->last = slot;
		node_of_slot(places, slot, ret);
		return 0;
	}
	node_of_slot(places, places->last, ret);
	if ((!ret->nodeid || !is_below(ret, nodeid)) && node_of_grant(places, nodeid, ret))
		return -1;
	for (uint32_t depth = 0; depth < DEPTH_MAX; depth++) {
		if (ret->kind == IMAGE_DIRECTORY)
			keep(places, ret);
		if (ret->nodeid == nodeid)
			return 0;
		if (!is_below(ret, nodeid) || step(places, ret, nodeid))
			return -1;
	}
	return -1;
}
