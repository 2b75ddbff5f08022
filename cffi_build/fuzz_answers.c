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

#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
	ROOM_MAX = 5000,
	NUM = 32,			/* entries of the ring */
	CHAINS = 3,
	RING_GPA = 0x10000,
	AVAIL_AT = 16 * NUM,
	USED_AT = AVAIL_AT + 128,
	CHAINS_AT = 2048,
	CHAIN_SIZE = FUZZ_REQUEST_SIZE + ROOM_MAX,
	REGION_SIZE = CHAINS_AT + CHAINS * CHAIN_SIZE,
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

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

static void reply_check(const struct eng_reply *reply, struct asked *asked)
{
	struct fuse_out_header header;

	memcpy(&header, reply->head, sizeof(header));
	if (reply->head_size > sizeof(reply->head) || header.error || header.unique != 1 ||
	    header.len != reply->head_size + reply->body_size || header.len > asked->room || reply->fd != -1)
		abort();
	memcpy(asked->reply, reply->head, reply->head_size);
	if (reply->body_size)
		memcpy(asked->reply + reply->head_size, reply->body, reply->body_size);
	asked->reply_size = header.len;
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
	if (ret->outcome == ENG_REPLY) {
		reply_check(&reply, ret);
		replies_num++;
	} else if (ret->outcome == ENG_NOT_PLAIN) {
		not_plain_num++;
	}
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
	for (uint32_t i = 0; i < CHAINS; i++) {
		uint64_t at = CHAINS_AT + i * (uint64_t)CHAIN_SIZE;

		avail[2 + i] = (uint16_t)guest->descs;
		memcpy(guest->ram + at, asked[i].request, asked[i].size);
		add_buffer(guest, input, at, asked[i].size, 0, !asked[i].room);
		if (asked[i].room)
			add_buffer(guest, input, at + FUZZ_REQUEST_SIZE, asked[i].room,
				   VRING_DESC_F_WRITE, 1);
	}
	avail[1] = CHAINS;
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

	for (uint32_t i = 0; i < CHAINS; i++) {
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

static void serve_ring(struct eng_answers *answers, struct input *input, const struct asked *asked)
{
	static struct guest guest;
	struct epoll_event event = { .events = EPOLLIN };
	struct eng_wait wait = { .epoll_fd = epoll_create1(0), .poll_max_ns = 1 };
	int other = eventfd(1, 0);	/* so that no wait is for ever */
	int status;

	event.data.fd = other;
	wait.kick_fd = -1;
	wait.poll_ns = input_take(input, 1) & 1;
	guest_init(&guest, input, asked);
	if (other < 0 || epoll_ctl(wait.epoll_fd, EPOLL_CTL_ADD, other, &event))
		abort();
	status = eng_serve_ring(answers, &guest.ring, &wait);
	if (status != (answers->left_num > 0))
		abort();
	guest_check(&guest, answers, asked);
	guest_deinit(&guest);
	(void)close(other);
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
	(void)close(ends[0]);
	(void)close(ends[1]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct eng_answers answers;
	static struct asked asked[CHAINS];
	struct input input = { .data = data, .left = size };

	fuzz_begin(&answers, &input);
	while (input.left > 8) {
		forget(&answers);
		for (uint32_t i = 0; i < CHAINS; i++)
			ask(&answers, &input, &asked[i]);
		forget(&answers);
		serve_ring(&answers, &input, asked);
		forget(&answers);
		serve_device(&answers, &asked[0]);
		for (uint32_t i = 0; i < CHAINS; i++)
			free(asked[i].request);
	}
	fuzz_end(&answers);
	return 0;
}

#ifdef FUZZ_STANDALONE
/* fuzz_answers COUNT [SEED]: COUNT inputs from a fixed generator; prints how many were answered. */
int main(int argc, char **argv)
{
	unsigned long count = argc > 1 ? strtoul(argv[1], NULL, 10) : 1000;
	uint64_t state = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
	uint8_t data[512];

	for (unsigned long i = 0; i < count; i++) {
		for (size_t at = 0; at < sizeof(data); at++) {
			state = state * 6364136223846793005u + 1442695040888963407u;
			data[at] = (uint8_t)(state >> 33);
		}
		(void)LLVMFuzzerTestOneInput(data, sizeof(data));
	}
	printf("%lu inputs, %u replies, %u left\n", count, replies_num, not_plain_num);
	return replies_num && not_plain_num ? 0 : 1;
}
#endif
