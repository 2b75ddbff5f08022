/*
 * Loads, stores and fences for memory that a guest or a front-end uses meanwhile: all memory orders
 * are here, but for that of the dirty log.
 */
#ifndef BARRIER_H
#define BARRIER_H
#include <linux/virtio_ring.h>
#include <stdint.h>

/* A ring word is read exactly once into a local; what was written before it is visible after it. */
static inline uint16_t eng_load_acquire(const uint16_t *word)
{
	return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static inline uint16_t eng_load_relaxed(const uint16_t *word)
{
	return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static inline uint8_t eng_load_flag_relaxed(const uint8_t *flag)
{
	return __atomic_load_n(flag, __ATOMIC_RELAXED);
}

static inline uint64_t eng_load_counter_relaxed(const uint64_t *counter)
{
	return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

/* What was stored before is visible to whoever sees this store, or comes after our SIGKILL. */
static inline void eng_store_release(uint16_t *word, uint16_t value)
{
	__atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static inline void eng_store_flag_release(uint8_t *flag, uint8_t value)
{
	__atomic_store_n(flag, value, __ATOMIC_RELEASE);
}

/* Orders our store before our next load: for "publish, then look whether they sleep". */
static inline void eng_fence(void)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* In a loop that waits for another processor: leaves it, and a sibling of ours, more of the machine. */
static inline void eng_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

/*
 * Follows the copy of a descriptor to a local: the compiler must believe that the copy was
 * changed, so it cannot go back to guest memory for a field.
 */
static inline void eng_desc_settle(struct vring_desc *copy)
{
	__asm__ volatile("" : "+m"(*copy));
}

#endif
