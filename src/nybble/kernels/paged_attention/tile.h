/* A tile of queries against a segment of the keys, block by block. A row is one query head of one token; rows of a tile
 * are [tokens, query heads of the group]. What a row gets depends on its own range of positions alone: the same
 * operations in the same order whatever else is in the tile. */
#include "lanes.h"

/* c[r][..] = (keep ? c[r][..] * keep[r] : 0) + the sum over i < depth of a[r][i] * b[i][..], in order of i. */
FN void NAME(multiply_panel)(const int rows, const int vectors, int64_t depth, const float *a, int64_t a_stride,
                             const float *b, int64_t b_stride, float *c, int64_t c_stride, const float *keep) {
  vf sum[ROWS][VECTORS];
  _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {
    _Pragma("GCC unroll 8") for (int v = 0; v < vectors; v++) {
      sum[r][v] = NAME(all)(0);
      if (keep) sum[r][v] = NAME(mul)(NAME(load)(c + r * c_stride + v * LANES), NAME(all)(keep[r]));
    }
  }
  for (int64_t i = 0; i < depth; i++) {
    vf line[VECTORS];
    _Pragma("GCC unroll 8") for (int v = 0; v < vectors; v++) line[v] = NAME(load)(b + i * b_stride + v * LANES);
    _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {
      /* One broadcast at a time: with all of them loaded first, accumulators go to the stack. */
      __asm__ volatile("" ::: "memory");
      vf x = NAME(all)(a[r * a_stride + i]);
      _Pragma("GCC unroll 8") for (int v = 0; v < vectors; v++) sum[r][v] = NAME(fma)(x, line[v], sum[r][v]);
    }
  }
  _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {
    _Pragma("GCC unroll 8") for (int v = 0; v < vectors; v++) NAME(store)(c + r * c_stride + v * LANES, sum[r][v]);
  }
}

#define PANEL(r, v) \
  case (r) * 8 + (v): NAME(multiply_panel)(r, v, depth, a, a_stride, b, b_stride, c, c_stride, keep); break;
#if VECTORS == 4
#define PANELS(r) PANEL(r, 1) PANEL(r, 2) PANEL(r, 3) PANEL(r, 4)
#else
#define PANELS(r) PANEL(r, 1) PANEL(r, 2)
#endif

KERNEL void NAME(multiply)(int rows, int vectors, int64_t depth, const float *a, int64_t a_stride, const float *b,
                           int64_t b_stride, float *c, int64_t c_stride, const float *keep) {
  for (; vectors > 0; vectors -= VECTORS, b += VECTORS * LANES, c += VECTORS * LANES) {
    switch (rows * 8 + (vectors < VECTORS ? vectors : VECTORS)) {
      PANELS(1) PANELS(2) PANELS(3) PANELS(4)
#if ROWS == 6
      PANELS(5) PANELS(6)
#endif
      default: break;
    }
  }
}
#undef PANEL
#undef PANELS

/* LANES elements from index d on, as float32; E4M3 without its scale. */
#if NYB_AVX512
FN vf NAME(widened)(const char *p, int64_t d, const int format) {
  __m256i half;
  if (format == NYB_PAGES_F32) return _mm512_loadu_ps(p + d * 4);
  if (format == NYB_PAGES_BF16) half = _mm256_loadu_si256((const void *)(p + d * 2));
  else half = bf16_of_16_codes(_mm_loadu_si128((const void *)(p + d)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
#elif NYB_AVX2
FN vf NAME(widened)(const char *p, int64_t d, const int format) {
  if (format == NYB_PAGES_F32) return _mm256_loadu_ps((const float *)(const void *)(p + d * 4));
  if (format == NYB_PAGES_BF16) {
    __m128i half = _mm_loadu_si128((const void *)(p + d * 2));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  const __m256i x = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(p + d)));
  const __m256i magnitude = _mm256_and_si256(x, _mm256_set1_epi32(0x7f));
  const __m256i normal = _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23));
  const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(0x1p-9f)); /* a subnormal code */
  const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude);
  const __m256i is_nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f));
  const __m256i other = _mm256_or_si256(_mm256_and_si256(x, _mm256_set1_epi32((int)0x80000000)),
                                        _mm256_and_si256(is_nan, _mm256_set1_epi32(0x7fc00000)));
  const __m256 found = _mm256_blendv_ps(_mm256_castsi256_ps(normal), small, _mm256_castsi256_ps(is_small));
  return _mm256_or_ps(found, _mm256_castsi256_ps(other));
}
#else
FN vf NAME(widened)(const char *p, int64_t d, const int format) {
  float line[LANES];
  widen(p, d, LANES, format, line);
  return NAME(load)(line);
}
#endif

