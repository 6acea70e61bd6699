/* AVX-512: a tile of weight rows times rows of x, four by six sums in registers. Included by avx512.h twice, for BF16
 * and for float operands. */
#if NYB_BF16
#define NAME(x) x##_bf16
#define TARGET WIDE ",avx512bf16"
#define MAC(sum, w, x) _mm512_dpbf16_ps(sum, (__m512bh)(w), (__m512bh)(x))
#else
#define NAME(x) x##_float
#define TARGET WIDE
#define MAC(sum, w, x) _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), sum)
#endif
#define FN static inline __attribute__((always_inline, target(TARGET)))
#define UNROLL _Pragma("GCC unroll 8")
#define KERNEL static UNSCHEDULED __attribute__((target(TARGET)))

/* Plain stores are quicker; only the last tile needs the others. */
FN void NAME(store_4)(float *y, __mmask8 some, int valid, __m128 v) {
  if (valid >= 4) _mm_storeu_ps(y, v);
  else _mm_mask_storeu_ps(y, some, v);
}

/* Sums [mr][nr] times scale plus bias into y. The weight rows are sums' columns; nr is 4 or 6. */
FN void NAME(finish)(const int mr, const int nr, __m512 sums[4][6], const float *scale, const float *bias, int valid,
                     float *y, int64_t n) {
  __m512 q[4], r[2];
  const __m512 zero = _mm512_setzero_ps();
  if (mr == 1) { /* the same additions, with the columns in quarters */
    UNROLL for (int j = 0; j < nr; j += 4) {
      __m512 s = reduce_4(sums[0][j], sums[0][j + 1], j ? zero : sums[0][2], j ? zero : sums[0][3]);
      s = add_pairs(s, s);
      s = _mm512_permutexvar_ps(_mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0), add_singles(s, s));
      __m128 o = _mm_add_ps(_mm_mul_ps(_mm512_castps512_ps128(s), _mm_loadu_ps(scale + j)), _mm_loadu_ps(bias + j));
      int left = valid - j;
      _mm_mask_storeu_ps(y + j, left >= 4 ? 15 : left <= 0 ? 0 : (__mmask8)((1 << left) - 1), o);
    }
    return;
  }
  UNROLL for (int j = 0; j < 4; j++)
    q[j] = reduce_4(sums[0][j], mr > 1 ? sums[1][j] : zero, mr > 2 ? sums[2][j] : zero, mr > 3 ? sums[3][j] : zero);
  /* Quarter i is row i: columns 0..3. */
  __m512 out = add_singles(add_pairs(q[0], q[2]), add_pairs(q[1], q[3]));
  out = _mm512_mul_ps(out, _mm512_broadcast_f32x4(_mm_loadu_ps(scale)));
  out = _mm512_add_ps(out, _mm512_broadcast_f32x4(_mm_loadu_ps(bias)));
  const __mmask8 some = valid >= 4 ? 15 : (__mmask8)((1 << valid) - 1);
  NAME(store_4)(y, some, valid, _mm512_castps512_ps128(out));
  if (mr > 1) NAME(store_4)(y + n, some, valid, _mm512_extractf32x4_ps(out, 1));
  if (mr > 2) NAME(store_4)(y + 2 * n, some, valid, _mm512_extractf32x4_ps(out, 2));
  if (mr > 3) NAME(store_4)(y + 3 * n, some, valid, _mm512_extractf32x4_ps(out, 3));
  if (nr == 4) return;
  UNROLL for (int j = 0; j < 2; j++)
    r[j] = reduce_4(sums[0][4 + j], mr > 1 ? sums[1][4 + j] : zero, mr > 2 ? sums[2][4 + j] : zero,
                    mr > 3 ? sums[3][4 + j] : zero);
  out = add_pairs(r[0], r[0]);
  out = add_singles(out, add_pairs(r[1], r[1]));
  out = _mm512_mul_ps(out, _mm512_broadcast_f32x4(_mm_loadu_ps(scale + 4)));
  out = _mm512_add_ps(out, _mm512_broadcast_f32x4(_mm_loadu_ps(bias + 4)));
  const __mmask8 rest = valid >= 6 ? 3 : valid == 5 ? 1 : 0;
  _mm_mask_storeu_ps(y + 4, rest, _mm512_castps512_ps128(out));
  if (mr > 1) _mm_mask_storeu_ps(y + n + 4, rest, _mm512_extractf32x4_ps(out, 1));
  if (mr > 2) _mm_mask_storeu_ps(y + 2 * n + 4, rest, _mm512_extractf32x4_ps(out, 2));
  if (mr > 3) _mm_mask_storeu_ps(y + 3 * n + 4, rest, _mm512_extractf32x4_ps(out, 3));
}

