/* Four-bit weights times rows of x in INT8 or BF16: a lane for each block of 16, its scale applied to its sum. Included
 * by matmul.c once for each NYB_SUFFIX. NYB_WIDE: 512 bits or 256; NYB_INT8: what x was rounded to.
 *
 * A vector has 32 bits for each block of a chunk of two weight rows: 8 blocks in 512 bits, 4 in 256. A block passes
 * through its lane in STEPS of four INT8 or of two BF16 elements; then the output's sum in that lane takes it with one
 * multiply-add by its scale. The packed x has the elements of a step side by side, which all weight rows meet. INT8
 * meets weights doubled and raised by 12, so that they are bytes without sign; the packed x brings -12 times the sum of
 * each of its blocks to begin with. */
#define CONCAT_(a, b) a##_##b
#define CONCAT(a, b) CONCAT_(a, b)
#define NAME(x) CONCAT(x, NYB_SUFFIX)
#define UNROLL _Pragma("GCC unroll 8")
#if NYB_WIDE
#if NYB_INT8
#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
#else
#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"
#endif
#define VEC __m512i
#define FLT __m512
#define V(op) _mm512_##op
#define AND _mm512_and_si512
#define LOAD(p) _mm512_loadu_si512(p)
#define AS_FLOAT _mm512_castsi512_ps
#define AS_BITS _mm512_castps_si512
#else
#define TARGET "avx2,fma"
#define VEC __m256i
#define FLT __m256
#define V(op) _mm256_##op
#define AND _mm256_and_si256
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define AS_FLOAT _mm256_castsi256_ps
#define AS_BITS _mm256_castps_si256
#endif
#define FN static inline __attribute__((always_inline, target(TARGET)))
#define KERNEL static UNSCHEDULED __attribute__((target(TARGET)))

enum {
  NAME(CHUNK) = NYB_WIDE ? 128 : 64, /* elements of two rows in a vector of codes each */
  NAME(STEPS) = NYB_INT8 ? 4 : 8,
  NAME(X_BYTES) = NAME(CHUNK) / 64 * (NYB_INT8 ? INT8_CHUNK : BF16_CHUNK), /* a chunk of a packed row of x */
  NAME(RAISED) = NAME(CHUNK),     /* where in it INT8 has -12 times its sums */
  NAME(SCALES) = NAME(CHUNK) * 5 / 4, /* and the scales */
  NAME(PIECE) = 1024 / NAME(CHUNK) * (NYB_INT8 ? 2 : 1), /* chunks decoded into a tile: it stays in the first cache */
  NAME(PAIRS) = NYB_WIDE ? 4 : 2, /* pairs of weight rows that are worked on together, with MOST rows of x: the sums */
  NAME(MOST) = NYB_WIDE ? 4 : 2,  /* within their blocks fit the registers */
  NAME(MOST_FEW) = NYB_WIDE ? 5 : 2, /* of x where weights are decoded in registers: twice would be dearer */
};
#define CHUNK NAME(CHUNK)
#define STEPS NAME(STEPS)
#define X_BYTES NAME(X_BYTES)
#define PIECE NAME(PIECE)
#define PAIRS NAME(PAIRS)
#define MOST NAME(MOST)
#define MOST_FEW NAME(MOST_FEW)
#if NYB_INT8
#define PART VEC /* the sum within a block */
#else
#define PART FLT
#endif

/* Where the weight rows of a window are. */
typedef struct {
  const uint8_t *codes, *scales;
  int64_t apart, scales_apart; /* of neighbours */
} NAME(place);

FN NAME(place) NAME(find)(const int format, const task *t, const window *w) {
  const int64_t scales = t->k / (format == NYB_WEIGHT_NVFP4 ? 16 : 32);
  return (NAME(place)){t->segment->codes + w->first * t->segment->row_bytes, t->segment->scale + w->first * scales,
                       w->apart * t->segment->row_bytes, w->apart * scales};
}

/* A step of a chunk of x: 32 or 16 bytes, each two blocks' twice. */
FN VEC NAME(spread)(const void *p) {
#if NYB_WIDE
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3),
                                  _mm512_castsi256_si512(_mm256_loadu_si256(p)));
