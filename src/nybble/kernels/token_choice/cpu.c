/* Choosing a token from each row of logits. Steps, order and ties are those of __init__.py; reference.py is the
 * definition, and this chooses the same token, bit for bit.
 *
 * Every filter keeps what is at least some value, so that a row under filters is the row and one number. The largest
 * entry of each block is kept beside it: a pass reads only blocks that have something to say. Noise is made for tokens
 * that stay, and its logarithms for those that could win. */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../isa.h"
#include "../pool.h"

#define ALONE 65536 /* logits below which the calling thread is done before a worker wakes */
#define MOST_BLOCKS 2048
#define MOST_SPAN 2048 /* 2^22 / MOST_BLOCKS */
#define BUCKETS 2048

enum { NOT_A_NUMBER = -1, NOTHING_LEFT = -2 };

typedef struct {
  double temperature, top_p, min_p;
  int64_t top_k, alternatives;
  uint64_t seed;
  uint32_t choice, position;
} rule;

typedef int32_t block_bits __attribute__((vector_size(32), aligned(4), may_alias)); /* eight tokens of a mask */
typedef float block_floats __attribute__((vector_size(32)));

#define NYB_BODY "token_choice/lanes.h"
#include "../every_isa.h"

typedef struct {
  float (*largest)(const float *x, int64_t n);
  uint64_t (*weigh)(const float *x, int64_t n, float least, double best, double temperature, uint64_t *out);
  void (*philox)(uint64_t first, int64_t n, const rule *r, uint64_t *out);
  void (*promise)(const float *x, int64_t n, float least, double lowest, double best, double temperature,
                  const uint64_t *bits, double *out);
  void (*hide)(float *x, int64_t n, const uint8_t *mask, int64_t bytes);
} lanes;

#define LANES_OF(isa) {largest_##isa, weigh_##isa, philox_##isa, promise_##isa, hide_##isa}
static const lanes portable = LANES_OF(portable);
#if defined(__x86_64__)
static const lanes avx2 = LANES_OF(avx2), avx512 = LANES_OF(avx512);
#endif

static const lanes *lanes_of(int isa) {
#if defined(__x86_64__)
  if (isa >= NYB_ISA_AVX512) return &avx512;
  if (isa >= NYB_ISA_AVX2) return &avx2;
#endif
  (void)isa;
  return &portable;
}

/* ------------------------------------------------------------------------------------------- a row under filters */

typedef struct {
  const lanes *by;
  const float *x;
  int64_t n, span, blocks; /* block b: entries b * span .. */
  float best;              /* the largest entry */
  float least;             /* what is below has been filtered out */
  double temperature;
  float tops[MOST_BLOCKS]; /* the largest entry of each block */
} row;

static int64_t size_of(const row *r, int64_t block) {
  int64_t left = r->n - block * r->span;
  return left < r->span ? left : r->span;
}

static void look_at(row *r, const float *x, int64_t n, const lanes *by) {
  r->by = by;
  r->x = x;
  r->n = n;
  r->span = (n + 64 * MOST_BLOCKS - 1) / (64 * MOST_BLOCKS) * 64;
  r->blocks = (n + r->span - 1) / r->span;
  r->best = -INFINITY;
  r->least = -FLT_MAX; /* never -infinity */
  for (int64_t b = 0; b < r->blocks; b++) {
    r->tops[b] = by->largest(x + b * r->span, size_of(r, b));
    if (r->tops[b] > r->best) r->best = r->tops[b];
  }
}

