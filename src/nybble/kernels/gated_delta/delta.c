/* The gated delta rule, token by token and in chunks, and the causal convolution before it: memory, threads,
 * instruction sets and entry points. The arithmetic is in delta.h, the definition beside it is reference.py.
 *
 * One task is one value head of one sequence, so nothing in it depends on other sequences or on the threads. A state is
 * read from one slot and written to others, which nobody else reads. */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../isa.h"
#include "../pool.h"
#include "../program.h"

#define CHUNK 64          /* tokens; chunks lie at absolute positions, multiples of this */
#define L2_EPS 1e-6f      /* under the root of the norm of q and k */
#define MOST_TAPS 16      /* of a convolution; Python checks */
#define CONV_CHANNELS 512 /* per task: a row of them, for every tap, stays in the first cache */
#define DECAY_ROWS 64     /* per task */
#define ALONE 131072      /* multiply-adds below which the calling thread is done before a worker wakes */
#define ALONE_DECAY 4096  /* the same for elements with three exponentials and a logarithm */

typedef struct {
  const float *mixed, *g, *beta;
  float *state, *out;
  const int32_t *starts, *lengths, *slots, *writes, *recurrent;
  int64_t key_heads, value_heads, key_dim, value_dim;
  float scale; /* of q */
  int isa, buffers;
  int64_t live;        /* sequences with new tokens */
  int32_t *order;      /* [live]: those in chunks first, so that the long tasks are not the last */
  int64_t buffer_floats;
  float *scratch;      /* [buffers, buffer_floats]: one for each thread that works at a time */
  _Atomic int *taken;  /* [buffers] */
} delta_job;

typedef struct {
  const float *x, *weight;
  float *state, *y;
  const int32_t *starts, *lengths, *slots, *writes;
  int64_t x_row, sequences, channels, taps;
  int isa;
} conv_job;

typedef struct {
  const float *a, *b, *a_log, *dt_bias;
  float *g, *beta;
  int64_t a_row, b_row, tokens, heads;
  int isa;
} decay_job;

static const float *query_of(const delta_job *j, int64_t token, int64_t head) {
  int64_t channels = 2 * j->key_heads * j->key_dim + j->value_heads * j->value_dim;
  return j->mixed + token * channels + head / (j->value_heads / j->key_heads) * j->key_dim;
}
static const float *key_of(const delta_job *j, int64_t token, int64_t head) {
  return query_of(j, token, head) + j->key_heads * j->key_dim;
}
static const float *value_of(const delta_job *j, int64_t token, int64_t head) {
  return query_of(j, token, 0) + 2 * j->key_heads * j->key_dim + head * j->value_dim;
}

/* What a chunk needs, about 160 KiB for heads of 128: it stays in the second cache. */
typedef struct {
  float *q, *k, *kt;      /* [CHUNK, Dk] twice, [Dk, CHUNK] */
  float *e;               /* [CHUNK, Dv] */
  float *a, *p;           /* [CHUNK, CHUNK]: minus A, and the scores */
  float *high, *low;      /* [CHUNK]: the running sum of g */
  float *beta;            /* [CHUNK] */
} scratch_parts;

static scratch_parts parts_of(const delta_job *j, float *at) {
  scratch_parts s;
  s.q = at;
  s.k = s.q + CHUNK * j->key_dim;
  s.kt = s.k + CHUNK * j->key_dim;
  s.e = s.kt + CHUNK * j->key_dim;
  s.a = s.e + CHUNK * j->value_dim;
  s.p = s.a + CHUNK * CHUNK;
  s.high = s.p + CHUNK * CHUNK;
  s.low = s.high + CHUNK;
  s.beta = s.low + CHUNK;
  return s;
}
static int64_t chunk_floats(const delta_job *j) {
  return CHUNK * (3 * j->key_dim + j->value_dim) + 2 * CHUNK * CHUNK + 3 * CHUNK;
}

#define NYB_BODY "gated_delta/delta.h"
#include "../every_isa.h"

/* At most `buffers` threads work at a time, so one is always free. */
static int take_buffer(delta_job *j) {
  for (int i = 0;; i = (i + 1) % j->buffers) {
    int free = 0;
    if (atomic_compare_exchange_strong_explicit(&j->taken[i], &free, 1, memory_order_acquire, memory_order_relaxed))
      return i;
  }
}