#else
  return _mm256_permute4x64_epi64(_mm256_castsi128_si256(_mm_loadu_si128(p)), 0x50);
#endif
}

/* A chunk of the codes of a row; of a tail, `left` elements exist, and the others are zeros. */
FN VEC NAME(row_codes)(const int is_tail, const uint8_t *p, int64_t left) {
  if (!is_tail) return LOAD(p);
#if NYB_WIDE
  return _mm512_maskz_loadu_epi8((1ull << left / 2) - 1, p);
#else
  uint8_t some[32] = {0};
  for (int i = 0; i < left / 2; i++) some[i] = p[i];
  return LOAD(some);
#endif
}
/* Of two rows: the first four bytes of each block, and the last four. */
FN void NAME(load_codes)(const int is_tail, const uint8_t *p, int64_t apart, int64_t left, VEC u[2]) {
  const FLT a = AS_FLOAT(NAME(row_codes)(is_tail, p, left)), b = AS_FLOAT(NAME(row_codes)(is_tail, p + apart, left));
  u[0] = AS_BITS(V(shuffle_ps)(a, b, 0x88));
  u[1] = AS_BITS(V(shuffle_ps)(a, b, 0xdd));
}
/* The weights of a step. */
FN VEC NAME(decode)(VEC table, const VEC u[2], const int step) {
#if NYB_INT8
  const VEC v = step & 1 ? V(srli_epi16)(u[step >> 1], 4) : u[step >> 1];
  return V(shuffle_epi8)(table, AND(v, V(set1_epi8)(15)));
#else
  /* The permutation reads five bits of an index; the table does not care about the fifth. */
  return _mm512_permutexvar_epi16(step & 3 ? _mm512_srli_epi16(u[step >> 2], 4 * (step & 3)) : u[step >> 2], table);
#endif
}
FN VEC NAME(load_table)(void) {
#if !NYB_INT8
  return _mm512_load_si512(bf16_values);
#elif NYB_WIDE
  return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)raised_values));
#else
  return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)raised_values));
#endif
}

/* The scale bytes of a chunk of a row, again and again; of a tail, `exist` of them are there. */
FN VEC NAME(row_scales)(const int count, const int is_tail, const uint8_t *p, int64_t exist) {
  uint64_t bytes = 0;
  if (!is_tail) memcpy(&bytes, p, (size_t)count);
#if NYB_WIDE
  else bytes = (uint64_t)_mm_cvtsi128_si64(_mm_maskz_loadu_epi8((__mmask16)((1u << exist) - 1), p));
  return count == 8 ? _mm512_set1_epi64((int64_t)bytes) : _mm512_set1_epi32((int)bytes);
#else
  else for (int i = 0; i < exist; i++) bytes |= (uint64_t)p[i] << 8 * i;
  return count == 4 ? _mm256_set1_epi32((int)bytes) : _mm256_set1_epi16((short)bytes);
#endif
}
/* The scales of a chunk of two rows as floats, each in its block's lane. Odd ones may be without exponent or negative;
 * they are made without multiplying numbers without exponent, which takes a hundred cycles. A NaN becomes a number:
 * describe_window sees to it. */
FN FLT NAME(load_scales)(const int format, const int is_odd, const int is_tail, const uint8_t *p, int64_t apart,
                         int64_t left) {
  const int block = format == NYB_WEIGHT_NVFP4 ? 16 : 32, count = CHUNK / block;
  const VEC a = NAME(row_scales)(count, is_tail, p, left / block);
  const VEC b = NAME(row_scales)(count, is_tail, p + apart, left / block);
  const VEC both = count == 8   ? V(unpacklo_epi64)(a, b)
                   : count == 4 ? V(unpacklo_epi32)(a, b)
                                : V(unpacklo_epi16)(a, b);
  VEC v = V(shuffle_epi8)(both, LOAD(scale_places[NYB_WIDE][format == NYB_WEIGHT_MXFP4])); /* in the highest bytes */
  if (format == NYB_WEIGHT_MXFP4) {
    v = V(srli_epi32)(v, 1);
    return AS_FLOAT(is_odd ? V(max_epi32)(v, V(set1_epi32)(1 << 22)) : v);
  }
  const VEC bias = V(set1_epi32)(120 << 23); /* of the exponents */
  if (!is_odd) return AS_FLOAT(V(add_epi32)(V(srli_epi32)(v, 4), bias));
  const FLT g = AS_FLOAT(V(add_epi32)(AND(V(srli_epi32)(v, 4), V(set1_epi32)(0x07f00000)), bias));
  const FLT magnitude = V(min_ps)(g, V(fmadd_ps)(g, V(set1_ps)(2), V(set1_ps)(-0x1p-6f)));
  return AS_FLOAT(V(add_epi32)(AS_BITS(magnitude), AND(v, V(set1_epi32)((int)0x80000000u))));
}

