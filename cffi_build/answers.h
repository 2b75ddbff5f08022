/*
 * The plain FUSE requests, answered from the store without Python: a reader of the store's LMDB
 * environment, images of directories, grants, nodes by number, and the answers themselves.
 *
 * This file is part of the cffi cdef of `_engine`, as engine.h is. The caller owns every object
 * named here. A request that is not plain is left to Python, which answers every request and is the
 * reference; so nothing here reports what is wrong with one.
 *
 * Layers, lowest first: lmdb_reader.c, image_view.c, grants.c, usage.c, places.c and blob_fds.c,
 * answers.c, then serve.c and device.c. appliance/images/layout.py and appliance/session/grants_layout.py
 * describe the layouts of images and grants.
 */
#ifndef ANSWERS_H
#define ANSWERS_H
#include "engine.h"

struct MDB_env;
struct MDB_txn;

enum {
	ENG_DIGEST_SIZE = 32,
	ENG_NODE_ENTRY_SIZE = 128,
	ENG_DIRECTORIES_MAX = 2048,	/* cached; a power of two */
	ENG_BLOB_FDS_MAX = 1024,
	ENG_USED_MAX = 512,
	ENG_USED_SLOTS = 1024,
	ENG_OPCODES = 64,
	ENG_LATENCY_BUCKETS = 36,	/* the last one begins at 34 s */
	ENG_HEAD_MAX = 144,		/* an out_header and the largest fixed body */
	ENG_LISTING_SIZE = 1048592,	/* the largest reply that is asked for: 256 pages and a header */
};

/*
 * What one queue has served, in session memory (appliance/session/session_memory.py). One process
 * writes it at a time; others read.
 */
struct eng_statistics {
	uint64_t requests[ENG_OPCODES];	/* answered, by opcode; 0: all others */
	/* Of these, by the binary logarithm of the nanoseconds from when the request was taken. */
	uint64_t latency[ENG_OPCODES][ENG_LATENCY_BUCKETS];
	uint64_t plain_num;		/* answered in C */
	uint64_t waits;			/* times that the worker went to sleep */
	uint64_t polls_paid, polls_vain;	/* looks at an empty ring before that */
	uint64_t read_bytes[2];		/* of answers to READ: from the database, from files */
	/* Found at the last look at the ring; waiting for the supervisor, which Python writes. */
	uint64_t taken, parked;
};

/* Bytes that are owned elsewhere. */
struct eng_bytes {
	const uint8_t *at;
	uint64_t size;
};

/* lmdb_reader.c: one environment, read only, with one transaction that is renewed. */
enum eng_table {
	ENG_META, ENG_BLOBS, ENG_DIRECTORIES, ENG_IMAGES, ENG_PATH_INFOS, ENG_PATH_INFO_LOG,
	ENG_NAR_INFOS, ENG_TABLES,
};

/* Codes of LMDB that the caller does something about. */
enum eng_store_code {
	ENG_STORE_NOT_FOUND = -30798,	/* a database is missing */
	ENG_STORE_RESIZED = -30785,	/* the file has outgrown the map: eng_store_resize() */
};

struct eng_store {
	struct MDB_env *env;
	struct MDB_txn *txn;
	uint32_t table[ENG_TABLES];
	uint32_t has_images;		/* false for a store that was only written by older releases */
	uint32_t is_open;		/* a snapshot is open */
};

/* All return 0, an errno, or a negative code of LMDB, unless their comment says otherwise. */
int eng_store_open(struct eng_store *ret, const char *path, uint64_t map_size, uint32_t readers_max,
		   int is_locked);
void eng_store_close(struct eng_store *store);
int eng_store_begin(struct eng_store *store);
void eng_store_end(struct eng_store *store);
/* Adopts the size that the file has now, at least `map_size` bytes. No snapshot may be open. */
int eng_store_resize(struct eng_store *store, uint64_t map_size);
uint64_t eng_store_map_size(const struct eng_store *store);
/* The number of commits since the snapshot that is open was taken. */
uint64_t eng_store_commits_since(const struct eng_store *store);
const char *eng_store_error(int code);
/* Returns 1 and the value, valid until eng_store_end(); 0 if there is none; else a code. */
int eng_store_get(struct eng_store *store, uint32_t table, const void *key, uint32_t key_size,
		  struct eng_bytes *ret);

