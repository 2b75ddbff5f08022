/* What all fuzzers share: their input, memory, and what fuzz_main.c asks of each. */
#ifndef FUZZ_H
#define FUZZ_H
#include <stddef.h>
#include <stdint.h>

/* The bytes of a fuzzer's input that were not taken yet. */
struct input {
	const uint8_t *data;
	size_t left;
};

/* The next `size` bytes, 8 at most, as a number; zeros follow the input. */
uint64_t input_take(struct input *input, size_t size);
/* Cleared memory, which the caller frees. */
void *take_memory(size_t size);

/* Ends the process, and says what did not hold. */
_Noreturn void fuzz_fail(const char *claim, const char *file, int line);
#define MUST(claim) ((claim) ? (void)0 : fuzz_fail(#claim, __FILE__, __LINE__))

/* --- Each fuzzer has these three --- */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
/* The largest input that fuzz_main.c makes, in bytes. */
extern const size_t fuzz_input_size;
/* Prints what `count` inputs have reached; returns 0 if the inputs were worth something. */
int fuzz_report(unsigned long count);
#endif