/* One step: 64 bytes of six weight rows and of mr rows of x. */
FN void NAME(step)(const int mr, __m512 sums[4][6], const char *tile, const char *x, int64_t x_stride) {
  __m512i w[6];
  UNROLL for (int j = 0; j < 6; j++) w[j] = _mm512_load_si512(tile + j * TILE_STRIDE);
  UNROLL for (int i = 0; i < mr; i++) {
    __m512i v = _mm512_load_si512(x + i * x_stride);
    UNROLL for (int j = 0; j < 6; j++) sums[i][j] = MAC(sums[i][j], w[j], v);
  }
}

FN void NAME(panel)(const int mr, const int is_scaled, const product *p, int64_t row) {
  __m512 sums[4][6];
  const char *x = p->x + row * p->x_stride;
  float *kept = p->sums + row * TILE_ROWS * 16;
  UNROLL for (int i = 0; i < mr; i++)
    UNROLL for (int j = 0; j < 6; j++)
      sums[i][j] = p->is_first ? _mm512_setzero_ps() : _mm512_load_ps(kept + (i * TILE_ROWS + j) * 16);
  if (!is_scaled) {
    for (int64_t at = 0; at < p->bytes; at += 64) NAME(step)(mr, sums, p->tile + at, x + at, p->x_stride);
  } else {
    for (int64_t at = 0, b = 0; at < p->bytes; b++) {
      __m512 part[4][6];
      UNROLL for (int i = 0; i < mr; i++)
        UNROLL for (int j = 0; j < 6; j++) part[i][j] = _mm512_setzero_ps();
      int64_t end = at + 2 * SCALE_BLOCK < p->bytes ? at + 2 * SCALE_BLOCK : p->bytes;
      for (; at < end; at += 64) NAME(step)(mr, part, p->tile + at, x + at, p->x_stride);
      UNROLL for (int i = 0; i < mr; i++)
        UNROLL for (int j = 0; j < 6; j++)
          sums[i][j] = _mm512_fmadd_ps(part[i][j], _mm512_set1_ps(p->block_scales[b][j]), sums[i][j]);
    }
  }
  if (p->is_last) {
    NAME(finish)(mr, 6, sums, p->scale, p->bias, p->valid, p->y + row * p->n, p->n);
    return;
  }
  UNROLL for (int i = 0; i < mr; i++)
    UNROLL for (int j = 0; j < 6; j++) _mm512_store_ps(kept + (i * TILE_ROWS + j) * 16, sums[i][j]);
}

KERNEL void NAME(multiply)(const product *p) {
  int64_t i = 0;
#if NYB_BF16
  if (p->block_scales) {
    for (; i + 2 <= p->rows; i += 2) NAME(panel)(2, 1, p, i);
    if (i < p->rows) NAME(panel)(1, 1, p, i);
    return;
  }
#endif
  for (; i + 4 <= p->rows; i += 4) NAME(panel)(4, 0, p, i);
  if (p->rows - i == 3) NAME(panel)(3, 0, p, i);
  else if (p->rows - i == 2) NAME(panel)(2, 0, p, i);
  else if (p->rows - i == 1) NAME(panel)(1, 0, p, i);
}

