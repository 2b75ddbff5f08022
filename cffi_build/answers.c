/*
 * Answers to plain FUSE requests: well-formed, of a session that is up, for a node below a store
 * path that is granted, with all that it takes in the store. appliance/fuse_proto/dispatch.py and
 * appliance/fs/handler.py answer everything else; where both can answer, the bytes are the same.
 */
#include "blob_fds.h"
#include "places.h"
#include "statistics.h"
#include "usage.h"

#include <linux/fuse.h>

enum { NAME_SIZE_MAX = 255, INLINE = 0, IN_FILE = 1, FILE_RECORD_SIZE = 9 };

/* As in fuse_proto/encode.py: not all kernels cut longer ones alike. */
#define FOREVER_S 0x7fffffffu
#define IN_HEADER_SIZE ((uint32_t)sizeof(struct fuse_in_header))
#define OUT_HEADER_SIZE ((uint32_t)sizeof(struct fuse_out_header))

_Static_assert(sizeof(struct fuse_entry_out) == ENG_NODE_ENTRY_SIZE, "linux/fuse.h");
_Static_assert(sizeof(struct fuse_out_header) + sizeof(struct fuse_entry_out) == ENG_HEAD_MAX,
	       "the largest fixed body");
_Static_assert(offsetof(struct fuse_entry_out, attr) == IMAGE_INO_AT, "linux/fuse.h");
_Static_assert(FUSE_NAME_OFFSET_DIRENTPLUS == IMAGE_NAME_AT, "linux/fuse.h");

/* One request, checked as far as all requests are. */
struct request {
	struct fuse_in_header header;
	const uint8_t *body;
	uint64_t body_size;
	uint64_t room;			/* for the body of a reply */
};

/* --- Replies; `head` gets its header last --- */

static int reply_fixed(struct eng_reply *reply, const void *body, uint32_t size)
{
	memcpy(reply->head + OUT_HEADER_SIZE, body, size);
	reply->head_size += size;
	return ENG_REPLY;
}

static int reply_bytes(struct eng_reply *reply, const uint8_t *body, uint64_t size)
{
	reply->body = body;
	reply->body_size = size;
	return ENG_REPLY;
}

static void put_header(struct eng_reply *reply, uint64_t unique)
{
	struct fuse_out_header header = { .unique = unique };

	header.len = (uint32_t)(reply->head_size + reply->body_size);
	memcpy(reply->head, &header, sizeof(header));
}

/* --- Names and attributes --- */

/* The name to look up. ".", ".." and "/" are left to the handler, and so are impossible names. */
static int name_of(const struct request *request, struct eng_bytes *ret)
{
	const uint8_t *name = request->body;
	const uint8_t *end = request->body_size ? memchr(name, 0, request->body_size) : NULL;

	if (!end || end == name || end - name > NAME_SIZE_MAX)
		return -1;
	ret->at = name;
	ret->size = (uint64_t)(end - name);
	if (memchr(name, '/', ret->size))
		return -1;
	if (name[0] == '.' && (ret->size == 1 || (ret->size == 2 && name[1] == '.')))
		return -1;
	return 0;
}

static int lookup_in_root(struct eng_answers *answers, struct eng_bytes name,
			  struct eng_reply *ret)
{
	struct grant grant;

	if (!grants_by_name(&answers->places.grants, name.at, (uint32_t)name.size, &grant))
		return ENG_NOT_PLAIN;
	return reply_fixed(ret, grant.record.at, ENG_NODE_ENTRY_SIZE);
}

static int lookup(struct eng_answers *answers, const struct request *request,
		  struct eng_reply *ret)
{
	static const struct fuse_entry_out negative = { .entry_valid = FOREVER_S };
	struct eng_places *places = &answers->places;
	struct image_entry entry;
	struct eng_image image;
	struct node directory;
	struct eng_bytes name;
	uint32_t piece = 0;
	uint32_t index = 0;
	int found;

	if (request->room < ENG_NODE_ENTRY_SIZE || name_of(request, &name))
		return ENG_NOT_PLAIN;
	if (request->header.nodeid == ROOT_NODEID && !grants_have_root(&places->grants))
		return lookup_in_root(answers, name, ret);
	if (places_node(places, request->header.nodeid, &directory) ||
	    places_image(places, &directory, &image))
		return ENG_NOT_PLAIN;
	if (image.pieces_num > 1 &&
	    image_piece_of_name(&image, name.at, (uint32_t)name.size, &piece))
		return ENG_NOT_PLAIN;
	if (piece && places_piece(places, &directory, piece, &image))
		return ENG_NOT_PLAIN;
	found = image_find(&image, name.at, (uint32_t)name.size, &index);
	if (!found)
		return reply_fixed(ret, &negative, sizeof(negative));
	if (found < 0 || image_entry(&image, index, &entry))
		return ENG_NOT_PLAIN;
	places_entry_out(places, &directory, &entry, ret->head + OUT_HEADER_SIZE);
	ret->head_size += ENG_NODE_ENTRY_SIZE;
	return ENG_REPLY;
}