static float *state_of(const delta_job *j, int64_t slot, int64_t head) {
  return j->state + (slot * j->value_heads + head) * j->key_dim * j->value_dim;
}

/* Tokens [from, to) of sequence b, whose states pass through no slot but the last one's: from `old` to `state`. */
static void delta_segment(const delta_job *j, float *scratch, const float *old, float *state, int64_t b, int64_t head,
                          int64_t from, int64_t to) {
  size_t bytes = (size_t)(j->key_dim * j->value_dim) * sizeof(float);
  if (!old) old = memset(state, 0, bytes);
  if (j->recurrent[b]) {
    CALL(j->isa, recurrent, j, scratch, old, state, head, from, to);
    return;
  }
  if (old != state) memcpy(state, old, bytes);
  for (int64_t at = from, end; at < to; at = end) {
    end = at + CHUNK - (j->lengths[b] + at - j->starts[b]) % CHUNK;
    if (end > to) end = to;
    CALL(j->isa, chunk, j, scratch, state, head, at, end);
  }
}

static void delta_task(void *context, int64_t index) {
  delta_job *j = context;
  int64_t b = j->order[index / j->value_heads], head = index % j->value_heads;
  int buffer = take_buffer(j);
  const float *old = j->lengths[b] ? state_of(j, j->slots[b], head) : NULL;
  for (int64_t at = j->starts[b], to = j->starts[b + 1]; at < to;) {
    int64_t last = at;
    while (last < to - 1 && j->writes[last] < 0) last++;
    float *state = state_of(j, j->writes[last], head);
    delta_segment(j, j->scratch + buffer * j->buffer_floats, old, state, b, head, at, last + 1);
    old = state;
    at = last + 1;
  }
  atomic_store_explicit(&j->taken[buffer], 0, memory_order_release);
}

/* Memory that a calling thread keeps between calls. */
static pthread_key_t kept_key;
static pthread_once_t kept_once = PTHREAD_ONCE_INIT;
static void make_kept_key(void) { pthread_key_create(&kept_key, free); }
static void *kept(size_t bytes) {
  pthread_once(&kept_once, make_kept_key);
  size_t *held = pthread_getspecific(kept_key); /* its first cache line holds its size */
  if (!held || *held < bytes) {
    free(held);
    pthread_setspecific(kept_key, NULL);
    bytes = (bytes + bytes / 4 + 63) / 64 * 64;
    held = aligned_alloc(64, bytes + 64);
    if (!held) return NULL;
    *held = bytes;
    pthread_setspecific(kept_key, held);
  }
  return (char *)held + 64;
}

/* Scratch for so many threads, with no buffer taken; 1 if there is no memory. */
static int find_scratch(delta_job *j, int threads, int has_chunks, int64_t sequences) {
  j->buffers = threads;
  j->buffer_floats = (has_chunks ? chunk_floats(j) : 2 * j->key_dim) + 31; /* whole cache lines, and one apart */
  j->buffer_floats -= j->buffer_floats % 16;
  size_t floats = (size_t)(j->buffer_floats * threads) * sizeof(float), flags = (size_t)threads * sizeof *j->taken;
  j->scratch = kept(floats + flags + (size_t)sequences * sizeof *j->order);
  if (!j->scratch) return 1;
  j->taken = (_Atomic int *)((char *)j->scratch + floats);
  for (int i = 0; i < threads; i++) atomic_init(&j->taken[i], 0);
  j->order = (int32_t *)((char *)j->taken + flags);
  return 0;
}

static void list_sequences(delta_job *j, int64_t sequences) {
  for (int is_recurrent = 0; is_recurrent < 2; is_recurrent++)
    for (int64_t b = 0; b < sequences; b++)
      if (j->starts[b] < j->starts[b + 1] && !j->recurrent[b] == !is_recurrent) j->order[j->live++] = (int32_t)b;
}