/* image_view.c: one piece of an image, with its header checked against its size. */
struct eng_image {
	const uint8_t *at;
	uint64_t size, span;
	uint32_t count, first, pieces_num, offsets_at, digests_at, links, guide_at;
};

/* grants.c: the grants of a session, mapped. */
struct eng_grants {
	int32_t fd;			/* lent */
	const uint8_t *at;
	uint64_t size;
	uint64_t revoked_num;		/* when the cached directories were last dropped */
	uint32_t generation, is_by_content;
};

/* Returns 0 or a negated errno. */
int eng_grants_init(struct eng_grants *ret, int fd);
void eng_grants_deinit(struct eng_grants *grants);

/* A directory on the way to some node; `entry` is the answer to a LOOKUP of it. nodeid 0: none. */
struct eng_directory {
	uint64_t nodeid, parent_ino, ino;
	uint64_t size;			/* as its node states it */
	uint8_t digest[ENG_DIGEST_SIZE];
	uint8_t entry[ENG_NODE_ENTRY_SIZE];
};

/* The piece of an image that was used last; valid within a snapshot. */
struct eng_seen_image {
	uint8_t digest[ENG_DIGEST_SIZE];
	uint32_t piece, is_valid;
	struct eng_image image;
};

/*
 * usage.c: what was used since the last report: of a cache, so that it is not evicted, and of a
 * session that is recorded. A blob is one entry for each segment of it that was read.
 */
enum eng_used_kind { ENG_USED_BLOB, ENG_USED_DIRECTORY, ENG_USED_KINDS };

struct eng_used {
	uint32_t kind;
	/* Of a blob, the part that was read, and its size as its node states it; when that was taken. */
	uint64_t segment, size, used_ns;
	uint8_t digest[ENG_DIGEST_SIZE];
};

/* The caller fills the first part. All times are of CLOCK_MONOTONIC. */
struct eng_usage {
	int32_t is_kept[ENG_USED_KINDS];	/* whether these are noted */
	uint32_t shift;			/* a segment of a blob has 1 << shift bytes */
	uint64_t every_ns;		/* how often there is a report */

	uint32_t num;
	uint64_t now_ns, reported_ns;	/* when the requests at hand were taken; the last report */
	struct eng_used used[ENG_USED_MAX];
	uint16_t slot[ENG_USED_SLOTS];	/* a hash table: indices of `used` from 1 on, or 0 */
};

/* Whether a report is due: in time, or because there may be no room for another batch. */
int eng_usage_is_due(const struct eng_usage *usage, uint64_t now_ns);
void eng_usage_clear(struct eng_usage *usage, uint64_t now_ns);

/* places.c: nodes by their numbers. */
struct eng_places {
	struct eng_store *store;
	struct eng_usage *usage;
	struct eng_grants grants;
	uint32_t last;			/* index of the directory used last */
	struct eng_seen_image seen[2];	/* of first pieces, and of others */
	struct eng_directory directory[ENG_DIRECTORIES_MAX];
};

/* blob_fds.c: files of blobs that are held open; links are slot numbers plus 1. */
struct eng_blob_fd {
	int32_t fd;
	uint16_t newer, older;		/* in the order of use */
	uint16_t next;			/* in the bucket, or among the free ones */
	uint64_t size;
	uint8_t digest[ENG_DIGEST_SIZE];
};

struct eng_blob_fds {
	int32_t directory_fd;		/* of the store's directory, or of blobs/ in it; lent */
	uint32_t skip;			/* bytes of "blobs/ab/abcd..." that it stands for: 0 or 6 */
	uint32_t max;			/* the most that may ever be open */
	uint32_t limit, num;		/* how many may be open now, and are */
	uint16_t newest, oldest;
	uint16_t free, touched;		/* slots that were used before; how many ever were */
	uint16_t bucket[ENG_BLOB_FDS_MAX];
	struct eng_blob_fd slot[ENG_BLOB_FDS_MAX];
};

