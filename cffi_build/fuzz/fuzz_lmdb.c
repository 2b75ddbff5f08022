/*
 * The reader of the store over a real LMDB environment, which other processes write to between any two
 * calls, beyond what the reader has mapped. A snapshot has what was committed before it began.
 *
 * Input: a byte of modes, then a byte for each call and what it takes.
 */
#define _GNU_SOURCE
#include "answers.h"
#include "fuzz.h"

#include <errno.h>
#include <lmdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

const size_t fuzz_input_size = 160;

enum { NUMBERS = 6, TABLES = 2, CHANGES = 4, VALUE_MAX = 6000, READERS_MAX = 8 };

/* Of the reader, which the file soon outgrows, and of the writer. */
enum { MAP_SIZE = 1 << 16, WRITER_MAP_SIZE = 1 << 23 };

/* A value: one byte, repeated `size` times; absent if the size is 0. */
struct kept {
	uint32_t size;
	uint8_t byte;
};

struct contents {
	struct kept kept[TABLES][NUMBERS];
};

struct change {
	uint32_t table, number;
	struct kept value;
};

static const char *const table_name[ENG_TABLES] = {
	"meta", "blobs", "directories", "images1", "path_infos", "path_info_log", "nar_infos",
};
static const uint32_t table_of[TABLES] = { ENG_BLOBS, ENG_IMAGES };

static char top_name[] = "fuzz_lmdb.XXXXXX";
static struct eng_store store;
static struct contents current, seen;
static uint64_t commits_num, changes_num, seen_commits, seen_changes;
static int is_locked;
static unsigned long found, absent, resized;

/* --- The writer, in a process of its own --- */

static void remove_files(void)
{
	char name[64];

	(void)snprintf(name, sizeof(name), "%s/data.mdb", top_name);
	(void)unlink(name);
	(void)snprintf(name, sizeof(name), "%s/lock.mdb", top_name);
	(void)unlink(name);
}

static void remove_all(void)
{
	remove_files();
	(void)rmdir(top_name);
}

static int write_one(MDB_txn *txn, const struct change *change)
{
	static uint8_t bytes[VALUE_MAX];
	uint8_t digest[ENG_DIGEST_SIZE];
	MDB_val key = { sizeof(digest), digest }, value = { change->value.size, bytes };
	MDB_dbi dbi;
	int code = mdb_dbi_open(txn, table_name[table_of[change->table]], MDB_CREATE, &dbi);

	memset(digest, (int)change->number, sizeof(digest));
	memset(bytes, change->value.byte, change->value.size);
	if (code)
		return code;
	if (change->value.size)
		return mdb_put(txn, dbi, &key, &value, 0);
	code = mdb_del(txn, dbi, &key, NULL);
	return code == MDB_NOTFOUND ? 0 : code;
}

/* `missing` is a table that is not made; ENG_TABLES: none. */
static int write_all(const struct change *changes, uint32_t num, uint32_t missing)
{
	MDB_env *env;
	MDB_txn *txn;
	MDB_dbi dbi;
	int code = mdb_env_create(&env);

	if (!code)
		code = mdb_env_set_mapsize(env, WRITER_MAP_SIZE);
	if (!code)
		code = mdb_env_set_maxdbs(env, ENG_TABLES);
	if (!code)
		code = mdb_env_open(env, top_name, MDB_NOSYNC, 0600);
	if (!code)
		code = mdb_txn_begin(env, NULL, 0, &txn);
	for (uint32_t i = 0; !code && i < ENG_TABLES; i++)
		if (i != missing)
			code = mdb_dbi_open(txn, table_name[i], MDB_CREATE, &dbi);
	for (uint32_t i = 0; !code && i < num; i++)
		code = write_one(txn, &changes[i]);
	return code ? code : mdb_txn_commit(txn);
}

static void commit(struct input *input, uint32_t missing)
{
	struct change changes[CHANGES];
	uint32_t num = (uint32_t)input_take(input, 1) % (CHANGES + 1);
	uint64_t choice = input_take(input, 1);
	int is_changed = 0;
	int status;
	pid_t pid;

	for (uint32_t i = 0; i < num; i++) {
		struct change *change = &changes[i];

		change->table = (uint32_t)input_take(input, 1) % TABLES;
		if (missing == table_of[change->table])
			change->table = 1 - change->table;
		change->number = (uint32_t)input_take(input, 1) % NUMBERS;
		change->value.byte = (uint8_t)input_take(input, 1);
		change->value.size = (uint32_t)input_take(input, choice & 1 ? 1 : 2) % VALUE_MAX;
		is_changed |= change->value.size || current.kept[change->table][change->number].size;
		current.kept[change->table][change->number] = change->value;
	}
	commits_num++;
	changes_num += (uint64_t)is_changed;
	pid = fork();
	if (!pid)
		_exit(write_all(changes, num, missing) ? 1 : 0);
	MUST(pid > 0 && waitpid(pid, &status, 0) == pid && !status);
}