/* A number whose order is that of the floats; the two zeros are one. */
static inline uint32_t key_of(float x) {
  uint32_t bits;
  x += 0.0f;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static float of_key(uint32_t key) {
  uint32_t bits = key & 0x80000000u ? key & 0x7FFFFFFFu : ~key;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/* Entries from `low` to `high`, counted, or their weights summed, in buckets of 2^shift keys from the highest down. */
typedef struct {
  uint32_t low, high;
  int shift;
  uint64_t amounts[BUCKETS];
} buckets;

static void count_block(const row *r, int64_t block, buckets *to, int is_weighed) {
  uint64_t weights[MOST_SPAN + 8];
  const float *x = r->x + block * r->span, low = of_key(to->low), high = of_key(to->high);
  int64_t n = size_of(r, block), inside[MOST_SPAN], count = 0;
  for (int64_t i = 0; i < n; i++) {
    inside[count] = i;
    count += (x[i] >= low) & (x[i] <= high);
  }
  if (is_weighed && 8 * count > n) {
    r->by->weigh(x, n, low, r->best, r->temperature, weights);
  } else if (is_weighed) {
    for (int64_t i = 0; i < count; i++) {
      uint64_t lanes[8];
      r->by->weigh(x + inside[i], 1, low, r->best, r->temperature, lanes);
      weights[inside[i]] = lanes[0];
    }
  }
  for (int64_t i = 0; i < count; i++) {
    to->amounts[(to->high - key_of(x[inside[i]])) >> to->shift] += is_weighed ? weights[inside[i]] : 1;
  }
}

/* The least entry before which, among the larger ones, less than `limit` lies: of entries, or of weights. `least` if
 * all together are less. */
static float boundary(const row *r, double limit, int is_weighed) {
  buckets to = {.low = key_of(r->least), .high = key_of(r->best)};
  uint64_t above = 0;
  if (r->best < r->least) return r->least;
  for (;;) {
    to.shift = 0;
    while ((to.high - to.low) >> to.shift >= BUCKETS) to.shift++;
    memset(to.amounts, 0, sizeof to.amounts);
    for (int64_t b = 0; b < r->blocks; b++) {
      if (r->tops[b] >= r->least && key_of(r->tops[b]) >= to.low) count_block(r, b, &to, is_weighed);
    }
    uint32_t bucket = 0, last = (to.high - to.low) >> to.shift;
    for (; bucket <= last && (double)(above + to.amounts[bucket]) < limit; bucket++) above += to.amounts[bucket];
    if (bucket > last) return r->least;
    uint32_t high = to.high - (bucket << to.shift);
    if (to.shift == 0) return of_key(high);
    if (bucket < last) to.low = high - ((uint32_t)1 << to.shift) + 1;
    to.high = high;
  }
}

/* The k-th largest entry. It is no smaller than the k-th largest of the blocks' largest. */
static float kth(const row *r, int64_t k) {
  row narrowed = *r;
  if (k <= r->blocks && r->blocks > 1) {
    row tops;
    look_at(&tops, r->tops, r->blocks, r->by);
    float floor = boundary(&tops, (double)k, 0);
    if (floor > narrowed.least) narrowed.least = floor;
  }
  return boundary(&narrowed, (double)k, 0);
}

/* ----------------------------------------------------------------------------------------------------- the noise */

/* See `log` in reference.py. */
static double logarithm(double x) {
  int e;
  double m = frexp(x, &e);
  if (m < 0x1.6a09e667f3bcdp-1) {
    m = 2 * m;
    e--;
  }
  double s = (m - 1) / (m + 1), z = s * s, p = 1.0 / 23;
  for (int n = 21; n > 0; n -= 2) p = p * z + 1.0 / n;
  return (double)e * 0x1.62e42fefa39efp-1 + 2 * s * p;
}

static double gumbel(uint64_t bits) {
  double u = ((double)(bits >> 12) + 0.5) * 0x1p-52;
  return -logarithm(-logarithm(u));
}

/* Kept tokens of a block, when they are few. */
typedef struct {
  int64_t count, token[MOST_SPAN];
} few;

static void gather(const row *r, int64_t block, few *f) {
  int64_t at = block * r->span, end = at + size_of(r, block);
  f->count = 0;
  for (int64_t i = at; i < end; i++) {
    f->token[f->count] = i;
    f->count += r->x[i] >= r->least;
  }
}

typedef struct {
  double total;
  int64_t token;
} winner;

static void enter(const row *r, int64_t token, uint64_t bits, winner *w) {
  double total = ((double)r->x[token] - (double)r->best) / r->temperature + gumbel(bits);
  if (total > w->total) *w = (winner){total, token};
}

/* Every token of a block is asked for its promise, and its noise is computed if that could win. Spans are even: a block
 * begins with a counter. */
static void race_block(const row *r, int64_t block, const rule *rule, double lowest, winner *w) {
  uint64_t bits[MOST_SPAN + 16];
  double promised[MOST_SPAN + 8];
  int64_t at = block * r->span, n = size_of(r, block);
  r->by->philox((uint64_t)at / 2, (n + 1) / 2, rule, bits);
  r->by->promise(r->x + at, n, r->least, lowest, r->best, r->temperature, bits, promised);
  for (int64_t i = 0; i < n; i++) {
    if (promised[i] > w->total) enter(r, at + i, bits[i], w);
  }
}

static void race_few(const row *r, const few *f, const rule *rule, double lowest, winner *w) {
  for (int64_t i = 0; i < f->count; i++) {
    uint64_t pair[2 * 8];
    if (((double)r->x[f->token[i]] - (double)r->best) / r->temperature < lowest) continue;
    r->by->philox((uint64_t)f->token[i] / 2, 1, rule, pair);
    enter(r, f->token[i], pair[f->token[i] % 2], w);
  }
}

/* The token of the largest scaled + noise. */
static int64_t race(const row *r, const rule *rule) {
  few f;
  winner w = {-INFINITY, 0};
  double lowest = rule->min_p > 0 ? logarithm(rule->min_p) : -INFINITY;
  for (int64_t b = 0; b < r->blocks; b++) {
    if (!(r->tops[b] >= r->least)) continue;
    f.count = size_of(r, b);
    if (r->least > -FLT_MAX) gather(r, b, &f);
    if (8 * f.count > size_of(r, b)) race_block(r, b, rule, lowest, &w);
    else race_few(r, &f, rule, lowest, &w);
  }
  return w.token;
}

/* The least entry of the smallest nucleus. Entries so light that all n of them weigh less than what may stay outside
 * need not be looked at: 0.98 is far more than the roundings of weights, two steps those of the entry. */
static float nucleus(const row *r, double top_p) {
  uint64_t weights[MOST_SPAN + 8], sum = 0;
  row narrowed = *r;
  for (int64_t b = 0; b < r->blocks; b++) {
    if (!(r->tops[b] >= r->least)) continue;
    sum += r->by->weigh(r->x + b * r->span, size_of(r, b), r->least, r->best, r->temperature, weights);
  }
  double lightest = 0.98 * (1 - top_p) * (double)sum / (double)r->n;
  double lowest = lightest > 0.25 ? logarithm(lightest * 0x1p-40) : logarithm(0x1p-42); /* below 1/2: weight 0 */
  float least = (float)fmax((double)r->best + lowest * r->temperature, -FLT_MAX);
  least = nextafterf(nextafterf(least, -FLT_MAX), -FLT_MAX);
  if (least > narrowed.least) narrowed.least = least;
  return boundary(&narrowed, top_p * (double)sum, 1);
}

static int64_t first_best(const row *r) {
  int64_t block = 0;
  while (r->tops[block] != r->best) block++;
  int64_t i = block * r->span;
  while (r->x[i] != r->best) i++;
  return i;
}

static int64_t draw(row *r, const rule *rule) {
  r->temperature = rule->temperature;
  if (rule->top_k > 0 && rule->top_k < r->n) r->least = kth(r, rule->top_k);
  if (rule->top_p < 1) r->least = nucleus(r, rule->top_p);
  return race(r, rule);
}

/* ------------------------------------------------------------------------------------------------------- the rows */

typedef struct {
  float *logits;
  int64_t n, most;
  const rule *rules;
  const int64_t *starts;
  const int32_t *tokens;
  const double *factors, *shifts;
  float *before; /* what the edited logits were */
  const uint8_t *const *masks;
  const int64_t *mask_bytes; /* -1: no mask */
  int64_t *token, *top;
  double *logprob, *top_logprob;
  int isa;
} job;

void nyb_log_likelihood(const float *logits, int64_t rows, int64_t vocabulary, const int64_t *targets, double *nll,
                        int64_t *top, double *log_sum, int isa, int threads);

/* Puts a token among the best so far, of which there are `count`; the lowest of equals first. */
static void insert(const float *x, int64_t token, int64_t *best, int64_t count) {
  int64_t at = count;
  for (; at > 0 && x[best[at - 1]] < x[token]; at--) best[at] = best[at - 1];
  best[at] = token;
}

static void alternatives(const job *j, int64_t i, const row *r, double log_sum) {
  int64_t wanted = j->rules[i].alternatives, count = 0, *best = j->top + i * j->most;
  float bound = wanted < r->n ? kth(r, wanted) : r->least;
  for (int pass = 0; pass < 2; pass++) { /* those above the boundary, then as many of those at it as there is room */
    for (int64_t b = 0; b < r->blocks && count < wanted; b++) {
      if (!(r->tops[b] >= bound)) continue;
      const float *x = r->x;
      for (int64_t t = b * r->span, end = t + size_of(r, b); t < end && count < wanted; t++) {
        if (pass ? x[t] == bound : x[t] > bound) insert(x, t, best, count++);
      }
    }
  }
  for (int64_t k = 0; k < count; k++) j->top_logprob[i * j->most + k] = (double)r->x[best[k]] - log_sum;
}

static void edit(const job *j, int64_t i, float *x) {
  for (int64_t e = j->starts[i]; e < j->starts[i + 1]; e++) {
    float *at = x + j->tokens[e];
    double wide = j->before[e] = *at;
    wide = wide > 0 ? wide / j->factors[e] : wide * j->factors[e];
    *at = (float)(wide + j->shifts[e]);
  }
}

static void restore(const job *j, int64_t i, float *x) {
  for (int64_t e = j->starts[i + 1]; e-- > j->starts[i];) x[j->tokens[e]] = j->before[e];
}

static void one_row(void *context, int64_t i) {
  const job *j = context;
  float *x = j->logits + i * j->n;
  const lanes *by = lanes_of(j->isa);
  const rule *rule = j->rules + i;
  const int64_t nothing = 0;
  int64_t token;
  double nll, log_sum;
  nyb_log_likelihood(x, 1, j->n, &nothing, &nll, &token, &log_sum, j->isa, 1);
  if (isnan(log_sum)) return;
  row r;
  if (rule->alternatives > 0) {
    look_at(&r, x, j->n, by);
    alternatives(j, i, &r, log_sum);
  }
  int is_altered = j->starts[i + 1] > j->starts[i] || j->mask_bytes[i] >= 0;
  edit(j, i, x);
  if (j->mask_bytes[i] >= 0) by->hide(x, j->n, j->masks[i], j->mask_bytes[i]);
  if (rule->temperature > 0 || is_altered || log_sum == -INFINITY) {
    look_at(&r, x, j->n, by);
    if (r.best == -INFINITY) {
      j->token[i] = NOTHING_LEFT;
      return;
    }
    token = rule->temperature > 0 ? draw(&r, rule) : first_best(&r);
  }
  restore(j, i, x);
  j->token[i] = token;
  j->logprob[i] = (double)x[token] - log_sum;
}

void nyb_choose_tokens(float *logits, int64_t rows, int64_t n, const rule *rules, const int64_t *starts,
                       const int32_t *tokens, const double *factors, const double *shifts, float *before,
                       const uint8_t *const *masks, const int64_t *mask_bytes, int64_t most, int64_t *token,
                       double *logprob, int64_t *top, double *top_logprob, int isa, int threads) {
  job j = {.logits = logits, .n = n, .most = most, .rules = rules, .starts = starts, .tokens = tokens,
           .factors = factors, .shifts = shifts, .before = before, .masks = masks, .mask_bytes = mask_bytes,
           .token = token, .top = top, .logprob = logprob, .top_logprob = top_logprob, .isa = isa};
  if (rows * n < ALONE) threads = 1;
  nyb_parallel(one_row, &j, rows, threads);
}
