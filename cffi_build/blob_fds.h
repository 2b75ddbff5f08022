/* Files of blobs, held open; not part of the cdef. */
#ifndef BLOB_FDS_H
#define BLOB_FDS_H
#include "answers.h"

/*
 * Returns a descriptor of the file of a blob, or -1 if it has not the size on record, or that is less
 * than `size`. It is valid until the next call.
 */
int blob_fds_get(struct eng_blob_fds *fds, const uint8_t *digest, uint64_t size, uint64_t recorded);
/* The same, but only of a file that is open. */
int blob_fds_find(struct eng_blob_fds *fds, const uint8_t *digest, uint64_t size);
#endif
