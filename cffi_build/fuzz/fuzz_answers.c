/*
 * Asks the answers with the fuzzer's requests, over images and grants that the fuzzer has damaged: as
 * they are, through a ring, and through a descriptor like that of /dev/fuse.
 *
 * Input: how many words of the images and of the grants are overwritten, where and with what; then
 * requests, each of a few bytes that pick opcode, node, name and numbers, so that most are well
 * formed and go deep. What a reply points to and claims is checked, and what comes out of the ring
 * and of the descriptor is compared with it.
 */
#define _GNU_SOURCE
#include "fuzz_store.h"

#include <errno.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum {
	ROOM_MAX = 5000,
	NUM = 64,			/* entries of the ring */
	CHAINS_MAX = 9,			/* more than what the loop calls a large batch */
	RING_GPA = 0x10000,
	AVAIL_AT = 16 * NUM,
	USED_AT = AVAIL_AT + 192,
	CHAINS_AT = 2048,
	CHAIN_SIZE = FUZZ_REQUEST_SIZE + ROOM_MAX,
	REGION_SIZE = CHAINS_AT + CHAINS_MAX * CHAIN_SIZE,
};

/* A request, and the answer that eng_answer() gives to it. */
struct asked {
	uint8_t *request;		/* allocated exactly */
	uint32_t size;
	uint64_t room;
	int outcome;
	uint32_t reply_size;
	uint8_t reply[ENG_HEAD_MAX + ROOM_MAX];
};

static uint32_t replies_num, not_plain_num;
/* How many are asked at once. */
static uint32_t chains_num;

/* Returns 0 if the file of a blob ends too early: whoever delivers the reply finds out. */
static int reply_check(const struct eng_reply *reply, struct asked *asked)
{
	struct fuse_out_header header;

	memcpy(&header, reply->head, sizeof(header));
	if (reply->head_size > sizeof(reply->head) || header.error || header.unique != 1 ||
	    header.len != reply->head_size + reply->body_size || header.len > asked->room)
		abort();
	memcpy(asked->reply, reply->head, reply->head_size);
	if (reply->fd >= 0) {
		ssize_t got = pread(reply->fd, asked->reply + reply->head_size, reply->body_size,
				    reply->offset);

		if (got < 0 || (uint64_t)got != reply->body_size)
			return 0;
	} else if (reply->body_size) {
		memcpy(asked->reply + reply->head_size, reply->body, reply->body_size);
	}
	asked->reply_size = header.len;
	return 1;
}

static void ask(struct eng_answers *answers, struct input *input, struct asked *ret)
{
	uint8_t request[FUZZ_REQUEST_SIZE];
	struct eng_reply reply;

	ret->size = request_make(input, request);
	ret->room = input_take(input, 2) % ROOM_MAX;
	ret->request = take_memory(ret->size);
	memcpy(ret->request, request, ret->size);
	ret->reply_size = 0;
	(void)eng_answers_begin(answers);
	ret->outcome = eng_answer(answers, ret->request, ret->size, ret->size, ret->room, &reply);
	if (ret->outcome == ENG_REPLY && !reply_check(&reply, ret))
		ret->outcome = ENG_NOT_PLAIN;
	replies_num += ret->outcome == ENG_REPLY;
	not_plain_num += ret->outcome == ENG_NOT_PLAIN;
	eng_answers_end(answers);
}

/* With damaged images, what is known of directories decides what is found. */
static void forget(struct eng_answers *answers)
{
	for (uint32_t i = 0; i < ENG_DIRECTORIES_MAX; i++)
		answers->places.directory[i].nodeid = 0;
}

/* --- Through a ring --- */

struct guest {
	struct eng_map map;
	struct eng_ring ring;
	uint8_t *ram;
	uint32_t descs;			/* how many are in use */
	int kick_fd;
};

/* Adds a buffer in up to three pieces, all of one chain that ends with the last of them if `is_last`. */
static void add_buffer(struct guest *guest, struct input *input, uint64_t at, uint64_t size,
		       uint16_t flags, int is_last)
{
	struct vring_desc *table = (struct vring_desc *)(void *)guest->ram;
	uint32_t pieces = 1 + (uint32_t)input_take(input, 1) % 3;

	while (pieces--) {
		uint64_t step = pieces ? input_take(input, 1) % (size + 1) : size;
		struct vring_desc *desc = &table[guest->descs++];

		desc->addr = RING_GPA + at;
		desc->len = (uint32_t)step;
		desc->flags = flags;
		desc->next = (uint16_t)guest->descs;
		if (pieces || !is_last)
			desc->flags |= VRING_DESC_F_NEXT;
		at += step;
		size -= step;
	}
}

