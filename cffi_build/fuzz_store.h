/* A store, grants and requests for the fuzzers of the answers. */
#ifndef FUZZ_STORE_H
#define FUZZ_STORE_H
#include "answers.h"

enum { FUZZ_REQUEST_SIZE = 320 };

/* The bytes of a fuzzer's input that were not taken yet. */
struct input {
	const uint8_t *data;
	size_t left;
};

/* The next `size` bytes as a number; zeros follow the input. */
uint64_t input_take(struct input *input, size_t size);
/* Cleared memory, which the caller frees. */
void *take_memory(size_t size);
/* Makes a request of FUZZ_REQUEST_SIZE bytes at most, most of them well formed; returns its size. */
uint32_t request_make(struct input *input, uint8_t *to);

/* Makes answers over a small store; the input says which words of images and grants are damaged. */
void fuzz_begin(struct eng_answers *answers, struct input *input);
void fuzz_end(struct eng_answers *answers);
#endif