FN PART NAME(begin)(const char *x) {
  (void)x;
#if !NYB_INT8
  return V(setzero_ps)();
#elif NYB_WIDE
  return NAME(spread)(x + NAME(RAISED));
#else
  return _mm256_setzero_si256();
#endif
}
FN PART NAME(dot)(PART sum, VEC w, VEC x) {
#if !NYB_INT8
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
#elif NYB_WIDE
  return _mm512_dpbusd_epi32(sum, w, x);
#else
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)); /* eight products of at most 24 * 127: no overflow */
#endif
}
FN FLT NAME(add_block)(FLT sum, PART part, FLT scale, const char *x) {
#if !NYB_INT8
  (void)x;
  return V(fmadd_ps)(part, scale, sum);
#else
#if !NYB_WIDE
  part = _mm256_add_epi32(_mm256_madd_epi16(part, _mm256_set1_epi16(1)), NAME(spread)(x + NAME(RAISED)));
#endif
  return V(fmadd_ps)(V(cvtepi32_ps)(part), V(mul_ps)(scale, AS_FLOAT(NAME(spread)(x + NAME(SCALES)))), sum);
#endif
}

/* The lanes of each row added: halves of 512 bits, then of 256, then neighbours; times scale plus bias into y, the
 * window's first column. */
FN __m256 NAME(add_halves)(FLT a) {
#if NYB_WIDE
  return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
#else
  return a;
#endif
}
FN __m256 NAME(add_quarters)(FLT a, FLT b) { /* two of each row of a, then of b */
  const __m256 c = NAME(add_halves)(a), d = NAME(add_halves)(b);
  return _mm256_add_ps(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31));
}
FN void NAME(finish)(const int mr, FLT sums[][PAIRS], const float *scale, const float *bias,
                     unsigned valid, float *y, int64_t n) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i some = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)valid), bits), bits);
  UNROLL for (int i = 0; i < mr; i++) {
    const __m256 low = NAME(add_quarters)(sums[i][0], sums[i][1]);
    const __m256 high = PAIRS == 4 ? NAME(add_quarters)(sums[i][2], sums[i][3]) : low;
    const __m256d out = _mm256_permute4x64_pd(_mm256_castps_pd(_mm256_hadd_ps(low, high)), 0xd8);
    const __m256 v = _mm256_mul_ps(_mm256_castpd_ps(out), _mm256_loadu_ps(scale));
    _mm256_maskstore_ps(y + i * n, some, _mm256_add_ps(v, _mm256_loadu_ps(bias)));
  }
}

