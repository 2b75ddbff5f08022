/* The loop of a worker that serves a /dev/fuse descriptor; one request per read(2). */
#include "statistics.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

enum { BATCH = 32 };		/* requests between two looks at what else there is */

/* Returns 0, a negated errno, or 1: the request is not plain after all. */
static int deliver_to_device(struct eng_answers *answers, int fd, struct eng_reply *reply)
{
	struct iovec parts[2] = { { .iov_base = reply->head, .iov_len = reply->head_size } };
	ssize_t sent;

	if (reply->fd >= 0) {
		ssize_t got;

		if (reply->body_size > ENG_LISTING_SIZE)
			return 1;
		got = pread(reply->fd, answers->listing, reply->body_size, reply->offset);
		if (got < 0 || (uint64_t)got != reply->body_size)
			return 1;
		reply->body = answers->listing;
	}
	/* writev(2) reads what the vector points to, and no more. */
	memcpy(&parts[1].iov_base, &reply->body, sizeof(reply->body));
	parts[1].iov_len = reply->body_size;
	sent = writev(fd, parts, 2);
	/* ENOENT: interrupted, or answered by another worker after it was sent again. */
	return sent < 0 && errno != ENOENT ? -errno : 0;
}

int64_t eng_serve_device(struct eng_answers *answers, int fd, uint8_t *request, uint64_t size)
{
	for (uint32_t i = 0; i < BATCH; i++) {
		ssize_t got = read(fd, request, size);
		struct eng_reply reply;
		int outcome;
		int status = 0;

		if (got < 0)
			return -errno;
		answers->taken_ns = statistics_now_ns();
		(void)eng_answers_begin(answers);
		outcome = eng_answer(answers, request, (uint64_t)got, (uint64_t)got,
				     ENG_LISTING_SIZE, &reply);
		if (outcome == ENG_REPLY)
			status = deliver_to_device(answers, fd, &reply);
		eng_answers_end(answers);
		if (status < 0)
			return status;
		if (status || outcome == ENG_NOT_PLAIN)
			return got;
		eng_answers_count(answers, request, &reply);
		if (eng_usage_is_due(&answers->usage, answers->now_ns))
			break;
	}
	return -EAGAIN;
}
