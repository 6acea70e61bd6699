/* The thread pool: see pool.h. Workers are created on first use and live until the process ends. */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#define MAX_WORKERS 255
/* Turns of waiting before sleep, shorter than a time slice. A caller: 20 to 100 us. A worker: 100 to 400 us, longer than
 * Python takes between the programs of a step, for to be woken took 20 us of each program. */
#define SPIN 2000
#define IDLE_SPIN 10000

/* A job belongs to a ticket. Who takes an index of it does so by one exchange on `next`, which holds the ticket too: a
 * worker that comes late, having read what a job was, cannot take part in another. So the caller waits for the work, not
 * for the workers: one that has lost its core to somebody else costs nothing but the index it is at. */
static struct {
  pthread_mutex_t callers; /* one job at a time */
  int workers;
  _Atomic(nyb_task) task;
  _Atomic(void *) context;
  _Atomic uint32_t count;
  _Atomic int wanted;      /* workers that may take part in this job */
  _Atomic int asleep;      /* workers that may wait for a ticket: nobody is woken where nobody sleeps */
  _Atomic int waiting;     /* whether the caller may wait for what is not done */
  uint32_t born[MAX_WORKERS]; /* the ticket when a worker was made */
  /* Each on a line of its own: who spins on one is not disturbed by who writes another. */
  _Alignas(64) _Atomic uint64_t next;   /* the ticket, and the next index to take */
  _Alignas(64) _Atomic uint32_t done;   /* indices of this job that are finished */
  _Alignas(64) _Atomic uint32_t ticket; /* changes when a job starts: what sleeping workers wait for */
} pool = {.callers = PTHREAD_MUTEX_INITIALIZER};

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

#ifdef __linux__
static void wait_while(_Atomic uint32_t *word, uint32_t value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}
static void wake_all(_Atomic uint32_t *word) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0);
}
#else
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t sleep_signal = PTHREAD_COND_INITIALIZER;
static void wait_while(_Atomic uint32_t *word, uint32_t value) {
  pthread_mutex_lock(&sleep_lock);
  while (atomic_load(word) == value) pthread_cond_wait(&sleep_signal, &sleep_lock);
  pthread_mutex_unlock(&sleep_lock);
}
static void wake_all(_Atomic uint32_t *word) {
  (void)word;
  pthread_mutex_lock(&sleep_lock);
  pthread_cond_broadcast(&sleep_signal);
  pthread_mutex_unlock(&sleep_lock);
}
#endif

/* Work on the job of a ticket, as its worker `id` (-1: its caller), until nothing of it is left to take. */
static void take(uint32_t ticket, int id) {
  nyb_task task = atomic_load_explicit(&pool.task, memory_order_acquire);
  void *context = atomic_load_explicit(&pool.context, memory_order_acquire);
  const uint32_t count = atomic_load_explicit(&pool.count, memory_order_acquire);
  if (id >= atomic_load_explicit(&pool.wanted, memory_order_acquire)) return;
  uint64_t at = atomic_load(&pool.next);
  while (at >> 32 == ticket && (uint32_t)at < count) {
    if (!atomic_compare_exchange_weak(&pool.next, &at, at + 1)) continue;
    task(context, (int64_t)(uint32_t)at);
    if (atomic_fetch_add(&pool.done, 1) + 1 == count && id >= 0 && atomic_load(&pool.waiting)) wake_all(&pool.done);
    at = atomic_load(&pool.next);
  }
}

static void *worker(void *argument) {
  int id = (int)(intptr_t)argument;
  uint32_t seen = pool.born[id];
  for (;;) {
    for (int spin = 0; atomic_load(&pool.ticket) == seen; spin++) {
      if (spin < IDLE_SPIN) {
        relax();
        continue;
      }
      atomic_fetch_add(&pool.asleep, 1); /* before the word is looked at again, by the system */
      wait_while(&pool.ticket, seen);
      atomic_fetch_sub(&pool.asleep, 1);
    }
    seen = atomic_load(&pool.ticket);
    take(seen, id);
  }
  return NULL;
}

/* Threads do not survive fork, and a lock that another thread held stays locked: a child starts afresh. */
static void after_fork(void) {
  pool.callers = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
  pool.workers = 0;
  atomic_store(&pool.asleep, 0);
  atomic_store(&pool.waiting, 0);
#ifndef __linux__
  sleep_lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
#endif
}
static void watch_forks(void) { pthread_atfork(NULL, NULL, after_fork); }

static void grow(int wanted) {
  while (pool.workers < wanted && pool.workers < MAX_WORKERS) {
    pthread_t thread;
    pool.born[pool.workers] = atomic_load(&pool.ticket);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    int failed = pthread_create(&thread, &attributes, worker, (void *)(intptr_t)pool.workers);
    pthread_attr_destroy(&attributes);
    if (failed) return; /* fewer threads, the same result */
    pool.workers++;
  }
}

void nyb_parallel(nyb_task task, void *context, int64_t count, int threads) {
  if (threads <= 1 || count <= 1 || count > UINT32_MAX) {
    for (int64_t i = 0; i < count; i++) task(context, i);
    return;
  }
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, watch_forks);
  pthread_mutex_lock(&pool.callers);
  grow(threads - 1);
  const uint32_t ticket = atomic_load(&pool.ticket) + 1;
  atomic_store(&pool.next, (uint64_t)ticket << 32 | UINT32_MAX); /* nothing to take while the job is written */
  atomic_store_explicit(&pool.task, task, memory_order_release);
  atomic_store_explicit(&pool.context, context, memory_order_release);
  atomic_store_explicit(&pool.count, (uint32_t)count, memory_order_release);
  atomic_store_explicit(&pool.wanted, threads - 1, memory_order_release);
  atomic_store(&pool.done, 0);
  atomic_store(&pool.next, (uint64_t)ticket << 32);
  atomic_store(&pool.ticket, ticket);
  if (atomic_load(&pool.asleep)) wake_all(&pool.ticket);
  take(ticket, -1);
  /* A worker may have lost its core in the midst of an index: sleep, so that it can have this one. */
  uint32_t done;
  for (int spin = 0; (done = atomic_load(&pool.done)) < (uint32_t)count; spin++) {
    if (spin < SPIN) {
      relax();
      continue;
    }
    atomic_store(&pool.waiting, 1);
    wait_while(&pool.done, done);
    atomic_store(&pool.waiting, 0);
  }
  pthread_mutex_unlock(&pool.callers);
}