/* If a scale of these is not a plain positive number: no exponent but all zeros or ones in E8M0, a sign, NaN. */
FN int NAME(are_odd)(const int format, const uint8_t *p, int64_t count) {
  const VEC from = V(set1_epi8)(format == NYB_WEIGHT_NVFP4 ? 8 : 1);
  const VEC most = V(set1_epi8)((char)(format == NYB_WEIGHT_NVFP4 ? 0x7e - 8 : 0xfe - 1));
  VEC worst = V(set1_epi8)(0);
  int64_t i = 0;
  for (; i + (int64_t)sizeof(VEC) <= count; i += (int64_t)sizeof(VEC))
    worst = V(max_epu8)(worst, V(sub_epi8)(LOAD(p + i), from));
#if NYB_WIDE
  const __mmask64 rest = (1ull << (count - i)) - 1;
  worst = _mm512_mask_max_epu8(worst, rest, worst, _mm512_sub_epi8(_mm512_maskz_loadu_epi8(rest, p + i), from));
  return _mm512_cmpgt_epu8_mask(worst, most) != 0;
#else
  uint8_t some[sizeof(VEC)];
  memset(some, 8, sizeof some);
  for (int j = 0; i < count; j++, i++) some[j] = p[i];
  worst = _mm256_max_epu8(worst, _mm256_sub_epi8(LOAD(some), from));
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(worst, most), most)) != -1;
#endif
}
KERNEL int NAME(is_odd)(const task *t, const window *w, int rows) {
  const int is_mx = t->segment->format == NYB_WEIGHT_MXFP4;
  const int64_t count = t->k / (is_mx ? 32 : 16);
  const uint8_t *p = t->segment->scale + w->first * count;
  return is_mx ? NAME(are_odd)(NYB_WEIGHT_MXFP4, p, w->apart ? rows * count : count)
               : NAME(are_odd)(NYB_WEIGHT_NVFP4, p, w->apart ? rows * count : count);
}

/* How many of so many rows of x come next: one alone is the slowest. */
static inline int64_t NAME(rows_at_once)(int64_t left) {
  return left < MOST ? left : MOST > 2 && left == MOST + 1 ? MOST - 1 : MOST;
}

/* ---------------------------------------------------------------------- few rows of x: decoded in registers */

/* A chunk of a window times mr rows of x. */
FN void NAME(few_chunk)(const int format, const int mr, const int is_odd, const int is_tail, VEC table,
                        const NAME(place) *p, int64_t left, const char *x, int64_t x_stride,
                        FLT sums[MOST_FEW][PAIRS]) {
  VEC u[PAIRS][2];
  PART part[MOST_FEW][PAIRS];
  UNROLL for (int g = 0; g < PAIRS; g++)
    NAME(load_codes)(is_tail, p->codes + 2 * g * p->apart, p->apart, left, u[g]);
  UNROLL for (int i = 0; i < mr; i++) {
    const PART zero = NAME(begin)(x + i * x_stride);
    UNROLL for (int g = 0; g < PAIRS; g++) part[i][g] = zero;
  }
  UNROLL for (int step = 0; step < STEPS; step++) {
    VEC v[MOST_FEW];
    UNROLL for (int i = 0; i < mr; i++) v[i] = NAME(spread)(x + i * x_stride + CHUNK / 4 * step);
    UNROLL for (int g = 0; g < PAIRS; g++) {
      const VEC a = NAME(decode)(table, u[g], step);
      UNROLL for (int i = 0; i < mr; i++) part[i][g] = NAME(dot)(part[i][g], a, v[i]);
    }
  }
  UNROLL for (int g = 0; g < PAIRS; g++) {
    const FLT each =
        NAME(load_scales)(format, is_odd, is_tail, p->scales + 2 * g * p->scales_apart, p->scales_apart, left);
    UNROLL for (int i = 0; i < mr; i++) sums[i][g] = NAME(add_block)(sums[i][g], part[i][g], each, x + i * x_stride);
  }
}

/* A window times mr rows of x. Each line of codes and scales is asked of memory some time before: AHEAD bytes on in its
 * row, or at the like place of the rows to come. Into the second cache: the first has too few places for lines that are
 * on their way (a Zen 4 read 40 % of its bandwidth with them, and 80 % without). */
