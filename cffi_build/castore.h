/* Reading the entries of an encoded Directory; not part of the cdef. */
#ifndef CASTORE_H
#define CASTORE_H
#include "images.h"

/* Checks the encoding of every entry and puts each list before its first one. */
int castore_open(struct img_list lists[3], const uint8_t *at, const uint8_t *end);

/* Reads the next entry of a list, or sets `is_done`. */
int castore_next(struct img_list *list);

/* Returns the list whose next entry has the smallest name, or NULL at the end of all. */
struct img_list *castore_smallest(struct img_list lists[3]);

/* Compares names bytewise: the result is less than, equal to, or greater than 0. */
int castore_compare(const struct img_entry *one, const struct img_entry *other);
#endif
