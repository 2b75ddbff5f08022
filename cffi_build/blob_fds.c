/*
 * Files of blobs that are held open: a hash table for the search by digest, and a list in the order of
 * use. When there are as many as may be open, the one that was used longest ago is closed. The digest
 * is a hash already, so its first bytes choose the bucket.
 *
 * Links are slot numbers plus 1, and 0 stands for none.
 */
#include "blob_fds.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

void eng_blob_fds_init(struct eng_blob_fds *ret, int directory_fd, uint32_t skip, uint32_t max)
{
	memset(ret, 0, sizeof(*ret));
	ret->directory_fd = directory_fd;
	ret->skip = skip;
	ret->max = ret->limit = max > ENG_BLOB_FDS_MAX ? ENG_BLOB_FDS_MAX : max;
}

static uint16_t *bucket_of(struct eng_blob_fds *fds, const uint8_t *digest)
{
	return &fds->bucket[(digest[0] | (uint32_t)digest[1] << 8) % ENG_BLOB_FDS_MAX];
}

/* --- The list in the order of use --- */

static uint16_t *newer_of(struct eng_blob_fds *fds, uint16_t link)
{
	return link ? &fds->slot[link - 1].newer : &fds->oldest;
}

static uint16_t *older_of(struct eng_blob_fds *fds, uint16_t link)
{
	return link ? &fds->slot[link - 1].older : &fds->newest;
}

static void unlink_slot(struct eng_blob_fds *fds, const struct eng_blob_fd *slot)
{
	*newer_of(fds, slot->older) = slot->newer;
	*older_of(fds, slot->newer) = slot->older;
}

static void link_newest(struct eng_blob_fds *fds, struct eng_blob_fd *slot)
{
	uint16_t link = (uint16_t)(slot - fds->slot + 1);

	slot->older = fds->newest;
	slot->newer = 0;
	*newer_of(fds, fds->newest) = link;
	fds->newest = link;
}

/* --- Closing --- */

static void drop(struct eng_blob_fds *fds, struct eng_blob_fd *slot)
{
	uint16_t link = (uint16_t)(slot - fds->slot + 1);
	uint16_t *at = bucket_of(fds, slot->digest);

	while (*at != link)
		at = &fds->slot[*at - 1].next;
	*at = slot->next;
	unlink_slot(fds, slot);
	(void)close(slot->fd);
	slot->next = fds->free;
	fds->free = link;
	fds->num--;
}

void eng_blob_fds_limit(struct eng_blob_fds *fds, uint64_t limit)
{
	fds->limit = limit > fds->max ? fds->max : (uint32_t)limit;
	while (fds->num > fds->limit)
		drop(fds, &fds->slot[fds->oldest - 1]);
}

void eng_blob_fds_close(struct eng_blob_fds *fds)
{
	eng_blob_fds_limit(fds, 0);
}

void eng_blob_fds_close_unlinked(struct eng_blob_fds *fds)
{
	uint16_t link = fds->newest;

	while (link) {
		struct eng_blob_fd *slot = &fds->slot[link - 1];
		struct stat status;

		link = slot->older;
		if (!fstat(slot->fd, &status) && !status.st_nlink)
			drop(fds, slot);
	}
}

/* --- Finding and opening --- */

static struct eng_blob_fd *find(struct eng_blob_fds *fds, const uint8_t *digest)
{
	uint16_t link = *bucket_of(fds, digest);

	while (link && memcmp(fds->slot[link - 1].digest, digest, ENG_DIGEST_SIZE) != 0)
		link = fds->slot[link - 1].next;
	return link ? &fds->slot[link - 1] : NULL;
}

int blob_fds_find(struct eng_blob_fds *fds, const uint8_t *digest, uint64_t size)
{
	struct eng_blob_fd *slot = find(fds, digest);

	/* Directories may state different sizes for one blob. */
	if (!slot || slot->size < size)
		return -1;
	if (slot->newer) {
		unlink_slot(fds, slot);
		link_newest(fds, slot);
	}
	return slot->fd;
}

/* blobs/ab/abcd..., as appliance/store/schema.py says. */
static int open_file(const struct eng_blob_fds *fds, const uint8_t *digest)
{
	static const char digits[] = "0123456789abcdef";
	char name[] = "blobs/00/................................................................";
	char *to = name + sizeof("blobs/00/") - 1;

	for (uint32_t i = 0; i < ENG_DIGEST_SIZE; i++) {
		*to++ = digits[digest[i] >> 4];
		*to++ = digits[digest[i] & 15];
	}
	name[6] = digits[digest[0] >> 4];
	name[7] = digits[digest[0] & 15];
	return openat(fds->directory_fd, name + fds->skip, O_RDONLY | O_CLOEXEC);
}

static void add(struct eng_blob_fds *fds, const uint8_t *digest, int fd, uint64_t size)
{
	uint16_t *bucket = bucket_of(fds, digest);
	uint16_t link = fds->free ? fds->free : ++fds->touched;
	struct eng_blob_fd *slot = &fds->slot[link - 1];

	if (link == fds->free)
		fds->free = slot->next;
	slot->fd = fd;
	slot->size = size;
	memcpy(slot->digest, digest, ENG_DIGEST_SIZE);
	slot->next = *bucket;
	*bucket = link;
	link_newest(fds, slot);
	fds->num++;
}

int blob_fds_get(struct eng_blob_fds *fds, const uint8_t *digest, uint64_t size, uint64_t recorded)
{
	struct eng_blob_fd *slot = find(fds, digest);
	struct stat status;
	int fd = blob_fds_find(fds, digest, size);

	if (fd >= 0 || !fds->limit)
		return fd;
	fd = open_file(fds, digest);
	if (fd < 0)
		return -1;
	if (fstat(fd, &status) < 0 || status.st_size < 0 || (uint64_t)status.st_size != recorded ||
	    recorded < size) {
		(void)close(fd);
		return -1;
	}
	if (slot)
		drop(fds, slot);
	else if (fds->num >= fds->limit)
		drop(fds, &fds->slot[fds->oldest - 1]);
	add(fds, digest, fd, (uint64_t)status.st_size);
	return fd;
}