static int getattr(struct eng_answers *answers, const struct request *request,
		   struct eng_reply *ret)
{
	struct fuse_attr_out out = { .attr_valid = FOREVER_S };
	struct node node;

	if (request->room < sizeof(out) || request->body_size < sizeof(struct fuse_getattr_in) ||
	    places_node(&answers->places, request->header.nodeid, &node))
		return ENG_NOT_PLAIN;
	memcpy(&out.attr, node.entry + IMAGE_INO_AT, sizeof(out.attr));
	return reply_fixed(ret, &out, sizeof(out));
}

static int readlink(struct eng_answers *answers, const struct request *request,
		    struct eng_reply *ret)
{
	struct node node;

	if (places_node(&answers->places, request->header.nodeid, &node) ||
	    node.kind != IMAGE_SYMLINK || node.target.size > request->room)
		return ENG_NOT_PLAIN;
	return reply_bytes(ret, node.target.at, node.target.size);
}

/* --- Contents --- */

static int read_args(const struct request *request, struct fuse_read_in *ret)
{
	if (request->body_size < sizeof(*ret))
		return -1;
	memcpy(ret, request->body, sizeof(*ret));
	if (ret->size > request->room)
		ret->size = (uint32_t)request->room;
	return 0;
}

static int read_file(int fd, const struct fuse_read_in *args, uint64_t size, struct eng_reply *ret)
{
	if (fd < 0)
		return ENG_NOT_PLAIN;
	ret->fd = fd;
	ret->offset = (int64_t)args->offset;
	ret->body_size = size;
	return ENG_REPLY;
}

/* The content of a file from the offset on, of which `size` bytes are there as the node states it. */
static int read_blob(struct eng_answers *answers, const struct node *node,
		     const struct fuse_read_in *args, uint64_t size, struct eng_reply *ret)
{
	struct eng_bytes record;
	int fd = blob_fds_find(&answers->blobs, node->digest, node->size);

	if (fd >= 0)
		return read_file(fd, args, size, ret);
	if (eng_store_get(answers->store, ENG_BLOBS, node->digest, ENG_DIGEST_SIZE, &record) != 1 ||
	    !record.size || node->size > INT64_MAX)
		return ENG_NOT_PLAIN;
	if (record.at[0] == IN_FILE && record.size == FILE_RECORD_SIZE) {
		fd = blob_fds_get(&answers->blobs, node->digest, node->size,
				  image_u64(record.at + 1));
		return read_file(fd, args, size, ret);
	}
	if (record.at[0] != INLINE || record.size - 1 < node->size)
		return ENG_NOT_PLAIN;
	return reply_bytes(ret, record.at + 1 + args->offset, size);
}

static int read_content(struct eng_answers *answers, const struct request *request,
			struct eng_reply *ret)
{
	struct fuse_read_in args;
	struct node node;
	uint64_t left;
	int outcome;

	if (read_args(request, &args) ||
	    places_node(&answers->places, request->header.nodeid, &node) ||
	    (node.kind != IMAGE_FILE && node.kind != IMAGE_EXECUTABLE))
		return ENG_NOT_PLAIN;
	if (args.offset >= node.size)
		return ENG_REPLY;
	left = node.size - args.offset;
	outcome = read_blob(answers, &node, &args, left < args.size ? left : args.size, ret);
	if (outcome == ENG_REPLY && ret->body_size)
		usage_note_read(&answers->usage, node.digest, node.size, args.offset, ret->body_size);
	return outcome;
}

/* --- Directory streams --- */

/* What a listing is made from, and where it stands. */
struct listing {
	struct node directory;
	struct eng_image image;
	uint32_t index;			/* of the next record */
	uint32_t skip;			/* bytes of each record that are left out */
	uint8_t *to;
	uint64_t left;			/* room */
};

static int listing_open(struct eng_answers *answers, const struct request *request,
			struct listing *ret)
{
	struct fuse_read_in args;
	uint64_t first_cookie, first;
	uint32_t piece = 0;

	if (read_args(request, &args) ||
	    places_node(&answers->places, request->header.nodeid, &ret->directory) ||
	    places_image(&answers->places, &ret->directory, &ret->image))
		return -1;
	if (ret->image.pieces_num > 1)
		piece = image_piece_of_cookie(&ret->image, args.offset);
	if (piece && places_piece(&answers->places, &ret->directory, piece, &ret->image))
		return -1;
	first_cookie = (uint64_t)ret->image.first + IMAGE_LINKS - ret->image.links;
	if (args.offset < first_cookie)
		return -1;
	first = args.offset - first_cookie;
	ret->index = first > ret->image.links + ret->image.count ?
			     ret->image.links + ret->image.count :
			     (uint32_t)first;
	ret->left = args.size;
	if (ret->left > ENG_LISTING_SIZE)
		return -1;
	ret->to = answers->listing;
	return 0;
}