void eng_blob_fds_init(struct eng_blob_fds *ret, int directory_fd, uint32_t skip, uint32_t max);
/* Sets how many may be open, but no more than `max`, and closes those that are too many. */
void eng_blob_fds_limit(struct eng_blob_fds *fds, uint64_t limit);
void eng_blob_fds_close(struct eng_blob_fds *fds);
/* Closes files that were removed, which frees their space. */
void eng_blob_fds_close_unlinked(struct eng_blob_fds *fds);

/* A reply: `head`, then `body_size` bytes at `body`, or of `fd` from `offset` if that is not -1. */
struct eng_reply {
	uint8_t head[ENG_HEAD_MAX];
	uint32_t head_size;
	int32_t fd;
	int64_t offset;
	const uint8_t *body;
	uint64_t body_size;
};

/* answers.c. The caller fills the first part and calls the three init functions above. */
struct eng_answers {
	const uint8_t *session;		/* the first byte says whether INIT was answered */
	struct eng_statistics *statistics;
	uint8_t *listing;		/* ENG_LISTING_SIZE bytes, aligned to 8 */
	struct eng_store *store;

	struct eng_places places;
	struct eng_blob_fds blobs;
	struct eng_usage usage;
	uint64_t now_ns;		/* CLOCK_MONOTONIC, as last read */
	uint64_t taken_ns;		/* when the requests being answered were taken */
	uint32_t left_num;
	uint32_t left[ENG_SLOTS_MAX];	/* slots whose requests are not plain */
};

enum eng_outcome {
	ENG_NOT_PLAIN,			/* nothing has happened */
	ENG_REPLY,
	ENG_NO_REPLY,			/* a request that has none: FORGET */
};

/*
 * Answers one request inside a snapshot. `size` bytes of it are at `request`, in private memory, of
 * `readable_len` that were sent; the reply has room for `writable_len` bytes. What the reply points
 * to is valid until the next call or the end of the snapshot.
 */
int eng_answer(struct eng_answers *answers, const uint8_t *request, uint64_t size,
	       uint64_t readable_len, uint64_t writable_len, struct eng_reply *ret);
/* Begins a snapshot, and drops what is cached of revoked grants. */
int eng_answers_begin(struct eng_answers *answers);
void eng_answers_end(struct eng_answers *answers);
/*
 * Counts a request that was answered, whose header is whole, and reads the clock. `reply` is what
 * eng_answer() returned; a request without a reply leaves it as it was.
 */
void eng_answers_count(struct eng_answers *answers, const uint8_t *request,
		       const struct eng_reply *reply);

/* serve.c: where a ring's worker waits. The caller fills the first part. */
struct eng_wait {
	int32_t epoll_fd;		/* lent; has the kick and whatever else ends a wait */
	int32_t kick_fd;		/* lent; registered with EPOLLIN | EPOLLET, and never read */
	uint64_t poll_max_ns;		/* 0: the ring is never polled */

	uint64_t poll_ns;		/* how long it is polled before the next sleep */
	uint64_t looked_ns;		/* when epoll_fd was last looked at */
};

/* Pops up to `limit` chains, answers the plain ones, signals once. Returns 0 or a negated ENG_E*. */
int eng_serve_batch(struct eng_answers *answers, struct eng_ring *ring, uint32_t limit);
/*
 * Serves a ring until Python must look. Returns 0 for a look at the descriptors in epoll_fd, at
 * signals, or at usage that is to be reported; 1 for the requests in `left`, which are popped; or a
 * negated ENG_E* code.
 */
int eng_serve_ring(struct eng_answers *answers, struct eng_ring *ring, struct eng_wait *wait);
/*
 * device.c. Serves a /dev/fuse descriptor until a request that is not plain was read, and returns its
 * size; or a negated errno, EAGAIN after a batch of plain ones.
 */
int64_t eng_serve_device(struct eng_answers *answers, int fd, uint8_t *request, uint64_t size);

#endif