static void guest_init(struct guest *guest, struct input *input, const struct asked *asked)
{
	static uint8_t *scratch, *iov;
	uint16_t *avail;

	/* Too large to be cleared each time. */
	if (!scratch) {
		scratch = take_memory(ENG_SCRATCH_SIZE);
		iov = take_memory(ENG_IOV_SIZE);
	}
	memset(guest, 0, sizeof(*guest));
	guest->ram = take_memory(REGION_SIZE);
	guest->map.num = 1;
	guest->map.region[0].gpa = guest->map.region[0].user_addr = RING_GPA;
	guest->map.region[0].size = REGION_SIZE;
	guest->map.region[0].host = guest->ram;
	avail = (uint16_t *)(void *)(guest->ram + AVAIL_AT);
	for (uint32_t i = 0; i < chains_num; i++) {
		uint64_t at = CHAINS_AT + i * (uint64_t)CHAIN_SIZE;

		avail[2 + i] = (uint16_t)guest->descs;
		memcpy(guest->ram + at, asked[i].request, asked[i].size);
		add_buffer(guest, input, at, asked[i].size, 0, !asked[i].room);
		if (asked[i].room)
			add_buffer(guest, input, at + FUZZ_REQUEST_SIZE, asked[i].room,
				   VRING_DESC_F_WRITE, 1);
	}
	avail[1] = (uint16_t)chains_num;
	guest->ring.map = &guest->map;
	guest->ring.inflight = take_memory(16 + 16 * NUM);
	guest->ring.scratch = scratch;
	guest->ring.iov = (struct iovec *)(void *)iov;
	guest->ring.desc_addr = RING_GPA;
	guest->ring.avail_addr = RING_GPA + AVAIL_AT;
	guest->ring.used_addr = RING_GPA + USED_AT;
	guest->ring.num = NUM;
	guest->ring.is_event_idx = (int32_t)input_take(input, 1) & 1;
	guest->ring.call_fd = -1;
	if (eng_ring_start(&guest->ring, 0))
		abort();
}

static void guest_deinit(struct guest *guest)
{
	free(guest->ram);
	free(guest->ring.inflight);
}

/* Every chain came back with the reply that is expected, or is left. */
static void guest_check(const struct guest *guest, const struct eng_answers *answers,
			const struct asked *asked)
{
	const struct vring_used *used = (const struct vring_used *)(void *)(guest->ram + USED_AT);
	uint32_t plain = 0;
	uint32_t left = 0;

	for (uint32_t i = 0; i < chains_num; i++) {
		const uint8_t *reply = guest->ram + CHAINS_AT + i * (uint64_t)CHAIN_SIZE +
				       FUZZ_REQUEST_SIZE;

		if (asked[i].outcome == ENG_NOT_PLAIN) {
			if (answers->left[left++] != i)
				abort();
			continue;
		}
		if (used->ring[plain++].len != asked[i].reply_size ||
		    memcmp(reply, asked[i].reply, asked[i].reply_size) != 0)
			abort();
	}
	if (used->idx != plain || answers->left_num != left)
		abort();
}

/* A descriptor that ends the wait, so that no wait is for ever. */
static int alarm_fd(long after_ns)
{
	struct itimerspec soon = { .it_value.tv_nsec = after_ns };
	int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);

	MUST(fd >= 0 && !timerfd_settime(fd, 0, &soon, NULL));
	return fd;
}

/* None; an eventfd that was written to; or a pipe whose other end is closed, which breaks the ring. */
static int kick_fd(uint64_t choice)
{
	int ends[2];

	if (choice == 0)
		return -1;
	if (choice == 1)
		return eventfd(1, EFD_CLOEXEC);
	MUST(!pipe(ends));
	(void)close(ends[1]);
	return ends[0];
}

/* A driver on another processor: the last chains come while the ring is served. */
static void *publish_later(void *argument)
{
	struct guest *guest = argument;
	uint16_t *avail = (uint16_t *)(void *)(guest->ram + AVAIL_AT);

	for (uint32_t num = 2; num <= chains_num; num++) {
		(void)sched_yield();
		__atomic_store_n(&avail[1], (uint16_t)num, __ATOMIC_RELEASE);
		if (guest->kick_fd >= 0)
			(void)eventfd_write(guest->kick_fd, 1);
	}
	return NULL;
}

/* Serves until all are answered; each of them can be. */
static int serve_while_published(struct eng_answers *answers, struct guest *guest, struct eng_wait *wait)
{
	const struct vring_used *used = (const struct vring_used *)(void *)(guest->ram + USED_AT);
	uint16_t *avail = (uint16_t *)(void *)(guest->ram + AVAIL_AT);
	pthread_t thread;
	int status;

	avail[1] = 1;
	guest->kick_fd = wait->kick_fd;
	MUST(!pthread_create(&thread, NULL, publish_later, guest));
	do
		status = eng_serve_ring(answers, &guest->ring, wait);
	while (!status && used->idx != chains_num);
	MUST(!pthread_join(thread, NULL));
	return status;
}

