/*
 * The loop of a worker that serves a ring: it answers plain requests and leaves the others to Python.
 *
 * Theory of operation. One turn takes a batch of chains, answers the plain ones, and signals the guest
 * at the end. Between the pop and the last reply there is no other system call than preadv(2), and
 * openat(2) and fstat(2) when a blob file is read for the first time.
 *
 * A large batch also has a signal after its first reply. Without it, guest and worker take turns: each
 * sleeps until the other has done all of its share. With it, the guest wakes up while the worker goes on,
 * and takes the other replies without a signal, because it asks for none while it is awake.
 *
 * The guest does not kick while the ring is served. When the ring is empty, the loop first polls it
 * for `poll_ns`, which costs no system call and keeps kicks suppressed. Then it asks for a kick, looks
 * once more, and sleeps in epoll_wait(2). The kick descriptor is registered edge-triggered, so it is
 * never read: each write to it is an edge, and how often it was written to does not matter.
 *
 * How long to poll is learned from how long the loop slept (as the kernel's kvm module does it for
 * halted vCPUs). A sleep shorter than `poll_max_ns` would have been avoided by polling, so the time
 * doubles; a longer one means that polling was in vain, so it is halved. An idle guest thus costs one
 * short poll after its last request, and nothing from then on.
 *
 * The control channel, which is in the same epoll set, is looked at whenever the loop would sleep, and
 * once in LOOK_EVERY_NS while it does not.
 */
#include "barrier.h"
#include "statistics.h"

#include <errno.h>
#include <sys/epoll.h>

enum { EVENTS = 4, BATCH = 32, LARGE_BATCH = 8, LOADS_PER_CLOCK = 16 };

/*
 * So many bytes of replies are worth a signal within a batch: the guest can go on meanwhile. Each later
 * signal takes twice as many as the one before, up to 1 MiB, which takes several times as long to copy
 * as a signal takes.
 */
enum { SIGNAL_FIRST = 262144, SIGNAL_LAST = 1048576 };
#define LOOK_EVERY_NS 1000000u
#define POLL_FIRST_NS 8000u

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
	eng_answers_count(answers, request, &reply);
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
	uint64_t unsignalled = 0;
	uint64_t signal_at = SIGNAL_FIRST;

	answers->left_num = 0;
	answers->statistics->taken = num < 0 ? 0 : (uint64_t)num;
	if (num <= 0)
		return status;
	answers->taken_ns = answers->now_ns = statistics_now_ns();
	(void)eng_answers_begin(answers);
	for (uint32_t slot = 0; slot < (uint32_t)num && status >= 0; slot++) {
		uint32_t length;

		status = serve_slot(answers, ring, slot, &length);
		if (!status)
			answers->left[answers->left_num++] = slot;
		unsignalled += length;
		if (unsignalled >= signal_at || (!slot && num >= LARGE_BATCH)) {
			signal_between(answers, ring);
			unsignalled = 0;
			signal_at = signal_at < SIGNAL_LAST ? 2 * signal_at : SIGNAL_LAST;
		}
	}
	eng_answers_end(answers);
	eng_ring_signal(ring);
	return status < 0 ? status : 0;
}

/* Looks at the ring for as long as that has paid lately; returns whether there is something. */
static int poll_ring(struct eng_answers *answers, const struct eng_ring *ring,
		     const struct eng_wait *wait)
{
	uint64_t until = answers->now_ns + wait->poll_ns;

	if (!wait->poll_ns)
		return 0;
	do {
		for (uint32_t i = 0; i < LOADS_PER_CLOCK; i++) {
			if (eng_ring_has_chains(ring)) {
				answers->statistics->polls_paid++;
				return 1;
			}
			eng_relax();
		}
		answers->now_ns = statistics_now_ns();
	} while (answers->now_ns < until);
	answers->statistics->polls_vain++;
	return 0;
}

static void learn(struct eng_wait *wait, uint64_t slept_ns)
{
	if (slept_ns >= wait->poll_max_ns)
		wait->poll_ns = wait->poll_ns > POLL_FIRST_NS ? wait->poll_ns / 2 : 0;
	else
		wait->poll_ns = wait->poll_ns ? 2 * wait->poll_ns : POLL_FIRST_NS;
	if (wait->poll_ns > wait->poll_max_ns)
		wait->poll_ns = wait->poll_max_ns;
}

/* Returns 1; 0 if there was something else than kicks; or a negated code. */
static int look(struct eng_ring *ring, const struct eng_wait *wait, int timeout_ms)
{
	struct epoll_event events[EVENTS];
	int num = epoll_wait(wait->epoll_fd, events, EVENTS, timeout_ms);
	int is_kick_only = num >= 0;

	for (int i = 0; i < num; i++) {
		if (events[i].data.fd != wait->kick_fd)
			is_kick_only = 0;
		else if (events[i].events != EPOLLIN)
			return eng_ring_break(ring, ENG_EKICK, 0, events[i].events);
	}
	return is_kick_only;
}

/* Waits until the guest has sent something; returns 0 if Python must look, or a negated code. */
static int wait_for_chains(struct eng_answers *answers, struct eng_ring *ring,
			   struct eng_wait *wait)
{
	uint64_t slept_ns;
	int status;

	if (eng_ring_has_chains(ring) || poll_ring(answers, ring, wait)) {
		if (answers->now_ns - wait->looked_ns < LOOK_EVERY_NS)
			return 1;
		wait->looked_ns = answers->now_ns;
		return look(ring, wait, 0);
	}
	status = eng_ring_arm(ring);
	if (status)
		return status;
	slept_ns = answers->now_ns;
	answers->statistics->waits++;
	/* A shift by 20 is as good as milliseconds. */
	status = look(ring, wait, answers->usage.num ? (int)(answers->usage.every_ns >> 20) : -1);
	wait->looked_ns = answers->now_ns = statistics_now_ns();
	slept_ns = answers->now_ns - slept_ns;
	if (status > 0)
		learn(wait, slept_ns);
	return status;
}

int eng_serve_ring(struct eng_answers *answers, struct eng_ring *ring, struct eng_wait *wait)
{
	int status;

	answers->now_ns = statistics_now_ns();
	do {
		status = eng_serve_batch(answers, ring, BATCH);
		if (status < 0)
			return status;
		if (answers->left_num)
			return 1;
		if (eng_usage_is_due(&answers->usage, answers->now_ns))
			return 0;
		status = wait_for_chains(answers, ring, wait);
	} while (status > 0);
	return status;
}
