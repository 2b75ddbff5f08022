/* The loop of a worker that serves a ring: answers plain requests, leaves others to Python. */
#include "answers.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

enum { EVENTS = 4, BATCH = 32 };

/* A reply this large is worth a signal of its own, so that the guest can go on meanwhile. */
#define LARGE_REPLY 65536u

/* Returns 0 and the used length, or -1: the chain is as it was, but for bytes in its buffers. */
static int deliver(struct eng_ring *ring, uint32_t slot, const struct eng_reply *reply,
		   uint32_t *ret)
{
	*ret = (uint32_t)(reply->head_size + reply->body_size);
	if (reply->fd >= 0) {
		/* The header goes last: what it says depends on what the file gave. */
		int64_t got = eng_slot_read_file(ring, slot, reply->head_size, reply->fd,
						 reply->offset, reply->body_size);

		if (got < 0 || (uint64_t)got != reply->body_size)
			return -1;
	} else if (reply->body_size) {
		if (eng_slot_write(ring, slot, reply->head_size, reply->body, reply->body_size))
			return -1;
	}
	return eng_slot_write(ring, slot, 0, reply->head, reply->head_size) ? -1 : 0;
}

/* Returns 1 if the request in `slot` was answered, 0 if it is not plain, or a negated code. */
static int serve_slot(struct eng_answers *answers, struct eng_ring *ring, uint32_t slot,
		      uint32_t *length)
{
	const uint8_t *request = ring->scratch + ring->request_start[slot];
	uint32_t size = ring->request_end[slot] - ring->request_start[slot];
	struct eng_reply reply;
	int status;

	*length = 0;
	switch (eng_answer(answers, request, size, ring->readable_len[slot],
			   ring->writable_len[slot], &reply)) {
	case ENG_REPLY:
		if (deliver(ring, slot, &reply, length))
			return 0;
		break;
	case ENG_NO_REPLY:
		break;
	default:
		return 0;
	}
	status = eng_ring_complete(ring, slot, *length);
	if (status)
		return status;
	eng_answers_count(answers, request);
	return 1;
}

/*
 * The front-end could hold our snapshot by a descriptor that blocks: a signal is given outside of
 * one.
 */
static void signal_between(struct eng_answers *answers, struct eng_ring *ring)
{
	eng_answers_end(answers);
	eng_ring_signal(ring);
	/* If it cannot be opened again, nothing is plain any more. */
	(void)eng_answers_begin(answers);
}

int eng_serve_batch(struct eng_answers *answers, struct eng_ring *ring, uint32_t limit)
{
	int num = eng_ring_pop(ring, limit);
	int status = num < 0 ? num : 0;

	answers->left_num = 0;
	if (num <= 0)
		return status;
	(void)eng_answers_begin(answers);
	for (uint32_t slot = 0; slot < (uint32_t)num && status >= 0; slot++) {
		uint32_t length;

		status = serve_slot(answers, ring, slot, &length);
		if (!status)
			answers->left[answers->left_num++] = slot;
		if (length >= LARGE_REPLY && ring->is_signal_due)
			signal_between(answers, ring);
	}
	eng_answers_end(answers);
	eng_ring_signal(ring);
	return status < 0 ? status : 0;
}

/* Returns 1 if the descriptor of the kick can be used further, 0 if Python must look at it. */
static int take_kick(int kick_fd)
{
	uint64_t value;
	ssize_t got = read(kick_fd, &value, sizeof(value));

	/* EAGAIN: the front-end, which holds the descriptor too, was faster. */
	return got > 0 || (got < 0 && (errno == EAGAIN || errno == EINTR));
}

/* Waits for a kick. Returns 1 after one, or if `is_busy`; 0 at anything else. */
static int wait_for_kick(int epoll_fd, int kick_fd, int is_busy)
{
	struct epoll_event events[EVENTS];
	int num = epoll_wait(epoll_fd, events, EVENTS, is_busy ? 0 : -1);
	int is_kick_only = num >= 0;

	for (int i = 0; i < num; i++) {
		if (events[i].data.fd != kick_fd || !take_kick(kick_fd))
			is_kick_only = 0;
	}
	return is_kick_only;
}

int eng_serve_ring(struct eng_answers *answers, struct eng_ring *ring, int epoll_fd, int kick_fd,
		   int is_busy)
{
	answers->left_num = 0;
	while (wait_for_kick(epoll_fd, kick_fd, is_busy)) {
		int status = eng_serve_batch(answers, ring, BATCH);

		if (status < 0)
			return status;
		if (answers->left_num)
			return 1;
		is_busy = eng_ring_arm(ring);
		if (is_busy < 0)
			return is_busy;
		if (eng_usage_is_due(&answers->usage))
			return 0;
	}
	return 0;
}