FN void NAME(few_rows)(const int format, const int mr, const int is_odd, const task *t,
                       const window *w, const char *x, float *y) {
  NAME(place) p = NAME(find)(format, t, w);
  const int64_t next = 2 * PAIRS * p.apart - t->k / 2;
  const uint8_t *next_scales = p.scales + 2 * PAIRS * p.scales_apart;
  const int scale_bytes = CHUNK / (format == NYB_WEIGHT_NVFP4 ? 16 : 32);
  const VEC table = NAME(load_table)();
  FLT sums[MOST_FEW][PAIRS];
  UNROLL for (int i = 0; i < mr; i++)
    UNROLL for (int g = 0; g < PAIRS; g++) sums[i][g] = V(setzero_ps)();
  int64_t left = t->k;
  for (; left >= CHUNK; left -= CHUNK) {
    const uint8_t *ahead = p.codes + AHEAD + (left / 2 > AHEAD ? 0 : next);
    UNROLL for (int j = 0; j < 2 * PAIRS; j++) _mm_prefetch((const char *)ahead + j * p.apart, _MM_HINT_T1);
    _mm_prefetch((const char *)next_scales, _MM_HINT_T1);
    NAME(few_chunk)(format, mr, is_odd, 0, table, &p, left, x, t->x_stride, sums);
    p.codes += CHUNK / 2;
    p.scales += scale_bytes;
    next_scales += 2 * PAIRS * scale_bytes;
    x += X_BYTES;
  }
  if (left) NAME(few_chunk)(format, mr, is_odd, 1, table, &p, left, x, t->x_stride, sums);
  float scale[8], bias[8];
  describe_window(t, w, 2 * PAIRS, is_odd, scale, bias);
  NAME(finish)(mr, sums, scale, bias, w->valid, y + w->first, t->n);
}