/* Shapes as in Python; 1 if there is no memory for the scratch, before anything is written. */
int nyb_gated_delta(const float *mixed, const float *g, const float *beta, float *state, const int32_t *starts,
                    const int32_t *lengths, const int32_t *slots, const int32_t *writes, const int32_t *recurrent,
                    float *out, int64_t sequences, int64_t key_heads, int64_t value_heads, int64_t key_dim,
                    int64_t value_dim, int isa, int threads) {
  delta_job j = {.mixed = mixed, .g = g, .beta = beta, .state = state, .out = out, .starts = starts,
                 .lengths = lengths, .slots = slots, .writes = writes, .recurrent = recurrent,
                 .key_heads = key_heads, .value_heads = value_heads, .key_dim = key_dim, .value_dim = value_dim,
                 .scale = 1.0f / sqrtf((float)key_dim), .isa = isa};
  if (!sequences || !starts[sequences]) return 0;
  int has_chunks = 0;
  for (int64_t b = 0; b < sequences; b++) has_chunks |= starts[b] < starts[b + 1] && !recurrent[b];
  if (starts[sequences] * value_heads * key_dim * value_dim < ALONE || threads < 1) threads = 1;
  if (threads > sequences * value_heads) threads = (int)(sequences * value_heads);
  if (find_scratch(&j, threads, has_chunks, sequences)) return 1;
  list_sequences(&j, sequences);
  nyb_parallel(delta_task, &j, j.live * value_heads, threads);
  return 0;
}
NYB_STEP(nyb_gated_delta) {
  return nyb_gated_delta(v[0].p, v[1].p, v[2].p, v[3].p, v[4].p, v[5].p, v[6].p, v[7].p, v[8].p, v[9].p, v[10].n,
                         v[11].n, v[12].n, v[13].n, v[14].n, (int)v[15].n, (int)v[16].n);
}

static void decay_task(void *context, int64_t index) {
  const decay_job *j = context;
  int64_t from = index * DECAY_ROWS, to = from + DECAY_ROWS < j->tokens ? from + DECAY_ROWS : j->tokens;
  CALL(j->isa, decays, j, from, to);
}

void nyb_decay(const float *a, int64_t a_row, const float *b, int64_t b_row, const float *a_log, const float *dt_bias,
               float *g, float *beta, int64_t tokens, int64_t heads, int isa, int threads) {
  decay_job j = {.a = a, .b = b, .a_log = a_log, .dt_bias = dt_bias, .g = g, .beta = beta, .a_row = a_row,
                 .b_row = b_row, .tokens = tokens, .heads = heads, .isa = isa};
  if (tokens * heads < ALONE_DECAY) threads = 1;
  nyb_parallel(decay_task, &j, (tokens + DECAY_ROWS - 1) / DECAY_ROWS, threads);
}
NYB_STEP(nyb_decay) {
  nyb_decay(v[0].p, v[1].n, v[2].p, v[3].n, v[4].p, v[5].p, v[6].p, v[7].p, v[8].n, v[9].n, (int)v[10].n,
            (int)v[11].n);
  return 0;
}

static void conv_task(void *context, int64_t index) {
  const conv_job *j = context;
  int64_t from = index * CONV_CHANNELS, to = from + CONV_CHANNELS < j->channels ? from + CONV_CHANNELS : j->channels;
  CALL(j->isa, convolve, j, from, to);
}

void nyb_causal_conv(const float *x, int64_t x_row, const float *weight, float *state, const int32_t *starts,
                     const int32_t *lengths, const int32_t *slots, const int32_t *writes, float *y,
                     int64_t sequences, int64_t channels, int64_t taps, int isa, int threads) {
  conv_job j = {.x = x, .weight = weight, .state = state, .y = y, .starts = starts, .lengths = lengths,
                .slots = slots, .writes = writes, .x_row = x_row, .sequences = sequences, .channels = channels,
                .taps = taps, .isa = isa};
  if (starts[sequences] * channels * taps < ALONE) threads = 1;
  nyb_parallel(conv_task, &j, (channels + CONV_CHANNELS - 1) / CONV_CHANNELS, threads);
}
NYB_STEP(nyb_causal_conv) {
  nyb_causal_conv(v[0].p, v[1].n, v[2].p, v[3].p, v[4].p, v[5].p, v[6].p, v[7].p, v[8].p, v[9].n, v[10].n, v[11].n,
                  (int)v[12].n, (int)v[13].n);
  return 0;
}
