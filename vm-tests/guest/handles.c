// Keeps a handle of every node of a tree and opens each again, as an NFS server does.
//
//   handles DIR    writes "nodes N wrong N"; a node whose handle does not open, or opens another
//                  node, is named with the errno
//
// Between keeping and opening the kernel drops what it caches, so each handle has to be decoded by
// the file system (name_to_handle_at(2), linux Documentation/filesystems/nfs/exporting.rst).

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_NODES = 1 << 16, MAX_OPEN_DIRECTORIES = 16 };

struct node {
	char *path;
	struct file_handle *handle;
	struct stat stat;
	char content[64]; // what a file begins with, or where a link points
	ssize_t content_size;
};

static struct node nodes[MAX_NODES];
static size_t num_nodes;

static void fail(const char *what, const char *path)
{
	fprintf(stderr, "handles: %s %s: %s\n", what, path, strerror(errno));
	exit(1);
}

// Returns how many bytes `fd`, which is opened with O_PATH if it is a link, begins with; -1 on error.
static ssize_t content_of(int fd, mode_t mode, char *into, size_t size)
{
	if (S_ISLNK(mode))
		return readlinkat(fd, "", into, size);
	return S_ISREG(mode) ? pread(fd, into, size, 0) : 0;
}

static int flags_for(mode_t mode)
{
	return (S_ISLNK(mode) ? O_PATH | O_NOFOLLOW : O_RDONLY) | O_CLOEXEC;
}

static int keep(const char *path, const struct stat *st, int type, struct FTW *where)
{
	(void)type;
	(void)where;
	if (num_nodes == MAX_NODES) {
		errno = E2BIG;
		fail("too many nodes at", path);
	}
	struct node *node = &nodes[num_nodes++];
	int mount_id, fd = open(path, flags_for(st->st_mode));

	node->path = strdup(path);
	node->handle = malloc(sizeof(*node->handle) + MAX_HANDLE_SZ);
	if (fd < 0 || !node->path || !node->handle)
		fail("open", path);
	node->stat = *st;
	node->content_size = content_of(fd, st->st_mode, node->content, sizeof(node->content));
	node->handle->handle_bytes = MAX_HANDLE_SZ;
	if (node->content_size < 0 || name_to_handle_at(AT_FDCWD, path, node->handle, &mount_id, 0))
		fail("take a handle of", path);
	close(fd);
	return 0;
}

static int open_again(int mount_fd, const struct node *node)
{
	char content[sizeof(node->content)];
	struct stat st;
	int fd = open_by_handle_at(mount_fd, node->handle, flags_for(node->stat.st_mode));

	if (fd < 0)
		return errno;
	ssize_t size = content_of(fd, node->stat.st_mode, content, sizeof(content));
	int error = fstat(fd, &st) ? errno : 0;
	close(fd);
	if (error)
		return error;
	if (st.st_ino != node->stat.st_ino || st.st_mode != node->stat.st_mode ||
	    st.st_size != node->stat.st_size || size != node->content_size ||
	    memcmp(content, node->content, (size_t)size) != 0)
		return EBADMSG;
	return 0;
}

int main(int argc, char **argv)
{
	size_t num_wrong = 0;

	if (argc != 2) {
		fprintf(stderr, "usage: handles DIR\n");
		return 2;
	}
	if (nftw(argv[1], keep, MAX_OPEN_DIRECTORIES, FTW_PHYS | FTW_MOUNT))
		fail("walk", argv[1]);
	int mount_fd = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	int caches = open("/proc/sys/vm/drop_caches", O_WRONLY | O_CLOEXEC);
	if (mount_fd < 0 || caches < 0 || write(caches, "2\n", 2) != 2)
		fail("drop the caches of", argv[1]);
	for (size_t i = 0; i < num_nodes; i++) {
		int error = open_again(mount_fd, &nodes[i]);

		if (error) {
			num_wrong++;
			printf("%s: errno %d\n", nodes[i].path, error);
		}
	}
	printf("nodes %zu wrong %zu\n", num_nodes, num_wrong);
	return num_wrong != 0;
}
