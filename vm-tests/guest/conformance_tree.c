// Makes the tree that conformance.c checks.

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

#include "conformance.h"

const size_t sizes[NUM_SIZES] = { 0,	1,     511,   512,   513,   4095,
				  4096, 4097,  65535, 65536, 65537, 300000 };

unsigned char byte_at(size_t size, size_t offset)
{
	return (unsigned char)(offset * 31 + offset / 4096 * 7 + size);
}

const char *sized_name(size_t size)
{
	static char name[64];

	snprintf(name, sizeof(name), "sizes/%zu", size);
	return name;
}

const char *long_name(void)
{
	static char name[LONG_NAME_SIZE + 1];

	memset(name, 'n', LONG_NAME_SIZE);
	return name;
}

static void make_file(const char *name, size_t size, mode_t mode)
{
	int fd = open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
	unsigned char *bytes = malloc(size + 1);

	WANT(fd >= 0 && bytes);
	for (size_t i = 0; i < size; i++)
		bytes[i] = byte_at(size, i);
	WANT(write(fd, bytes, size) == (ssize_t)size);
	WANT(fchmod(fd, mode) == 0 && close(fd) == 0);
	free(bytes);
}

static void make_copy_of_this_program(const char *name)
{
	int from = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	int to = open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0755);
	struct stat stat;

	WANT(from >= 0 && to >= 0 && fstat(from, &stat) == 0);
	WANT(sendfile(to, from, NULL, (size_t)stat.st_size) == stat.st_size);
	WANT(fchmod(to, 0755) == 0 && close(to) == 0 && close(from) == 0);
}

static void make_directory(const char *name)
{
	WANT(mkdir(name, 0755) == 0);
}

void make_tree(void)
{
	char name[64];

	make_directory("sizes");
	for (size_t i = 0; i < NUM_SIZES; i++)
		make_file(sized_name(sizes[i]), sizes[i], 0644);
	make_file("run", 1, 0755);
	make_copy_of_this_program("program");
	WANT(symlink("sizes/513", "link") == 0 && symlink("sizes/513", "link2") == 0);
	WANT(symlink("sizes", "dirlink") == 0 && symlink("nowhere/at/all", "dangling") == 0);
	WANT(symlink("loop", "loop") == 0);
	make_directory("many");
	for (int i = 0; i < MANY; i++) {
		snprintf(name, sizeof(name), "many/entry-%04d", i);
		make_file(name, 1, 0644);
	}
	for (const char **top = (const char *[]){ "here", "there", NULL }; *top; top++) {
		make_directory(*top);
		WANT(chdir(*top) == 0);
		make_directory("same");
		make_directory("same/inner");
		make_file("same/inner/file", 100, 0644);
		WANT(chdir("..") == 0);
	}
	make_directory("hollow");
	make_directory("names");
	make_file("names/with space\n\\ and \xff\xfe", 2, 0644);
	WANT(chdir("names") == 0);
	make_file(long_name(), 3, 0644);
	WANT(chdir("..") == 0);
	make_directory("deep");
	WANT(chdir("deep") == 0);
	for (int i = 0; i < DEPTH; i++) {
		make_directory("d");
		WANT(chdir("d") == 0);
	}
	make_file("bottom", 7, 0644);
}
