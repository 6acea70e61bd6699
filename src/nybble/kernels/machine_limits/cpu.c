/* What this machine can do at most, measured with the pool that the kernels run on: bytes read from memory, and
 * multiply-adds from registers. Each probe returns a sum that says it did the work, so that no compiler leaves it out
 * and a test can check it. The clock is the caller's. */
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#include "../isa.h"
#include "../pool.h"

#define PIECE ((int64_t)1 << 20) /* bytes that a thread takes at a time: short at the end, long for prefetching */
#define CHAINS 12                /* sums that depend on nothing but themselves: latency times issue width, and spare */

/* --------------------------------------------------------------------------------------------------------- reading */

typedef struct {
  const uint64_t *words;
  int64_t count, pieces;
  uint64_t *sums; /* [pieces] */
  int isa;
} reading;

static uint64_t sum_portable(const uint64_t *p, int64_t n) {
  uint64_t s[8] = {0};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; j++) s[j] += p[i + j];
  }
  for (; i < n; i++) s[0] += p[i];
  return s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) static uint64_t sum_avx512(const uint64_t *p, int64_t n) {
  __m512i s[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    for (int j = 0; j < 4; j++) s[j] = _mm512_add_epi64(s[j], _mm512_loadu_si512(p + i + 8 * j));
  }
  __m512i all = _mm512_add_epi64(_mm512_add_epi64(s[0], s[1]), _mm512_add_epi64(s[2], s[3]));
  return (uint64_t)_mm512_reduce_add_epi64(all) + sum_portable(p + i, n - i);
}

__attribute__((target("avx2"))) static uint64_t sum_avx2(const uint64_t *p, int64_t n) {
  __m256i s[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int j = 0; j < 4; j++) s[j] = _mm256_add_epi64(s[j], _mm256_loadu_si256((const void *)(p + i + 4 * j)));
  }
  uint64_t lanes[4];
  _mm256_storeu_si256((void *)lanes, _mm256_add_epi64(_mm256_add_epi64(s[0], s[1]), _mm256_add_epi64(s[2], s[3])));
  return lanes[0] + lanes[1] + lanes[2] + lanes[3] + sum_portable(p + i, n - i);
}
#endif

static void read_piece(void *context, int64_t i) {
  const reading *r = context;
  int64_t each = PIECE / (int64_t)sizeof(uint64_t), first = i % r->pieces * each;
  int64_t n = r->count - first < each ? r->count - first : each;
  const uint64_t *p = r->words + first;
#if defined(__x86_64__)
  if (r->isa >= NYB_ISA_AVX512) r->sums[i] = sum_avx512(p, n);
  else if (r->isa >= NYB_ISA_AVX2) r->sums[i] = sum_avx2(p, n);
  else r->sums[i] = sum_portable(p, n);
#else
  r->sums[i] = sum_portable(p, n);
#endif
}

int64_t nyb_limit_pieces(int64_t words) {
  int64_t each = PIECE / (int64_t)sizeof(uint64_t);
  return (words + each - 1) / each;
}

/* Reads count words, `passes` times; sums [passes * nyb_limit_pieces(count)] is scratch. The sum of all that was read,
 * modulo 2^64. */
uint64_t nyb_limit_read(const uint64_t *words, int64_t count, int64_t passes, uint64_t *sums, int isa, int threads) {
  int64_t pieces = nyb_limit_pieces(count);
  reading r = {words, count, pieces, sums, isa};
  nyb_parallel(read_piece, &r, passes * pieces, threads);
  uint64_t sum = 0;
  for (int64_t i = 0; i < passes * pieces; i++) sum += sums[i];
  return sum;
}

/* --------------------------------------------------------------------------------------------------- multiplying */

enum { F32, BF16, INT8 }; /* PEAKS of the package */

typedef void (*multiplier)(int64_t rounds, double *sum);

typedef struct {
  int64_t rounds;
  double *sums; /* [threads] */
  multiplier run;
} multiplying;

static void multiply(void *context, int64_t i) {
  const multiplying *m = context;
  m->run(m->rounds, &m->sums[i]);
}

/* Every product is 1 x 1, so that the sum counts them; HOLD keeps the compiler from folding the loop. The sums have
 * names, not numbers: a compiler keeps an array in memory. */
