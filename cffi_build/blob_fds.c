/* Files of blobs, held open. When all slots are taken, one that was not used lately gives way. */
#include "blob_fds.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

void eng_blob_fds_init(struct eng_blob_fds *ret, int directory_fd, uint32_t skip, uint32_t num)
{
	ret->directory_fd = directory_fd;
	ret->skip = skip;
	ret->num = num > ENG_BLOB_FDS_MAX ? ENG_BLOB_FDS_MAX : num;
	ret->next = 0;
	for (uint32_t i = 0; i < ENG_BLOB_FDS_MAX; i++)
		ret->slot[i].fd = -1;
}

static void drop(struct eng_blob_fd *slot)
{
	if (slot->fd >= 0)
		(void)close(slot->fd);
	slot->fd = -1;
}

void eng_blob_fds_close(struct eng_blob_fds *fds)
{
	for (uint32_t i = 0; i < ENG_BLOB_FDS_MAX; i++)
		drop(&fds->slot[i]);
}

void eng_blob_fds_close_unlinked(struct eng_blob_fds *fds)
{
	for (uint32_t i = 0; i < ENG_BLOB_FDS_MAX; i++) {
		struct stat status;

		if (fds->slot[i].fd >= 0 && !fstat(fds->slot[i].fd, &status) && !status.st_nlink)
			drop(&fds->slot[i]);
	}
}

int blob_fds_find(struct eng_blob_fds *fds, const uint8_t *digest, uint64_t size)
{
	for (uint32_t i = 0; i < fds->num; i++) {
		struct eng_blob_fd *slot = &fds->slot[i];

		if (slot->fd >= 0 && !memcmp(slot->digest, digest, ENG_DIGEST_SIZE)) {
			slot->is_used = 1;
			/* Directories may state different sizes for one blob. */
			return slot->size >= size ? slot->fd : -1;
		}
	}
	return -1;
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

/* Returns a free slot, or the next one that was not used since the search last passed it. */
static struct eng_blob_fd *slot_to_use(struct eng_blob_fds *fds)
{
	for (;;) {
		struct eng_blob_fd *slot = &fds->slot[fds->next];

		fds->next = (fds->next + 1) % fds->num;
		if (slot->fd < 0 || !slot->is_used)
			return slot;
		slot->is_used = 0;
	}
}

int blob_fds_get(struct eng_blob_fds *fds, const uint8_t *digest, uint64_t size, uint64_t recorded)
{
	struct eng_blob_fd *slot;
	struct stat status;
	int fd = blob_fds_find(fds, digest, size);

	if (fd >= 0 || !fds->num)
		return fd;
	fd = open_file(fds, digest);
	if (fd < 0)
		return -1;
	if (fstat(fd, &status) < 0 || status.st_size < 0 || (uint64_t)status.st_size != recorded ||
	    recorded < size) {
		(void)close(fd);
		return -1;
	}
	slot = slot_to_use(fds);
	drop(slot);
	slot->fd = fd;
	slot->is_used = 1;
	slot->size = (uint64_t)status.st_size;
	memcpy(slot->digest, digest, ENG_DIGEST_SIZE);
	return fd;
}