/* The same for several vectors; E4M3 codes by 32 where that is possible. */
FN void NAME(line)(const char *p, int64_t d, const int vectors, const int format, vf *out) {
  int v = 0;
#if NYB_AVX512
  for (; format == NYB_PAGES_E4M3 && v + 2 <= vectors; v += 2) {
    const __m512i half = bf16_of_codes(_mm256_loadu_si256((const void *)(p + d + v * LANES)));
    const __m256i low = _mm512_castsi512_si256(half), high = _mm512_extracti64x4_epi64(half, 1);
    out[v] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16));
    out[v + 1] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }
#endif
  _Pragma("GCC unroll 8") for (; v < vectors; v++) out[v] = NAME(widened)(p, d + v * LANES, format);
}

#if NYB_AVX2
#define TURN 8
FN void NAME(turn)(const char *const *at, int64_t d, const int format, float *out, int64_t width) { /* 8 x 8 */
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i++) a[i] = NAME(widened)(at[i], d, format);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(out + i * width, _mm256_permute2f128_ps(a[i], a[4 + i], 0x20));
    _mm256_storeu_ps(out + (4 + i) * width, _mm256_permute2f128_ps(a[i], a[4 + i], 0x31));
  }
}
#elif !NYB_AVX512
#define TURN 8
FN void NAME(turn)(const char *const *at, int64_t d, const int format, float *out, int64_t width) {
  for (int i = 0; i < TURN; i++) {
    float line[TURN];
    widen(at[i], d, TURN, format, line);
    for (int k = 0; k < TURN; k++) out[k * width + i] = line[k];
  }
}
#endif

/* 16 keys where at[] points (elements of head_dim) to float32 out[head_dim][width], of which they are 16 columns. */
FN void NAME(transpose_of)(const char *const *at, int64_t head_dim, float *out, int64_t width, const int format) {
#if NYB_AVX512
  for (int64_t d = 0; d < head_dim; d += format == NYB_PAGES_F32 ? 16 : 32) {
    transpose_16(at, d, head_dim, format, out, width);
  }
#else
  int64_t whole = head_dim / TURN * TURN;
  for (int key = 0; key < 16; key += TURN) {
    for (int64_t d = 0; d < whole; d += TURN) NAME(turn)(at + key, d, format, out + d * width + key, width);
  }
  for (int key = 0; whole < head_dim && key < 16; key++) {
    float line[TURN] = {0};
    widen(at[key], whole, (int)(head_dim - whole), format, line);
    for (int64_t d = whole; d < head_dim; d++) out[d * width + key] = line[d - whole];
  }
#endif
}
#undef TURN

#define BY_FORMAT(function, format, ...)                                                 \
  ((format) == NYB_PAGES_BF16   ? NAME(function)(__VA_ARGS__, NYB_PAGES_BF16)            \
   : (format) == NYB_PAGES_E4M3 ? NAME(function)(__VA_ARGS__, NYB_PAGES_E4M3)            \
                                : NAME(function)(__VA_ARGS__, NYB_PAGES_F32))

/* Values first .. end - 1 of the block where at[] points to float32 [BLOCK][stride], zeros from head_dim on. Returns
 * whether all are finite. */