#define FEW(format, mr)                                                                                                \
  KERNEL void NAME(few_##format##_##mr)(const task *t, const window *w, const char *x, float *y) {                     \
    NAME(few_rows)(NYB_WEIGHT_##format, mr, 0, t, w, x, y);                                                            \
  }                                                                                                                    \
  KERNEL void NAME(odd_##format##_##mr)(const task *t, const window *w, const char *x, float *y) {                     \
    NAME(few_rows)(NYB_WEIGHT_##format, mr, 1, t, w, x, y);                                                            \
  }
FEW(NVFP4, 1)
FEW(MXFP4, 1)
FEW(NVFP4, 2)
FEW(MXFP4, 2)
#if NYB_WIDE
FEW(NVFP4, 3)
FEW(MXFP4, 3)
FEW(NVFP4, 4)
FEW(MXFP4, 4)
FEW(NVFP4, 5)
FEW(MXFP4, 5)
#define ROWS_OF(kind) { NAME(kind##_1), NAME(kind##_2), NAME(kind##_3), NAME(kind##_4), NAME(kind##_5) }
#else
#define ROWS_OF(kind) { NAME(kind##_1), NAME(kind##_2) }
#endif
static void (*const NAME(few)[2][2][MOST_FEW])(const task *, const window *, const char *, float *) = {
    {ROWS_OF(few_NVFP4), ROWS_OF(odd_NVFP4)}, {ROWS_OF(few_MXFP4), ROWS_OF(odd_MXFP4)}};
#undef FEW
#undef ROWS_OF

/* ----------------------------------------------------------------------- many rows of x: decoded into a tile */

typedef struct {
  VEC step[STEPS][PAIRS];
  FLT scale[PAIRS];
} NAME(decoded); /* a chunk of a window */

typedef struct {
  NAME(decoded) tile[PIECE];
  int chunks, is_first, is_last;
} NAME(piece);

/* A window, and between pieces of K the sums of each row of x. */
typedef struct {
  FLT kept[BLOCK_ROWS][PAIRS];
  window at;
  int is_odd;
  float scale[8], bias[8];
} NAME(columns);

FN void NAME(fill_chunk)(const int format, const int is_odd, const int is_tail, VEC table, const NAME(place) *p,
                         int64_t left, NAME(decoded) *out) {
  for (int g = 0; g < PAIRS; g++) {
    VEC u[2];
    NAME(load_codes)(is_tail, p->codes + 2 * g * p->apart, p->apart, left, u);
    UNROLL for (int step = 0; step < STEPS; step++) out->step[step][g] = NAME(decode)(table, u, step);
    out->scale[g] =
        NAME(load_scales)(format, is_odd, is_tail, p->scales + 2 * g * p->scales_apart, p->scales_apart, left);
  }
}
/* Decodes elements [at, to) of a window, and asks memory for what is decoded after them, `next` bytes on. */
FN void NAME(fill)(const int format, const int is_odd, const task *t, const window *w, int64_t at, int64_t to,
                   int64_t next, NAME(decoded) *out) {
  NAME(place) p = NAME(find)(format, t, w);
  const int scale_bytes = CHUNK / (format == NYB_WEIGHT_NVFP4 ? 16 : 32);
  const VEC table = NAME(load_table)();
  p.codes += at / 2;
  p.scales += at / CHUNK * scale_bytes;
  for (; at < to; at += CHUNK, p.codes += CHUNK / 2, p.scales += scale_bytes, out++) {
    for (int j = 0; j < 2 * PAIRS; j++) _mm_prefetch((const char *)p.codes + next + j * p.apart, _MM_HINT_T1);
    if (at + CHUNK <= t->k) NAME(fill_chunk)(format, is_odd, 0, table, &p, CHUNK, out);
    else NAME(fill_chunk)(format, is_odd, 1, table, &p, t->k - at, out);
  }
}
#define FILL(format)                                                                                                   \
  KERNEL void NAME(fill_##format)(int is_odd, const task *t, const window *w, int64_t at, int64_t to, int64_t next,    \
                                  NAME(decoded) *out) {                                                                \
    if (is_odd) NAME(fill)(NYB_WEIGHT_##format, 1, t, w, at, to, next, out);                                           \
    else NAME(fill)(NYB_WEIGHT_##format, 0, t, w, at, to, next, out);                                                  \
  }
FILL(NVFP4)
FILL(MXFP4)
#undef FILL

/* The tile times mr rows of x. */
FN void NAME(panel)(const int mr, const NAME(piece) *p, NAME(columns) *c, const task *t, const char *x, int64_t first) {
  const int64_t x_stride = t->x_stride;
  const NAME(decoded) *d = p->tile, *end = d + p->chunks;
  FLT sums[MOST][PAIRS];
  UNROLL for (int i = 0; i < mr; i++)
    UNROLL for (int g = 0; g < PAIRS; g++) sums[i][g] = p->is_first ? V(setzero_ps)() : c->kept[first + i][g];
  for (x += first * x_stride; d < end; d++, x += X_BYTES) {
    PART part[MOST][PAIRS];
    UNROLL for (int i = 0; i < mr; i++) {
      const PART zero = NAME(begin)(x + i * x_stride);
      UNROLL for (int g = 0; g < PAIRS; g++) part[i][g] = zero;
    }
    UNROLL for (int step = 0; step < STEPS; step++) {
      VEC v[MOST];
      UNROLL for (int i = 0; i < mr; i++) v[i] = NAME(spread)(x + i * x_stride + CHUNK / 4 * step);
      UNROLL for (int g = 0; g < PAIRS; g++) {
        const VEC a = d->step[step][g];
        UNROLL for (int i = 0; i < mr; i++) part[i][g] = NAME(dot)(part[i][g], a, v[i]);
      }
    }
    UNROLL for (int i = 0; i < mr; i++)
      UNROLL for (int g = 0; g < PAIRS; g++)
        sums[i][g] = NAME(add_block)(sums[i][g], part[i][g], d->scale[g], x + i * x_stride);
  }
  if (p->is_last) {
    NAME(finish)(mr, sums, c->scale, c->bias, c->at.valid, t->y + c->at.first + first * t->n, t->n);
    return;
  }
  UNROLL for (int i = 0; i < mr; i++)
    UNROLL for (int g = 0; g < PAIRS; g++) c->kept[first + i][g] = sums[i][g];
}
#define PANEL(mr)                                                                                                      \
  KERNEL void NAME(panel_##mr)(const NAME(piece) *p, NAME(columns) *c, const task *t, const char *x, int64_t first) {  \
    NAME(panel)(mr, p, c, t, x, first);                                                                                \
  }
PANEL(1)
PANEL(2)
#if NYB_WIDE
PANEL(3)
PANEL(4)
#endif
#undef PANEL
static void (*const NAME(panels)[MOST])(const NAME(piece) *, NAME(columns) *, const task *, const char *, int64_t) = {
    NAME(panel_1), NAME(panel_2),
#if NYB_WIDE
    NAME(panel_3), NAME(panel_4),
#endif
};

/* Elements [at, to) of a window times all rows of x. */
static void NAME(run_piece)(NAME(piece) *p, NAME(columns) *c, const task *t, int64_t at, int64_t to, int64_t next) {
  const int is_mx = t->segment->format == NYB_WEIGHT_MXFP4;
  (is_mx ? NAME(fill_MXFP4) : NAME(fill_NVFP4))(c->is_odd, t, &c->at, at, to, next, p->tile);
  for (int64_t i = 0, mr; i < t->rows; i += mr) {
    mr = NAME(rows_at_once)(t->rows - i);
    NAME(panels)[mr - 1](p, c, t, t->x + at / CHUNK * X_BYTES, i);
  }
}

/* Asks memory for the scales of the window at a row: all are looked at before the first is used. */
static void NAME(ask_scales)(const task *t, int64_t row) {
  const int64_t count = t->k / (t->segment->format == NYB_WEIGHT_NVFP4 ? 16 : 32);
  const char *p = (const char *)t->segment->scale + row * count;
  for (int64_t i = 0; i < 2 * PAIRS * count; i += 64) _mm_prefetch(p + i, _MM_HINT_T1);
}

/* Many rows of x. Where these do not stay in the second cache, a few windows go through K together, so that they share
 * each piece of x that does. */
static void NAME(many_rows)(const task *t) {
  NAME(piece) p;
  NAME(columns) all[WINDOWS];
  const int most = t->rows * t->x_stride > CACHE_BYTES ? WINDOWS : 1;
  for (int64_t row = t->row; row < t->end;) {
    int count = 0;
    for (; count < most && row < t->end; count++) {
      NAME(columns) *c = all + count;
      c->at = next_window(t, &row, 2 * PAIRS);
      c->is_odd = NAME(is_odd)(t, &c->at, 2 * PAIRS);
      NAME(ask_scales)(t, row);
      describe_window(t, &c->at, 2 * PAIRS, c->is_odd, c->scale, c->bias);
    }
    for (int64_t at = 0, to; at < t->k; at = to) {
      to = at + CHUNK * PIECE < t->k ? at + CHUNK * PIECE : t->k;
      p.chunks = (int)((to - at + CHUNK - 1) / CHUNK);
      p.is_first = at == 0;
      p.is_last = to == t->k;
      for (int j = 0; j < count; j++) {
        const int64_t below = 2 * PAIRS * t->segment->row_bytes; /* the next window */
        const int64_t next = j + 1 < count ? below : p.is_last ? below - at / 2 : (to - at) / 2 - j * below;
        NAME(run_piece)(&p, all + j, t, at, to, next);
      }
    }
  }
}

static void NAME(run_blocks)(const task *t) {
  const int is_mx = t->segment->format == NYB_WEIGHT_MXFP4;
  if (t->rows > 2 * MOST) {
    NAME(many_rows)(t);
    return;
  }
  for (int64_t row = t->row; row < t->end;) {
    const window w = next_window(t, &row, 2 * PAIRS);
    const int is_odd = NAME(is_odd)(t, &w, 2 * PAIRS);
    for (int64_t i = 0, mr; i < t->rows; i += mr) {
      mr = t->rows <= MOST_FEW ? t->rows : NAME(rows_at_once)(t->rows - i);
      NAME(few)[is_mx][is_odd][mr - 1](t, &w, t->x + i * t->x_stride, t->y + i * t->n);
    }
  }
}

#undef CONCAT_
#undef CONCAT
#undef NAME
#undef UNROLL
#undef TARGET
#undef VEC
#undef FLT
#undef V
#undef AND
#undef LOAD
#undef AS_FLOAT
#undef AS_BITS
#undef FN
#undef KERNEL
#undef CHUNK
#undef STEPS
#undef X_BYTES
#undef PIECE
#undef PAIRS
#undef MOST
#undef MOST_FEW
#undef PART
#undef NYB_SUFFIX
#undef NYB_WIDE
#undef NYB_INT8
