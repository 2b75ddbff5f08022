/* System calls on a mounted directory, as fast as they return. */
#include "bench.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Reads a directory to its end; returns the bytes of its entries, or -1 with errno. */
static ssize_t list(const struct bench_calls *calls, int fd)
{
	ssize_t total = 0;
	ssize_t got;

	if (lseek(fd, 0, SEEK_SET) < 0)
		return -1;
	do {
		got = syscall(SYS_getdents64, fd, calls->buffer, calls->buffer_size);
		total += got;
	} while (got > 0);
	return got < 0 ? -1 : total;
}

/* Returns the bytes that the call delivered, or -1 with errno; 0 there if it should have failed. */
static ssize_t make_call(const struct bench_calls *calls, const struct bench_call *call)
{
	const char *path = calls->paths + call->path;
	struct stat status;
	ssize_t got;

	switch (calls->kind) {
	case BENCH_CALL_STAT:
		return fstatat(AT_FDCWD, path, &status, AT_SYMLINK_NOFOLLOW);
	case BENCH_CALL_ABSENT:
		if (fstatat(AT_FDCWD, path, &status, AT_SYMLINK_NOFOLLOW) < 0)
			return errno == ENOENT ? 0 : -1;
		errno = 0;
		return -1;
	case BENCH_CALL_FSTAT:
		return fstat(call->fd, &status);
	case BENCH_CALL_LIST:
		return list(calls, call->fd);
	case BENCH_CALL_READLINK:
		return readlink(path, (char *)calls->buffer, calls->buffer_size);
	default:
		got = pread(call->fd, calls->buffer, call->size, (off_t)call->offset);
		if (got < 0 || (size_t)got == call->size)
			return got;
		errno = 0;
		return -1;
	}
}

int bench_calls_run(struct bench_calls *calls)
{
	struct bench_figures *figures = calls->figures;
	uint64_t start_ns = now_ns();
	uint64_t began_ns = start_ns;
	uint32_t index = calls->first % calls->calls_num;

	while (began_ns - start_ns < calls->duration_ns) {
		ssize_t got = make_call(calls, &calls->calls[index]);
		uint64_t now = now_ns();
		uint64_t latency_ns = now - began_ns;

		if (got < 0) {
			calls->fault_call = index;
			calls->fault_value = errno;
			return -BENCH_ECALL;
		}
		figures->completed++;
		figures->body_bytes += (uint64_t)got;
		figures->buckets[bench_bucket(latency_ns)]++;
		if (latency_ns > figures->max_ns)
			figures->max_ns = latency_ns;
		began_ns = now;
		index = index + 1 < calls->calls_num ? index + 1 : 0;
	}
	figures->elapsed_ns += began_ns - start_ns;
	return 0;
}