FN int NAME(gather_of)(const char *const *at, int first, int end, int64_t head_dim, int64_t stride, float *out,
                       const int format) {
  const int64_t whole = head_dim / LANES * LANES;
  uint32_t most = 0;
#if NYB_AVX512
  __m512i widest = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
#endif
  for (int key = first; key < end; key++) {
    float *line = out + key * stride;
    for (int64_t d = 0; d < whole; d += 2 * LANES) {
      vf x[2];
      const int vectors = d + LANES < whole ? 2 : 1;
      if (vectors == 2) NAME(line)(at[key], d, 2, format, x);
      else x[0] = NAME(widened)(at[key], d, format);
      for (int v = 0; v < vectors; v++) {
        NAME(store)(line + d + v * LANES, x[v]);
#if NYB_AVX512
        widest = _mm512_max_epi32(widest, _mm512_and_si512(_mm512_castps_si512(x[v]), magnitude));
#endif
      }
    }
    widen(at[key], whole, (int)(head_dim - whole), format, line + whole);
    for (int64_t d = head_dim; d < stride; d++) line[d] = 0;
    for (int64_t d = NYB_AVX512 ? whole : 0; d < head_dim; d++) {
      uint32_t bits;
      memcpy(&bits, line + d, 4);
      bits &= 0x7fffffff;
      most = bits > most ? bits : most;
    }
  }
#if NYB_AVX512
  if (_mm512_reduce_max_epi32(widest) >= 0x7f800000) return 0; /* NaN or infinity */
#endif
  return most < 0x7f800000;
}

KERNEL int NAME(gather)(const tile *t, const char *const *at, int first, int end, float *out) {
  return BY_FORMAT(gather_of, t->format, at, first, end, t->head_dim, t->stride, out);
}

/* Keys from .. from + width - 1 of a block, as far as any sixteen is seen, to out[head_dim][width]; meanwhile asks for
 * `rows` rows with each sixteen. */
KERNEL void NAME(transpose)(const tile *t, const places *now, int from, int width, float *out, asking *next, int rows) {
  for (int key = from; key < from + width && key < now->high; key += 16) {
    if (key + 16 <= now->low) continue;
    ask(next, rows);
    BY_FORMAT(transpose_of, t->format, now->keys + key, t->head_dim, out + key - from, width);
  }
}

/* Asks for `vectors` vectors of a row from element d on. */
FN void NAME(ask_line)(const char *p, int64_t d, const int vectors, const int format) {
  const int64_t bytes = format == NYB_PAGES_F32 ? 4 : format == NYB_PAGES_BF16 ? 2 : 1;
  for (int64_t i = 0; i < vectors * LANES * bytes; i += 64) __builtin_prefetch(p + d * bytes + i, 0, 3);
}

/* c[r][..] = c[r][..] * keep[r] + the sum over i < depth of a[r][i] * the values at[i][d ..], in order of i; meanwhile
 * asks for those at ahead[i], if that is not NULL. */
FN void NAME(mix_panel)(const int rows, const int vectors, int64_t depth, const float *a, const char *const *at,
                        const char *const *ahead, int64_t d, float *c, int64_t c_stride, const float *keep,
                        const int format) {
  vf sum[ROWS][VECTORS];
  _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {
    _Pragma("GCC unroll 8") for (int v = 0; v < vectors; v++) {
      sum[r][v] = NAME(mul)(NAME(load)(c + r * c_stride + v * LANES), NAME(all)(keep[r]));
    }
  }
  for (int64_t i = 0; i < depth; i++) {
    vf line[VECTORS];
    NAME(line)(at[i], d, vectors, format, line);
    if (ahead) NAME(ask_line)(ahead[i], d, vectors, format);
    _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {
      __asm__ volatile("" ::: "memory"); /* as above */
      vf x = NAME(all)(a[r * BLOCK + i]);
      _Pragma("GCC unroll 8") for (int v = 0; v < vectors; v++) sum[r][v] = NAME(fma)(x, line[v], sum[r][v]);
    }
  }
  _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {
    _Pragma("GCC unroll 8") for (int v = 0; v < vectors; v++) NAME(store)(c + r * c_stride + v * LANES, sum[r][v]);
  }
}

#define PANEL(r) \
  case r: if (all) NAME(mix_panel)(r, VECTORS, depth, a, at, ahead, d, c, c_stride, keep, format); \
          else NAME(mix_panel)(r, 1, depth, a, at, ahead, d, c, c_stride, keep, format); \
          break;
FN void NAME(mix_of)(int rows, int vectors, int64_t depth, const float *a, const char *const *at,
                     const char *const *ahead, int64_t d, float *c, int64_t c_stride, const float *keep,
                     const int format) {
  const int all = vectors == VECTORS;
  for (int v = 0; v < vectors; v += all ? VECTORS : 1, d += LANES, c += LANES) {
    switch (rows) {
      PANEL(1) PANEL(2) PANEL(3) PANEL(4)
#if ROWS == 6
      PANEL(5) PANEL(6)
#endif
      default: break;
    }
  }
}
#undef PANEL

