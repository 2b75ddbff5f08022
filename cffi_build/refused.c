/*
 * Which system call a filter refused. The filter sends SIGSYS (SECCOMP_RET_TRAP); the handler below
 * notes the number in memory that the parent reads, and the process dies of the same signal.
 *
 * Whoever has taken a process over can make it fail to die here, for example by unmapping this code.
 * The call is refused all the same. So nothing depends on this but a line in the log. For the same
 * reason no function of a library is called, whose address could have been changed.
 */
#include "refused.h"

#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { FROM_SECCOMP = 1 };	/* asm-generic/siginfo.h: SYS_SECCOMP, which the C library lacks */

static struct eng_refusals *refusals;

static long call(long number, long first, long second, long third)
{
#if defined(__x86_64__)
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(first), "S"(second), "d"(third)
			 : "rcx", "r11", "memory");
	return result;
#elif defined(__aarch64__)
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = first;
	register long x1 __asm__("x1") = second;
	register long x2 __asm__("x2") = third;

	__asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
	return x0;
#else
	return syscall(number, first, second, third);
#endif
}

static void note_and_die(int signum, siginfo_t *info, void *context)
{
	long pid = call(SYS_getpid, 0, 0, 0);

	(void)context;
	if (info->si_code == FROM_SECCOMP) {
		uint32_t at = __atomic_fetch_add(&refusals->next, 1, __ATOMIC_RELAXED);
		uint64_t entry = (uint64_t)(uint32_t)info->si_syscall << 32 | (uint32_t)pid;

		__atomic_store_n(&refusals->entry[at % ENG_REFUSALS], entry, __ATOMIC_RELEASE);
	}
	/* SA_RESETHAND and SA_NODEFER: the signal is not blocked, and kills now. */
	call(SYS_tgkill, pid, call(SYS_gettid, 0, 0, 0), signum);
	for (;;)
		call(SYS_exit_group, 128 + signum, 0, 0);
}

int eng_note_refusals(struct eng_refusals *shared)
{
	struct sigaction action = { .sa_sigaction = note_and_die,
				    .sa_flags = (int)(SA_SIGINFO | SA_RESETHAND | SA_NODEFER) };

	refusals = shared;
	return sigaction(SIGSYS, &action, NULL);
}