#if NYB_BF16
/* 64 elements of four weight rows and of mr rows of x. */
FN void few_64(const constants *c, const int format, const int mr, const int is_tail, const uint8_t *codes[4],
               const uint8_t *scales[4], int64_t at, int64_t k, const char *x, int64_t x_stride, __m512 sums[4][6],
               __m512 part[4][6]) {
  const int is_scaled = format == NYB_WEIGHT_FP8_BLOCK;
  const char *v = x + 2 * at;
  UNROLL for (int j = 0; j < 4; j++) {
    __m512i first, second;
    bf16_64(c, format, is_tail, codes[j], scales[j], at, k - at, &first, &second);
    UNROLL for (int i = 0; i < mr; i++) {
      __m512 *sum = is_scaled ? &part[i][j] : &sums[i][j];
      *sum = MAC(*sum, first, _mm512_load_si512(v + i * x_stride));
      *sum = MAC(*sum, second, _mm512_load_si512(v + i * x_stride + 64));
    }
  }
  if (!is_scaled || (!(at & 64) && at + 64 < k)) return;
  UNROLL for (int j = 0; j < 4; j++) {
    __m512 each = _mm512_set1_ps(load_float(scales[j] + at / SCALE_BLOCK * 4));
    UNROLL for (int i = 0; i < mr; i++) {
      sums[i][j] = _mm512_fmadd_ps(part[i][j], each, sums[i][j]);
      part[i][j] = _mm512_setzero_ps();
    }
  }
}

/* Four weight rows, decoded in registers, times mr rows of x. Rows past the end repeat the last one. */
FN void few_rows(const int format, const int mr, const task *t, int64_t row) {
  const nyb_segment *s = t->segment;
  const constants c = load_constants();
  const uint8_t *codes[4], *scales[4];
  float scale[4], bias[4];
  __m512 sums[4][6], part[4][6];
  UNROLL for (int j = 0; j < 4; j++) {
    int64_t r = row + j < t->end ? row + j : t->end - 1;
    codes[j] = s->codes + r * s->row_bytes;
    scales[j] = row_scales(s, r, t->k);
    scale[j] = row_scale(s, r);
    bias[j] = row_bias(s, r);
    UNROLL for (int i = 0; i < mr; i++) sums[i][j] = part[i][j] = _mm512_setzero_ps();
  }
  const int width = format == NYB_WEIGHT_BF16 ? 2 : 1;
  const int64_t row_length = t->k * width, next = 4 * s->row_bytes - row_length;
  int64_t at = 0;
  for (; at + 64 <= t->k; at += 64) {
    const int64_t soon = at * width + 2 * AHEAD / width, ahead = soon + (soon < row_length ? 0 : next);
    UNROLL for (int j = 0; j < 4; j++) {
      _mm_prefetch((const char *)codes[j] + ahead, _MM_HINT_T1);
      if (width == 2) _mm_prefetch((const char *)codes[j] + ahead + 64, _MM_HINT_T1);
    }
    few_64(&c, format, mr, 0, codes, scales, at, t->k, t->x, t->x_stride, sums, part);
  }
  if (at < t->k) few_64(&c, format, mr, 1, codes, scales, at, t->k, t->x, t->x_stride, sums, part);
  NAME(finish)(mr, 4, sums, scale, bias, t->end - row < 4 ? (int)(t->end - row) : 4, t->y + row, t->n);
}

#define FEW_ROWS(format)                                                                                               \
  KERNEL void few_##format(const task *t) {                                                                            \
    for (int64_t row = t->row; row < t->end; row += 4) switch (t->rows) {                                              \
        case 1: few_rows(format, 1, t, row); break;                                                                    \
        case 2: few_rows(format, 2, t, row); break;                                                                    \
        case 3: few_rows(format, 3, t, row); break;                                                                    \
        default: few_rows(format, 4, t, row);                                                                          \
      }                                                                                                                \
  }
FEW_ROWS(NYB_WEIGHT_FP8)
FEW_ROWS(NYB_WEIGHT_FP8_BLOCK)
FEW_ROWS(NYB_WEIGHT_BF16)
#undef FEW_ROWS

static void few_avx512(const task *t) {
  switch (t->segment->format) {
    case NYB_WEIGHT_FP8_BLOCK: few_NYB_WEIGHT_FP8_BLOCK(t); break;
    case NYB_WEIGHT_BF16: few_NYB_WEIGHT_BF16(t); break;
    default: few_NYB_WEIGHT_FP8(t);
  }
}
#endif
#undef FN
#undef NAME
#undef TARGET
#undef MAC
#undef UNROLL
#undef KERNEL
