/* A store, grants and requests for the fuzzers of the answers. */
#ifndef FUZZ_STORE_H
#define FUZZ_STORE_H
#include "answers.h"
#include "fuzz.h"

enum { FUZZ_REQUEST_SIZE = 320 };

/* Makes a request of FUZZ_REQUEST_SIZE bytes at most, most of them well formed; returns its size. */
uint32_t request_make(struct input *input, uint8_t *to);

/* Makes answers over a small store; the input says which words of images and grants are damaged. */
void fuzz_begin(struct eng_answers *answers, struct input *input);
void fuzz_end(struct eng_answers *answers);
/* Takes bytes from the files of blobs, which are open perhaps. */
void fuzz_shrink(void);
#endif
