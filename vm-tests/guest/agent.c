// The first process of a test guest: runs shell scripts that the host sends over one byte channel.
//
// Usage: agent DEVICE        (a virtio-serial port, a serial line or a UML console)
//
// Both directions carry frames: u32 type | u32 job | u32 size | size bytes, little-endian.
//   host to guest   START script    INPUT bytes (size 0 closes the job's stdin)    SIGNAL u32 number
//   guest to host   HELLO           OUTPUT bytes (stdout and stderr as written)    EXIT u32 status
// A job is `/bin/sh -c script` in a session of its own. It ends when its shell ends, whatever the
// shell has left in the background. The status is the shell's own, or 128 + signal.

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum { MAX_JOBS = 64, MAX_PAYLOAD = 96 * 1024, LAST_READS = 64 };
enum frame_type { START = 1, INPUT = 2, SIGNAL = 3, HELLO = 16, OUTPUT = 17, EXIT = 18 };

struct frame_header {
	uint32_t type, job, size;
};

struct job {
	bool is_used;
	uint32_t id;
	pid_t pid;
	int input_fd;  // -1 once closed
	int output_fd; // -1 once at its end
};

static struct job jobs[MAX_JOBS];
static int channel_fd;

static void die(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fputs("agent: ", stderr);
	vfprintf(stderr, format, arguments);
	fprintf(stderr, ": %s\n", strerror(errno));
	va_end(arguments);
	exit(1); // as process 1: the kernel panics and, with panic=-1, the guest ends
}

static void write_all(int fd, const void *data, size_t size)
{
	const char *next = data;

	while (size > 0) {
		ssize_t done = write(fd, next, size);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			die("write to fd %d", fd);
		next += done;
		size -= (size_t)done;
	}
}

static void read_all(void *data, size_t size)
{
	char *next = data;

	while (size > 0) {
		ssize_t done = read(channel_fd, next, size);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			die("the channel ended");
		next += done;
		size -= (size_t)done;
	}
}

static void send_frame(enum frame_type type, uint32_t job, const void *data, uint32_t size)
{
	static char frame[sizeof(struct frame_header) + MAX_PAYLOAD];
	struct frame_header header = { htole32(type), htole32(job), htole32(size) };

	memcpy(frame, &header, sizeof(header));
	if (size > 0)
		memcpy(frame + sizeof(header), data, size);
	write_all(channel_fd, frame, sizeof(header) + size);
}

static void send_exit(uint32_t job, int wait_status)
{
	uint32_t status = htole32((uint32_t)(WIFEXITED(wait_status) ? WEXITSTATUS(wait_status)
								   : 128 + WTERMSIG(wait_status)));

	send_frame(EXIT, job, &status, sizeof(status));
}

