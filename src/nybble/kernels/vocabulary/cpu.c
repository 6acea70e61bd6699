/* Log-likelihoods, divergences and likeliest entries of rows of logits: rows over threads, instruction sets, entry
 * points. The arithmetic is in rows.h; the definition beside it is reference.py. */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../isa.h"
#include "../pool.h"
#include "../program.h"

#define ALONE 65536 /* entries below which the calling thread is done before a worker wakes */
#define BLOCK 1024 /* entries: both rows of a pair stay in the first-level cache between maximum and sum */

typedef struct {
  float best;         /* the largest entry so far */
  double peak;        /* the same, but -FLT_MAX for -infinity: -infinity - -infinity would be NaN */
  double sum;         /* of e^(entry - peak) */
  int64_t best_block; /* where the block begins that holds the first of the largest */
} seen;

static const seen nothing_seen = {-INFINITY, -FLT_MAX, 0, 0};

/* A block of the row; the last, if short, filled up with what adds nothing. */
static inline const float *whole_block(const float *row, int64_t at, int64_t n, float *tail) {
  if (n - at >= BLOCK) return row + at;
  memcpy(tail, row + at, (size_t)(n - at) * sizeof(float));
  for (int64_t i = n - at; i < BLOCK; i++) tail[i] = -INFINITY;
  return tail;
}

#define NYB_BODY "vocabulary/rows.h"
#include "../every_isa.h"

typedef struct {
  const float *reference, *candidate;
  int64_t vocabulary;
  const int64_t *targets;
  double *kl, *nll[2], *log_sum;
  int64_t *top[2];
  int isa;
} job;

/* The first of the largest entries; the first NaN where there is one, as torch.argmax has it. */
static int64_t top_of(const float *row, int64_t n, const seen *s) {
  if (isnan(s->sum)) {
    for (int64_t i = 0; i < n; i++) {
      if (isnan(row[i])) return i;
    }
  }
  for (int64_t i = s->best_block; i < n; i++) {
    if (row[i] == s->best) return i;
  }
  return 0; /* not reached: best is one of them */
}

static double finish(const job *j, int side, int64_t i, const float *row, const seen *s) {
  double log_sum = s->peak + log(s->sum);
  j->nll[side][i] = log_sum - (double)row[j->targets[i]];
  j->top[side][i] = top_of(row, j->vocabulary, s);
  return log_sum;
}

static void likelihood_row(void *context, int64_t i) {
  const job *j = context;
  const float *row = j->reference + i * j->vocabulary;
  seen s;
#if defined(__x86_64__)
  if (j->isa >= NYB_ISA_AVX512) one_row_avx512(row, j->vocabulary, &s);
  else if (j->isa >= NYB_ISA_AVX2) one_row_avx2(row, j->vocabulary, &s);
  else
#endif
    one_row_portable(row, j->vocabulary, &s);
  j->log_sum[i] = finish(j, 0, i, row, &s);
}

static void divergence_row(void *context, int64_t i) {
  const job *j = context;
  int64_t n = j->vocabulary;
  const float *row = j->reference + i * n, *other = j->candidate + i * n;
  seen r, c;
  double apart;
#if defined(__x86_64__)
  if (j->isa >= NYB_ISA_AVX512) apart = two_rows_avx512(row, other, n, &r, &c);
  else if (j->isa >= NYB_ISA_AVX2) apart = two_rows_avx2(row, other, n, &r, &c);
  else
#endif
    apart = two_rows_portable(row, other, n, &r, &c);
  double ours = finish(j, 0, i, row, &r), theirs = finish(j, 1, i, other, &c);
  j->kl[i] = apart / r.sum - ours + theirs;
}

void nyb_log_likelihood(const float *logits, int64_t rows, int64_t vocabulary, const int64_t *targets, double *nll,
                        int64_t *top, double *log_sum, int isa, int threads) {
  job j = {.reference = logits, .vocabulary = vocabulary, .targets = targets, .nll = {nll}, .top = {top},
           .log_sum = log_sum, .isa = isa};
  nyb_parallel(likelihood_row, &j, rows, threads);
}

void nyb_divergence(const float *reference, const float *candidate, int64_t rows, int64_t vocabulary,
                    const int64_t *targets, double *kl, double *reference_nll, double *candidate_nll,
                    int64_t *reference_top, int64_t *candidate_top, int isa, int threads) {
  job j = {.reference = reference, .candidate = candidate, .vocabulary = vocabulary, .targets = targets, .kl = kl,
           .nll = {reference_nll, candidate_nll}, .top = {reference_top, candidate_top}, .isa = isa};
  nyb_parallel(divergence_row, &j, rows, threads);
}

/* ------------------------------------------------------------------------------------------- the likeliest entry */

typedef struct {
  const float *logits;
  int64_t stride, vocabulary, *out;
  int64_t (*likeliest)(const float *row, int64_t n);
} choice_job;

static void choose(void *context, int64_t i) {
  const choice_job *j = context;
  j->out[i] = j->likeliest(j->logits + i * j->stride, j->vocabulary);
}

void nyb_likeliest(const float *logits, int64_t stride, int64_t *out, int64_t rows, int64_t vocabulary, int isa,
                   int threads) {
  choice_job j = {.logits = logits, .stride = stride, .vocabulary = vocabulary, .out = out,
                  .likeliest = likeliest_portable};
#if defined(__x86_64__)
  if (isa >= NYB_ISA_AVX2) j.likeliest = isa >= NYB_ISA_AVX512 ? likeliest_avx512 : likeliest_avx2;
#else
  (void)isa;
#endif
  nyb_parallel(choose, &j, rows, rows * vocabulary < ALONE ? 1 : threads);
}
NYB_STEP(nyb_likeliest) {
  nyb_likeliest(v[0].p, v[1].n, v[2].p, v[3].n, v[4].n, (int)v[5].n, (int)v[6].n);
  return 0;
}