/* The numbers of the record at `to`, of which `skip` bytes are not there. */
static void listing_number(const struct eng_places *places, const struct listing *listing,
			   const struct image_entry *entry, uint8_t *to)
{
	uint64_t ino;

	if (!entry) {
		ino = listing->index ? listing->directory.parent_ino : listing->directory.ino;
	} else {
		ino = places_ino(places, &listing->directory, entry);
		if (!listing->skip) {
			image_put64(to, listing->directory.nodeid + entry->place);
			image_put64(to + 8, places->grants.generation);
			image_put64(to + IMAGE_INO_AT, ino);
		}
	}
	image_put64(to + ENG_NODE_ENTRY_SIZE - listing->skip, ino);
}

/* Returns 1 if the record was put, 0 if there is no room for it, or -1. */
static int listing_put(const struct eng_places *places, struct listing *listing)
{
	int is_link = listing->index < listing->image.links;
	struct image_entry entry;
	uint64_t size;

	if (is_link ? image_record(&listing->image, listing->index, &entry.record) :
		      image_entry(&listing->image, listing->index - listing->image.links, &entry))
		return -1;
	size = entry.record.size - listing->skip;
	if (size > listing->left)
		return 0;
	memcpy(listing->to, entry.record.at + listing->skip, size);
	listing_number(places, listing, is_link ? NULL : &entry, listing->to);
	listing->to += size;
	listing->left -= size;
	listing->index++;
	return 1;
}

static int list(struct eng_answers *answers, const struct request *request, uint32_t skip,
		struct eng_reply *ret)
{
	struct listing listing = { .skip = skip };
	uint32_t end;

	if (listing_open(answers, request, &listing))
		return ENG_NOT_PLAIN;
	end = listing.image.links + listing.image.count;
	while (listing.index < end) {
		int status = listing_put(&answers->places, &listing);

		if (status < 0 || (!status && listing.to == answers->listing))
			return ENG_NOT_PLAIN;	/* corrupt, or no room for one record */
		if (!status)
			break;
	}
	return reply_bytes(ret, answers->listing, (uint64_t)(listing.to - answers->listing));
}

/* --- All of them --- */

static int answer_open(struct eng_answers *answers, const struct request *request,
		       struct eng_reply *ret)
{
	switch (request->header.opcode) {
	case FUSE_LOOKUP:
		return lookup(answers, request, ret);
	case FUSE_GETATTR:
		return getattr(answers, request, ret);
	case FUSE_READLINK:
		return readlink(answers, request, ret);
	case FUSE_READ:
		return read_content(answers, request, ret);
	case FUSE_READDIR:
		return list(answers, request, ENG_NODE_ENTRY_SIZE, ret);
	case FUSE_READDIRPLUS:
		return list(answers, request, 0, ret);
	default:
		return ENG_NOT_PLAIN;
	}
}

int eng_answer(struct eng_answers *answers, const uint8_t *request, uint64_t size,
	       uint64_t readable_len, uint64_t writable_len, struct eng_reply *ret)
{
	struct request checked;
	uint64_t end;
	int outcome;

	if (size > readable_len)
		size = readable_len;
	if (size < IN_HEADER_SIZE)
		return ENG_NOT_PLAIN;
	memcpy(&checked.header, request, IN_HEADER_SIZE);
	/* Nothing is kept for a node, so there is nothing to forget. */
	if (checked.header.opcode == FUSE_FORGET || checked.header.opcode == FUSE_BATCH_FORGET)
		return ENG_NO_REPLY;
	if (writable_len < OUT_HEADER_SIZE || checked.header.len < IN_HEADER_SIZE ||
	    checked.header.len > readable_len || !answers->session[0] || !answers->store->is_open)
		return ENG_NOT_PLAIN;
	end = checked.header.len < size ? checked.header.len : size;
	checked.body = request + IN_HEADER_SIZE;
	checked.body_size = end - IN_HEADER_SIZE;
	checked.room = writable_len - OUT_HEADER_SIZE;
	ret->head_size = OUT_HEADER_SIZE;
	ret->fd = -1;
	ret->body = NULL;
	ret->body_size = 0;
	outcome = answer_open(answers, &checked, ret);
	if (outcome == ENG_REPLY)
		put_header(ret, checked.header.unique);
	return outcome;
}

int eng_answers_begin(struct eng_answers *answers)
{
	int code = eng_store_begin(answers->store);
	uint64_t limit = grants_open_files(&answers->places.grants);

	/* Nothing that was read from them is on its way: the batch before has ended. */
	if (limit != answers->blobs.limit)
		eng_blob_fds_limit(&answers->blobs, limit);
	places_begin(&answers->places);
	answers->usage.now_ns = answers->taken_ns;
	return code;
}

void eng_answers_end(struct eng_answers *answers)
{
	eng_store_end(answers->store);
}

void eng_answers_count(struct eng_answers *answers, const uint8_t *request,
		       const struct eng_reply *reply)
{
	struct fuse_in_header header;

	memcpy(&header, request, sizeof(header));
	answers->now_ns = statistics_now_ns();
	statistics_add(answers->statistics, header.opcode, answers->now_ns - answers->taken_ns);
	if (header.opcode == FUSE_READ)
		answers->statistics->read_bytes[reply->fd >= 0] += reply->body_size;
}