/* Scores of one row to weights 2^(score * factor - largest), in place; *largest grows to the largest score * factor.
 * With is_whole 0 only positions first .. end - 1 are seen, and the others get 0. Sums stay apart by lane of the block,
 * to be added up when the segment ends. */
FN void NAME(weigh)(float *scores, const int vectors, const int is_whole, int first, int end, float factor,
                    float *largest, vf *sum) {
  vf best = NAME(all)(-INFINITY);
  for (int v = 0; v < vectors; v++) {
    vf s = NAME(load)(scores + v * LANES);
    if (!is_whole) {
      s = NAME(only)(s, first - v * LANES, end - v * LANES);
      NAME(store)(scores + v * LANES, s);
    }
    best = NAME(max)(s, best);
  }
  float found = NAME(largest)(best) * factor;
  *largest = found > *largest ? found : *largest;
  vf base = NAME(all)(-*largest), scale = NAME(all)(factor);
  for (int v = 0; v < vectors; v++) {
    vf p = NAME(power_of_two)(NAME(fma)(NAME(load)(scores + v * LANES), scale, base));
    NAME(store)(scores + v * LANES, p);
    *sum = NAME(add)(*sum, p);
  }
}

FN float NAME(power_of_two_of)(float x) {
  float lanes[LANES];
  NAME(store)(lanes, NAME(power_of_two)(NAME(all)(x)));
  return lanes[0];
}

/* Scores of rows first .. first + rows - 1, at most ROWS, at scores + offset [rows][BLOCK], to weights, and their sums.
 * Row r sees from[r] .. to[r] - 1 of the block. keep[] is what the earlier sums are worth beside these. */
FN void NAME(weigh_rows)(const scratch *s, int first, int rows, const int *from, const int *to, int offset, int vectors,
                         float factor, float *scores, float *keep) {
  vf added[ROWS];
  for (int r = 0; r < rows; r++) {
    float *largest = s->largest + first + r, before = *largest, *row = scores + r * BLOCK;
    added[r] = NAME(all)(0);
    if (from[r] >= to[r]) { /* seen by a neighbour alone */
      memset(row, 0, (size_t)vectors * LANES * sizeof(float));
      continue;
    }
    if (from[r] == 0 && to[r] == BLOCK) NAME(weigh)(row, BLOCK / LANES, 1, 0, BLOCK, factor, largest, &added[r]);
    else NAME(weigh)(row, vectors, 0, from[r] - offset, to[r] - offset, factor, largest, &added[r]);
    keep[r] = before - *largest;
  }
  NAME(store)(keep, NAME(power_of_two)(NAME(load)(keep)));
  for (int r = 0; r < rows; r++) {
    float *sum = s->sums + (first + r) * 16;
    NAME(store)(sum, NAME(fma)(NAME(load)(sum), NAME(all)(keep[r]), added[r]));
  }
}

/* Rows first .. first + rows - 1 of the tile, at most ROWS, against the block that begins at position `block`. */
FN void NAME(rows_block)(const tile *t, const scratch *s, int first, int rows, int64_t block, float factor) {
  int from[ROWS], to[ROWS], low = BLOCK, high = 0;
  for (int r = 0; r < rows; r++) {
    int64_t at = t->position + (first + r) / t->group, low_seen = seen_from(t, at); /* at: of the query */
    int64_t begin = low_seen > block ? low_seen - block : 0;
    int64_t end = at + 1 - block < BLOCK ? at + 1 - block : BLOCK;
    from[r] = begin < BLOCK ? (int)begin : BLOCK;
    to[r] = end > 0 ? (int)end : 0;
    if (from[r] >= to[r]) continue;
    low = from[r] < low ? from[r] : low;
    high = to[r] > high ? to[r] : high;
  }
  if (low >= high) return;
  const int offset = low / LANES * LANES, vectors = (high - offset + LANES - 1) / LANES;
  float *scores = s->scores + offset, keep[KEEP] = {0};
  NAME(multiply)(rows, vectors, t->head_dim, s->q + first * t->head_dim, t->head_dim, s->keys + offset, BLOCK, scores,
                 BLOCK, NULL);
  NAME(weigh_rows)(s, first, rows, from, to, offset, vectors, factor, scores, keep);
  NAME(multiply)(rows, (int)(t->stride / LANES), high - low, s->scores + low, BLOCK, s->values + low * t->stride,
                 t->stride, s->mixed + first * t->stride, t->stride, keep);
}

