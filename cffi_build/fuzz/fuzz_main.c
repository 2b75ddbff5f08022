/*
 * FUZZER COUNT [SEED [FIRST]]: gives a fuzzer COUNT inputs from a fixed generator, the FIRSTth of SEED
 * and those after it. libFuzzer has a main() of its own, so this file is left out there.
 */
#include "fuzz.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Which input it is. */
static char text[96];

/* A sanitizer that is told to abort comes here, too. */
static void on_abort(int number)
{
	if (write(STDERR_FILENO, text, strlen(text)) < 0)
		_exit(2);
	(void)signal(number, SIG_DFL);
	(void)raise(number);
}

/* splitmix64 */
static uint64_t next(uint64_t *state)
{
	uint64_t value = *state += 0x9e3779b97f4a7c15u;

	value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9u;
	value = (value ^ value >> 27) * 0x94d049bb133111ebu;
	return value ^ value >> 31;
}

int main(int argc, char **argv)
{
	unsigned long count = argc > 1 ? strtoul(argv[1], NULL, 10) : 1000;
	unsigned long first = argc > 3 ? strtoul(argv[3], NULL, 10) : 0;
	unsigned long long seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
	uint8_t *data = take_memory(fuzz_input_size);
	int status;

	(void)signal(SIGABRT, on_abort);
	for (unsigned long number = first; number < first + count; number++) {
		uint64_t state = seed << 32 ^ number;
		size_t size = fuzz_input_size - (size_t)(next(&state) % (fuzz_input_size / 4 + 1));

		(void)snprintf(text, sizeof(text), "input %lu of seed %llu; alone: 1 %llu %lu\n", number, seed,
			       seed, number);
		for (size_t at = 0; at < size; at++)
			data[at] = (uint8_t)next(&state);
		(void)LLVMFuzzerTestOneInput(data, size);
	}
	status = fuzz_report(count);
	free(data);
	return status;
}
