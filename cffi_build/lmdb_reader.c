/*
 * Reading the store's LMDB environment by the system's library. Python checks the files before
 * (appliance/db/data_file.py), and decides what becomes of an error.
 */
#include "answers.h"

#include <errno.h>
#include <lmdb.h>
#include <string.h>

_Static_assert((int)ENG_STORE_NOT_FOUND == MDB_NOTFOUND, "lmdb.h");
_Static_assert((int)ENG_STORE_RESIZED == MDB_MAP_RESIZED, "lmdb.h");

static const char *const tables[ENG_TABLES] = {
	[ENG_META] = "meta", [ENG_BLOBS] = "blobs", [ENG_DIRECTORIES] = "directories",
	[ENG_IMAGES] = "images1", [ENG_PATH_INFOS] = "path_infos",
	[ENG_PATH_INFO_LOG] = "path_info_log", [ENG_NAR_INFOS] = "nar_infos",
};

static int begin(struct eng_store *store)
{
	int code = mdb_txn_begin(store->env, NULL, MDB_RDONLY, &store->txn);

	if (code == MDB_READERS_FULL) {
		(void)mdb_reader_check(store->env, NULL);
		code = mdb_txn_begin(store->env, NULL, MDB_RDONLY, &store->txn);
	}
	if (code)
		store->txn = NULL;
	return code;
}

/* In a transaction that is committed: handles opened in one that is not are good for nothing. */
static int open_tables(struct eng_store *store)
{
	MDB_dbi dbi;
	int code = begin(store);

	if (code == MDB_MAP_RESIZED) {
		/* Another process has made the file larger since its size was looked up. */
		code = mdb_env_set_mapsize(store->env, 0);
		if (!code)
			code = begin(store);
	}
	for (uint32_t i = 0; !code && i < ENG_TABLES; i++) {
		code = mdb_dbi_open(store->txn, tables[i], 0, &dbi);
		if (!code)
			store->table[i] = dbi;
		if (i == ENG_IMAGES)
			store->has_images = !code;
		if (code == MDB_NOTFOUND && i == ENG_IMAGES)
			code = 0;
	}
	if (code)
		return code;
	code = mdb_txn_commit(store->txn);
	store->txn = NULL;
	return code;
}

int eng_store_open(struct eng_store *ret, const char *path, uint64_t map_size, uint32_t readers_max,
		   int is_locked)
{
	unsigned flags = MDB_RDONLY | MDB_NOTLS | MDB_NORDAHEAD;
	int code;

	memset(ret, 0, sizeof(*ret));
	code = mdb_env_create(&ret->env);
	if (code)
		return code;
	if (!is_locked)
		flags |= MDB_NOLOCK;
	code = mdb_env_set_mapsize(ret->env, map_size);
	if (!code)
		code = mdb_env_set_maxreaders(ret->env, readers_max);
	if (!code)
		code = mdb_env_set_maxdbs(ret->env, ENG_TABLES);
	if (!code)
		code = mdb_env_open(ret->env, path, flags, 0644);
	if (!code)
		code = open_tables(ret);
	if (code)
		eng_store_close(ret);
	return code;
}

void eng_store_close(struct eng_store *store)
{
	if (store->txn)
		mdb_txn_abort(store->txn);
	mdb_env_close(store->env);
	memset(store, 0, sizeof(*store));
}

int eng_store_begin(struct eng_store *store)
{
	int code;

	if (store->is_open)
		return EBUSY;
	if (!store->txn) {
		code = begin(store);
	} else {
		/* Keeps the slot in the reader table. */
		code = mdb_txn_renew(store->txn);
		if (code) {
			mdb_txn_abort(store->txn);
			store->txn = NULL;
		}
	}
	store->is_open = !code;
	return code;
}

void eng_store_end(struct eng_store *store)
{
	if (store->is_open)
		mdb_txn_reset(store->txn);
	store->is_open = 0;
}

int eng_store_resize(struct eng_store *store, uint64_t map_size)
{
	if (store->is_open)
		return EBUSY;
	return mdb_env_set_mapsize(store->env, map_size);
}

uint64_t eng_store_map_size(const struct eng_store *store)
{
	MDB_envinfo info;

	return mdb_env_info(store->env, &info) ? 0 : info.me_mapsize;
}

uint64_t eng_store_commits_since(const struct eng_store *store)
{
	MDB_envinfo info;

	if (!store->is_open || mdb_env_info(store->env, &info))
		return 0;
	return info.me_last_txnid - mdb_txn_id(store->txn);
}

const char *eng_store_error(int code)
{
	return mdb_strerror(code);
}

int eng_store_get(struct eng_store *store, uint32_t table, const void *key, uint32_t key_size,
		  struct eng_bytes *ret)
{
	MDB_val found, wanted = { .mv_size = key_size };
	int code;

	if (!store->is_open)
		return EINVAL;
	if (table >= ENG_TABLES || (table == ENG_IMAGES && !store->has_images))
		return 0;
	/* LMDB does not write to a key that it looks up. */
	memcpy(&wanted.mv_data, &key, sizeof(key));
	code = mdb_get(store->txn, store->table[table], &wanted, &found);
	if (code == MDB_NOTFOUND)
		return 0;
	if (code)
		return code;
	ret->at = found.mv_data;
	ret->size = found.mv_size;
	return 1;
}
