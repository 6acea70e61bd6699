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
#define SPIN 2000 /* about 20 us: longer than the gap between the tiles of one tensor, shorter than a time slice */

static struct {
  pthread_mutex_t callers; /* one job at a time */
  int workers;
  nyb_task task;
  void *context;
  int64_t count;
  int wanted;              /* workers that take part in this job */
  _Atomic int64_t next;    /* the next index to take */
  _Atomic uint32_t running; /* workers that have not finished this job */
  _Atomic uint32_t ticket; /* changes when a job starts: what sleeping workers wait for */
  uint32_t born[MAX_WORKERS]; /* the ticket when a worker was made: that job was not meant for it */
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

static void take(void) {
  for (;;) {
    int64_t i = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed);
    if (i >= pool.count) return;
    pool.task(pool.context, i);
  }
}

static void *worker(void *argument) {
  int id = (int)(intptr_t)argument;
  uint32_t seen = pool.born[id];
  for (;;) {
    for (int spin = 0; atomic_load(&pool.ticket) == seen; spin++) {
      if (spin < SPIN) relax();
      else wait_while(&pool.ticket, seen);
    }
    seen = atomic_load(&pool.ticket);
    if (id < pool.wanted) take();
    if (atomic_fetch_sub(&pool.running, 1) == 1) wake_all(&pool.running);
  }
  return NULL;
}

/* Threads do not survive fork, and a lock that another thread held stays locked: a child starts afresh. */
static void after_fork(void) {
  pool.callers = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
  pool.workers = 0;
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
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; i++) task(context, i);
    return;
  }
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, watch_forks);
  pthread_mutex_lock(&pool.callers);
  grow(threads - 1);
  pool.task = task;
  pool.context = context;
  pool.count = count;
  pool.wanted = threads - 1;
  atomic_store(&pool.next, 0);
  atomic_store(&pool.running, pool.workers);
  atomic_fetch_add(&pool.ticket, 1);
  wake_all(&pool.ticket);
  take();
  /* A worker may have lost its core to somebody else, the thread that writes files for one: sleep, so that it can have
   * this one. Spinning here cost half as much again as the work. */
  uint32_t left;
  for (int spin = 0; (left = atomic_load(&pool.running)) > 0; spin++) {
    if (spin < SPIN) relax();
    else wait_while(&pool.running, left);
  }
  pthread_mutex_unlock(&pool.callers);
}