#define PEAK(NAME, TARGET, VECTOR, ZERO, ADD, HOLD, LANES, TYPE)                   \
  TARGET static void NAME(int64_t rounds, double *sum) {                           \
    VECTOR a = ZERO, b = a, c = a, d = a, e = a, f = a;                            \
    VECTOR g = ZERO, h = g, i = g, j = g, k = g, l = g;                            \
    for (int64_t round = 0; round < rounds; round++) {                             \
      a = ADD(a), b = ADD(b), c = ADD(c), d = ADD(d), e = ADD(e), f = ADD(f);      \
      HOLD(a); HOLD(b); HOLD(c); HOLD(d); HOLD(e); HOLD(f);                        \
      g = ADD(g), h = ADD(h), i = ADD(i), j = ADD(j), k = ADD(k), l = ADD(l);      \
      HOLD(g); HOLD(h); HOLD(i); HOLD(j); HOLD(k); HOLD(l);                        \
    }                                                                              \
    const VECTOR all[CHAINS] = {a, b, c, d, e, f, g, h, i, j, k, l};               \
    TYPE lanes[CHAINS * LANES];                                                    \
    memcpy(lanes, all, sizeof lanes);                                              \
    *sum = 0;                                                                      \
    for (int lane = 0; lane < CHAINS * LANES; lane++) *sum += (double)lanes[lane]; \
  }

#if defined(__x86_64__)
#define FOR(SETS) __attribute__((target(SETS)))
#define HOLD_WIDE(v) __asm__ volatile("" : "+v"(v))
#define HOLD(v) __asm__ volatile("" : "+x"(v))

#define ADD_F32(v) _mm512_fmadd_ps(_mm512_set1_ps(1), _mm512_set1_ps(1), v)
PEAK(f32_avx512, FOR("avx512f"), __m512, _mm512_setzero_ps(), ADD_F32, HOLD_WIDE, 16, float)

#define ONES_BF16 ((__m512bh)_mm512_set1_epi16(0x3F80))
#define ADD_BF16(v) _mm512_dpbf16_ps(v, ONES_BF16, ONES_BF16)
PEAK(bf16_avx512, FOR("avx512f,avx512bf16"), __m512, _mm512_setzero_ps(), ADD_BF16, HOLD_WIDE, 16, float)

#define ADD_INT8(v) _mm512_dpbusd_epi32(v, _mm512_set1_epi8(1), _mm512_set1_epi8(1))
PEAK(int8_vnni, FOR("avx512f,avx512bw,avx512vnni"), __m512i, _mm512_setzero_si512(), ADD_INT8, HOLD_WIDE, 16, int32_t)

#define ADD_F32_AVX2(v) _mm256_fmadd_ps(_mm256_set1_ps(1), _mm256_set1_ps(1), v)
PEAK(f32_avx2, FOR("avx2,fma"), __m256, _mm256_setzero_ps(), ADD_F32_AVX2, HOLD, 8, float)

/* Without VNNI: products in pairs, pairs in fours, added. Held, or the compiler would make the products before. */
FOR("avx2") static inline __m256i add_int8(__m256i sum) {
  __m256i ones = _mm256_set1_epi8(1);
  HOLD(ones);
  __m256i pairs = _mm256_maddubs_epi16(ones, ones);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
PEAK(int8_avx2, FOR("avx2"), __m256i, _mm256_setzero_si256(), add_int8, HOLD, 8, int32_t)

static int has_vnni(void) {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c & (1u << 11)); /* leaf 7, ECX: AVX512_VNNI */
}
#endif

#define HOLD_PLAIN(v) __asm__ volatile("" : "+m"(v))
#define ADD_PLAIN(v) ((v) + 1.0f * 1.0f)
PEAK(f32_portable, , float, 0, ADD_PLAIN, HOLD_PLAIN, 1, float)

/* Does `rounds` of CHAINS instructions on each thread; sums [threads] get the sum of the products of each, all 1.
 * Returns the products of one thread; 0 where the instruction set has no instruction of that kind. */
int64_t nyb_limit_multiply(int kind, int64_t rounds, double *sums, int isa, int threads) {
  multiplier run = 0;
  int64_t each = 0; /* products of one instruction, or of the three that stand for it */
#if defined(__x86_64__)
  if (kind == F32 && isa >= NYB_ISA_AVX512) run = f32_avx512, each = 16;
  else if (kind == F32 && isa >= NYB_ISA_AVX2) run = f32_avx2, each = 8;
  else if (kind == BF16 && isa >= NYB_ISA_AVX512BF16) run = bf16_avx512, each = 32;
  else if (kind == INT8 && isa >= NYB_ISA_AVX512 && has_vnni()) run = int8_vnni, each = 64;
  else if (kind == INT8 && isa >= NYB_ISA_AVX2) run = int8_avx2, each = 32;
#endif
  if (kind == F32 && isa == NYB_ISA_PORTABLE) run = f32_portable, each = 1;
  if (!run) return 0;
  multiplying m = {rounds, sums, run};
  nyb_parallel(multiply, &m, threads, threads);
  return rounds * CHAINS * each;
}