static int are_plain(const struct asked *asked)
{
	for (uint32_t i = 0; i < chains_num; i++)
		if (asked[i].outcome == ENG_NOT_PLAIN)
			return 0;
	return 1;
}

static void serve_ring(struct eng_answers *answers, struct input *input, const struct asked *asked)
{
	static struct guest guest;
	struct epoll_event event = { .events = EPOLLIN };
	struct epoll_event kick = { .events = EPOLLIN | EPOLLET };
	uint64_t choice = input_take(input, 1);
	struct eng_wait wait = {
		.epoll_fd = epoll_create1(0), .poll_max_ns = choice & 4 ? 0 : 9000,
		.poll_ns = choice & 8 ? 5000 : 0,
	};
	int is_together = !(choice & 0x30) && (choice & 3) < 2 && are_plain(asked);
	int other = alarm_fd(is_together || choice & 0x40 ? 300000 : 20000);
	int status;

	event.data.fd = other;
	wait.kick_fd = kick.data.fd = kick_fd(choice & 3);
	guest_init(&guest, input, asked);
	if (epoll_ctl(wait.epoll_fd, EPOLL_CTL_ADD, other, &event) ||
	    (wait.kick_fd >= 0 && epoll_ctl(wait.epoll_fd, EPOLL_CTL_ADD, wait.kick_fd, &kick)))
		abort();
	if (is_together)
		status = serve_while_published(answers, &guest, &wait);
	else
		status = eng_serve_ring(answers, &guest.ring, &wait);
	if (status == -ENG_EKICK)
		MUST((choice & 3) > 1 && guest.ring.fault == ENG_EKICK && !answers->left_num);
	else
		MUST(status == (answers->left_num > 0));
	guest_check(&guest, answers, asked);
	guest_deinit(&guest);
	(void)close(other);
	if (wait.kick_fd >= 0)
		(void)close(wait.kick_fd);
	(void)close(wait.epoll_fd);
}

/* --- Through a device; it has room for every reply, so that some requests are answered only here --- */

static void serve_device(struct eng_answers *answers, const struct asked *asked)
{
	static uint8_t buffer[ENG_LISTING_SIZE + ENG_HEAD_MAX];
	uint8_t request[FUZZ_REQUEST_SIZE];
	int ends[2];
	int64_t status;
	ssize_t got;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, ends) ||
	    send(ends[1], asked->request, asked->size, 0) != (ssize_t)asked->size)
		abort();
	status = eng_serve_device(answers, ends[0], request, sizeof(request));
	got = recv(ends[1], buffer, sizeof(buffer), 0);
	if (status > 0 && (got >= 0 || status != (int64_t)asked->size ||
			   memcmp(request, asked->request, asked->size) != 0))
		abort();
	/* With more room, a listing or a read may be longer; the first bytes are the length. */
	if (status < 0 && asked->outcome == ENG_REPLY &&
	    (got < (ssize_t)asked->reply_size ||
	     memcmp(buffer + 4, asked->reply + 4, asked->reply_size - 4) != 0))
		abort();
	/* Then nobody is there to take the reply; and at last nothing can be read. */
	if (send(ends[1], asked->request, asked->size, 0) != (ssize_t)asked->size)
		abort();
	(void)close(ends[1]);
	status = eng_serve_device(answers, ends[0], request, sizeof(request));
	MUST(status == -EPIPE || status == -EAGAIN || status == 0 || status == (int64_t)asked->size);
	(void)close(ends[0]);
	MUST(eng_serve_device(answers, -1, request, sizeof(request)) == -EBADF);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct eng_answers answers;
	static struct asked asked[CHAINS_MAX];
	struct input input = { .data = data, .left = size };

	(void)signal(SIGPIPE, SIG_IGN);
	fuzz_begin(&answers, &input);
	while (input.left > 8) {
		uint64_t choice = input_take(&input, 1);

		forget(&answers);
		chains_num = choice & 0x30 ? 3 : CHAINS_MAX;
		if (choice % 16 == 0)
			fuzz_shrink();
		for (uint32_t i = 0; i < chains_num; i++)
			ask(&answers, &input, &asked[i]);
		forget(&answers);
		serve_ring(&answers, &input, asked);
		forget(&answers);
		serve_device(&answers, &asked[0]);
		for (uint32_t i = 0; i < chains_num; i++)
			free(asked[i].request);
	}
	fuzz_end(&answers);
	return 0;
}

const size_t fuzz_input_size = 512;

int fuzz_report(unsigned long count)
{
	printf("%lu inputs, %u replies, %u left\n", count, replies_num, not_plain_num);
	return replies_num && not_plain_num ? 0 : 1;
}