/* Elements d .. of E4M3 values as float32 [count][vectors * LANES]. */
KERNEL void NAME(widen_values)(const char *const *at, const char *const *ahead, int count, int64_t d, int vectors,
                               float *out) {
  for (int i = 0; i < count; i++, out += vectors * LANES) {
    if (ahead) NAME(ask_line)(ahead[i], d, vectors, NYB_PAGES_E4M3);
    vf line[VECTORS];
    if (vectors == VECTORS) NAME(line)(at[i], d, VECTORS, NYB_PAGES_E4M3, line);
    else for (int v = 0; v < vectors; v++) line[v] = NAME(widened)(at[i], d + v * LANES, NYB_PAGES_E4M3);
    for (int v = 0; v < vectors; v++) NAME(store)(out + v * LANES, line[v]);
  }
}

/* Scores of a tile of one token with a block. */
FN void NAME(token_scores)(const tile *t, const scratch *s, int step, const places *now, asking *next) {
  const int width = t->head_dim > 128 ? BLOCK / 2 : BLOCK; /* a panel of keys is to stay in the cache */
  const int share = BLOCK / (BLOCK / 16 + BLOCK / width * ((t->group + step - 1) / step)) + 1; /* asked for at a time */
  for (int from = 0; from < now->high; from += width) {
    if (from + width <= now->low) continue;
    NAME(transpose)(t, now, from, width, s->keys, next, share);
    const int low = now->low > from ? now->low - from : 0, high = now->high - from < width ? now->high - from : width;
    const int offset = low / LANES * LANES, vectors = (high - offset + LANES - 1) / LANES;
    for (int first = 0; first < t->group; first += step) {
      int rows = t->group - first < step ? t->group - first : step;
      ask(next, share);
      NAME(multiply)(rows, vectors, t->head_dim, s->q + first * t->head_dim, t->head_dim, s->keys + offset, width,
                     s->scores + first * BLOCK + from + offset, BLOCK, NULL);
    }
  }
}

/* Values of a block by their weights, taken where they lie; codes, which are dear, are widened once for all rows. */
FN void NAME(token_mix)(const tile *t, const scratch *s, int step, const places *now, const places *next,
                        const float *keep) {
  const int count = now->high - now->low, is_kept = t->format == NYB_PAGES_E4M3 && t->group > ROWS;
  const char *const *at = now->values + now->low, *const *ahead = next ? next->values : NULL;
  for (int64_t d = 0; d < t->head_dim; d += VECTORS * LANES) {
    const int64_t left = (t->head_dim - d) / LANES;
    const int vectors = left < VECTORS ? (int)left : VECTORS;
    if (is_kept) NAME(widen_values)(at, ahead, count, d, vectors, s->values);
    for (int first = 0; first < t->group; first += step) {
      int rows = t->group - first < step ? t->group - first : step;
      float *mixed = s->mixed + first * t->stride + d, *weights = s->scores + first * BLOCK + now->low;
      if (is_kept) {
        NAME(multiply)(rows, vectors, count, weights, BLOCK, s->values, vectors * LANES, mixed, t->stride,
                       keep + first);
      } else {
        BY_FORMAT(mix_of, t->format, rows, vectors, count, weights, at, first ? NULL : ahead, d, mixed, t->stride,
                  keep + first);
      }
    }
  }
}

/* A tile of one token against a block: all its rows see the same positions. The same operations in the same order as
 * above. */