/* --- The reader --- */

static int begin(void)
{
	int is_open = (int)store.is_open;
	int code = eng_store_begin(&store);

	if (is_open) {
		MUST(code == EBUSY);
		return 0;
	}
	if (code == ENG_STORE_RESIZED) {
		resized++;
		MUST(!store.is_open && !eng_store_resize(&store, 0));
		code = eng_store_begin(&store);
	}
	MUST(!code && eng_store_map_size(&store) >= MAP_SIZE);
	seen = current;
	seen_commits = commits_num;
	seen_changes = changes_num;
	return 1;
}

static void get(struct input *input)
{
	uint32_t choice = (uint32_t)input_take(input, 1);
	uint32_t number = (uint32_t)input_take(input, 1) % NUMBERS;
	uint32_t table = choice % TABLES;
	struct kept kept = seen.kept[table][number];
	uint8_t digest[ENG_DIGEST_SIZE];
	struct eng_bytes bytes;
	int status;

	/* Without a lock, nothing keeps the pages of a snapshot from being written to. */
	if (store.is_open && !is_locked && commits_num != seen_commits) {
		eng_store_end(&store);
		(void)begin();
		kept = seen.kept[table][number];
	}
	memset(digest, (int)number, sizeof(digest));
	if (!store.is_open) {
		MUST(eng_store_get(&store, table_of[table], digest, sizeof(digest), &bytes) == EINVAL);
		return;
	}
	MUST(!eng_store_get(&store, ENG_TABLES + choice, digest, sizeof(digest), &bytes));
	status = eng_store_get(&store, table_of[table], digest, sizeof(digest), &bytes);
	if (!store.has_images && table_of[table] == ENG_IMAGES)
		kept.size = 0;
	MUST(status == (kept.size != 0));
	if (!status) {
		absent++;
		return;
	}
	MUST(bytes.size == kept.size);
	for (uint64_t i = 0; i < bytes.size; i++)
		MUST(bytes.at[i] == kept.byte);
	found++;
}

/* Whether a transaction that changes nothing counts is LMDB's to say. */
static void check_commits(void)
{
	uint64_t since = eng_store_commits_since(&store);

	if (!store.is_open)
		MUST(!since);
	else
		MUST(since >= changes_num - seen_changes && since <= commits_num - seen_commits);
}

static void call(struct input *input)
{
	uint64_t choice = input_take(input, 1);

	switch (choice % 8) {
	case 0:
		commit(input, ENG_TABLES);
		break;
	case 1: case 2:
		(void)begin();
		break;
	case 3:
		eng_store_end(&store);
		break;
	case 4:
		check_commits();
		MUST(strlen(eng_store_error((int)choice - 128)) > 0);
		MUST(!store.is_open || eng_store_resize(&store, 0) == EBUSY);
		break;
	default:
		get(input);
		break;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static int is_made;
	struct input input = { .data = data, .left = size };
	uint64_t choice = input_take(&input, 1);
	uint32_t missing = choice % 4 ? ENG_TABLES : (uint32_t)(choice >> 2) % ENG_TABLES;
	int code;

	if (!is_made)
		MUST(mkdtemp(top_name) && !atexit(remove_all));
	is_made = 1;
	remove_files();
	memset(&current, 0, sizeof(current));
	memset(&seen, 0, sizeof(seen));
	commits_num = changes_num = 0;
	MUST(eng_store_open(&store, top_name, MAP_SIZE, READERS_MAX, 1) == ENOENT);
	commit(&input, missing);
	is_locked = choice >> 7 == 0;
	code = eng_store_open(&store, top_name, MAP_SIZE, READERS_MAX, is_locked);
	if (missing != ENG_TABLES && missing != ENG_IMAGES) {
		MUST(code == ENG_STORE_NOT_FOUND);
		return 0;
	}
	MUST(!code && store.has_images == (missing == ENG_TABLES));
	while (input.left > 2)
		call(&input);
	eng_store_close(&store);
	return 0;
}

int fuzz_report(unsigned long count)
{
	printf("%lu inputs, %lu values found, %lu absent, %lu resized\n", count, found, absent, resized);
	return found && absent && resized ? 0 : 1;
}