static struct job *find_job(uint32_t id)
{
	for (struct job *job = jobs; job < jobs + MAX_JOBS; job++)
		if (job->is_used && job->id == id)
			return job;
	return NULL;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void run_shell(const char *script, int input_fd, int output_fd)
{
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	setsid();
	if (dup2(input_fd, 0) < 0 || dup2(output_fd, 1) < 0 || dup2(output_fd, 2) < 0)
		_exit(126);
	execl("/bin/sh", "sh", "-c", script, (char *)NULL);
	_exit(127);
}

static void start_job(uint32_t id, const char *script)
{
	struct job *job = jobs;
	int input[2], output[2];

	while (job < jobs + MAX_JOBS && job->is_used)
		job++;
	if (job == jobs + MAX_JOBS) {
		send_exit(id, 125 << 8);
		return;
	}
	if (pipe2(input, O_CLOEXEC) || pipe2(output, O_CLOEXEC))
		die("pipe");
	*job = (struct job){ true, id, fork(), input[1], output[0] };
	if (job->pid < 0)
		die("fork");
	if (job->pid == 0)
		run_shell(script, input[0], output[1]);
	close(input[0]);
	close(output[1]);
	fcntl(job->output_fd, F_SETFL, O_NONBLOCK);
}

static void handle_frame(void)
{
	static char payload[MAX_PAYLOAD + 1];
	struct frame_header header;
	struct job *job;
	uint32_t number, size;

	read_all(&header, sizeof(header));
	size = le32toh(header.size);
	if (size > MAX_PAYLOAD)
		die("a frame of %u bytes", size);
	read_all(payload, size);
	payload[size] = '\0';
	job = find_job(le32toh(header.job));
	switch (le32toh(header.type)) {
	case START:
		start_job(le32toh(header.job), payload);
		break;
	case INPUT:
		if (job && size == 0)
			close_fd(&job->input_fd);
		else if (job && job->input_fd >= 0 && write(job->input_fd, payload, size) < 0)
			close_fd(&job->input_fd); // the job has closed its end
		break;
	case SIGNAL:
		memcpy(&number, payload, sizeof(number));
		if (job)
			kill(-job->pid, (int)le32toh(number));
		break;
	default:
		die("frame type %u", le32toh(header.type));
	}
}

// Sends what the job has written, in at most `reads` pieces; at the end of the pipe closes it.
static void forward_output(struct job *job, int reads)
{
	static char buffer[MAX_PAYLOAD];

	while (job->output_fd >= 0 && reads-- > 0) {
		ssize_t size = read(job->output_fd, buffer, sizeof(buffer));

		if (size < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		if (size <= 0)
			close_fd(&job->output_fd);
		else
			send_frame(OUTPUT, job->id, buffer, (uint32_t)size);
	}
}

static void reap(void)
{
	int wait_status;
	pid_t pid;

	while ((pid = waitpid(-1, &wait_status, WNOHANG)) > 0) {
		for (struct job *job = jobs; job < jobs + MAX_JOBS; job++) {
			if (!job->is_used || job->pid != pid)
				continue;
			// bounded: what it left in the background may go on writing for ever
			forward_output(job, LAST_READS);
			send_exit(job->id, wait_status);
			close_fd(&job->input_fd);
			close_fd(&job->output_fd);
			job->is_used = false;
		}
	}
}

static void on_child(int number)
{
	(void)number; // its only purpose is to interrupt ppoll
}

static void serve(const sigset_t *while_waiting)
{
	struct pollfd polled[1 + MAX_JOBS];
	struct job *owners[1 + MAX_JOBS];
	nfds_t count = 1;
	int ready;

	polled[0] = (struct pollfd){ .fd = channel_fd, .events = POLLIN };
	for (struct job *job = jobs; job < jobs + MAX_JOBS; job++) {
		if (!job->is_used || job->output_fd < 0)
			continue;
		owners[count] = job;
		polled[count++] = (struct pollfd){ .fd = job->output_fd, .events = POLLIN };
	}
	ready = ppoll(polled, count, NULL, while_waiting);
	if (ready < 0 && errno != EINTR)
		die("ppoll");
	for (nfds_t i = 1; ready > 0 && i < count; i++)
		if (polled[i].revents)
			forward_output(owners[i], 1);
	reap();
	if (ready > 0 && polled[0].revents)
		handle_frame();
}

// Opens the device as soon as it exists: a virtio-serial port appears some time after its driver.
static int open_when_created(const char *device)
{
	char events[4096];
	int watch_fd = inotify_init1(IN_CLOEXEC);
	int fd = -1;

	if (watch_fd < 0 || inotify_add_watch(watch_fd, "/dev", IN_CREATE) < 0)
		die("inotify");
	while ((fd = open(device, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0) {
		if (errno != ENOENT)
			die("%s", device);
		if (read(watch_fd, events, sizeof(events)) < 0)
			die("inotify");
	}
	close(watch_fd);
	return fd;
}

static void open_channel(const char *device)
{
	struct termios settings;

	channel_fd = open_when_created(device);
	if (!isatty(channel_fd))
		return;
	if (tcgetattr(channel_fd, &settings))
		die("tcgetattr %s", device);
	cfmakeraw(&settings);
	cfsetspeed(&settings, B115200);
	if (tcsetattr(channel_fd, TCSANOW, &settings))
		die("tcsetattr %s", device);
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = on_child };
	sigset_t blocked, while_waiting;

	if (argc != 2) {
		fputs("usage: agent DEVICE\n", stderr);
		return 2;
	}
	signal(SIGPIPE, SIG_IGN);
	sigaction(SIGCHLD, &action, NULL);
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGCHLD);
	sigprocmask(SIG_BLOCK, &blocked, &while_waiting);
	sigdelset(&while_waiting, SIGCHLD);
	open_channel(argv[1]);
	send_frame(HELLO, 0, NULL, 0);
	for (;;)
		serve(&while_waiting);
}