FN void NAME(token_block)(const tile *t, const scratch *s, const places *now, const places *next, float factor) {
  const int steps = (t->group + ROWS - 1) / ROWS, step = (t->group + steps - 1) / steps;
  asking keys = {next ? next->keys : NULL, 0, next ? next->high : 0, t->head_dim * bytes_of(t->format)};
  NAME(token_scores)(t, s, step, now, &keys);
  const int offset = now->low / LANES * LANES, vectors = (now->high - offset + LANES - 1) / LANES;
  float keep[TOKEN_ROWS + KEEP];
  for (int first = 0; first < t->group; first += step) {
    int rows = t->group - first < step ? t->group - first : step, from[ROWS], to[ROWS];
    for (int r = 0; r < rows; r++) from[r] = now->low, to[r] = now->high;
    memset(keep + first, 0, KEEP * sizeof(float));
    NAME(weigh_rows)(s, first, rows, from, to, offset, vectors, factor, s->scores + first * BLOCK + offset,
                     keep + first);
  }
  NAME(token_mix)(t, s, step, now, next, keep);
}

/* The tile against the positions of one segment: s->mixed, s->largest and s->sum, unnormalised. */
KERNEL void NAME(tile_segment)(const tile *t, const scratch *s, int64_t segment, float factor) {
  int rows = t->tokens * t->group;
  memset(s->mixed, 0, (size_t)(rows * t->stride) * sizeof(float));
  for (int r = 0; r < rows; r++) {
    s->largest[r] = -INFINITY;
    NAME(store)(s->sums + r * 16, NAME(all)(0));
  }
  int64_t end = t->position + t->tokens; /* what the last query sees */
  int64_t begin = seen_from(t, t->position);
  int64_t from = segment * SEGMENT, to = from + SEGMENT < end ? from + SEGMENT : end;
  if (from < begin) from = begin / BLOCK * BLOCK;
  const int64_t bytes = t->head_dim * bytes_of(t->format), ahead = t->split < 0 ? end : to;
  places p[2]; /* of this block and the next */
  look_up(t, from, begin, end, s->nothing, &p[0]);
  ask(&(asking){p[0].keys, p[0].low, p[0].high, bytes}, BLOCK);
  ask(&(asking){p[0].values, p[0].low, p[0].high, bytes}, BLOCK);
  int which = 0;
  for (int64_t block = from; block < to; block += BLOCK, which ^= 1) {
    const places *now = &p[which], *next = NULL;
    if (block + BLOCK < ahead) {
      look_up(t, block + BLOCK, begin, end, s->nothing, &p[which ^ 1]);
      next = &p[which ^ 1];
    }
    if (t->tokens == 1 && t->group <= TOKEN_ROWS && t->head_dim % LANES == 0) {
      NAME(token_block)(t, s, now, next, factor);
      continue;
    }
    asking keys = {next ? next->keys : NULL, 0, next ? next->high : 0, bytes}, values = keys;
    NAME(transpose)(t, now, 0, BLOCK, s->keys, &keys, 16);
    if (next) values.at = next->values;
    ask(&values, BLOCK);
    /* A weight of 0 hides a position, but not if it is to be multiplied by infinity: then row by row. */
    int step = NAME(gather)(t, now->values, now->low, now->high, s->values) ? ROWS : 1;
    for (int first = 0; first < rows; first += step) {
      NAME(rows_block)(t, s, first, rows - first < step ? rows - first : step, block, factor);
    }
  }
  for (int r = 0; r < rows; r++) s->sum[r] = NAME(total)(NAME(load)(s->sums + r * 16));
}

/* Adds a segment's row to the sum of those before it. */
KERNEL void NAME(merge)(int64_t stride, float *total, float *total_largest, float *total_sum, const float *mixed,
                        float largest, float sum) {
  if (largest == -INFINITY && sum == 0) return; /* saw nothing of the segment */
  if (*total_largest == -INFINITY && *total_sum == 0) {
    memcpy(total, mixed, (size_t)stride * sizeof(float));
    *total_largest = largest;
    *total_sum = sum;
    return;
  }
  float most = largest > *total_largest ? largest : *total_largest;
  float ours = NAME(power_of_two_of)(*total_largest - most), theirs = NAME(power_of_two_of)(largest - most);
  for (int64_t d = 0; d < stride; d += LANES) {
    vf sum_of = NAME(mul)(NAME(load)(total + d), NAME(all)(ours));
    NAME(store)(total + d, NAME(fma)(NAME(load)(mixed + d), NAME(all)(theirs), sum_of));
  }
  *total_sum = *total_sum * ours + sum * theirs;
  *total_largest = most;
}
