/* A tile of queries against a segment of the keys, block by block. A row is one query head of one token; rows of a tile
 * are [tokens, query heads of the group]. What a row gets depends on its own range of positions alone: the same
 * operations in the same order whatever else is in the tile. */

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

#if NYB_AVX2
#define TURN 8
FN vf NAME(widened)(const char *p, int64_t d, int is_bf16) {
  if (!is_bf16) return _mm256_loadu_ps((const float *)(const void *)(p + d * 4));
  __m128i half = _mm_loadu_si128((const void *)(p + d * 2));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
FN void NAME(turn)(const char *const *at, int64_t d, int is_bf16, float *out) { /* 8 keys x 8 elements */
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i++) a[i] = NAME(widened)(at[i], d, is_bf16);
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
    _mm256_storeu_ps(out + i * BLOCK, _mm256_permute2f128_ps(a[i], a[4 + i], 0x20));
    _mm256_storeu_ps(out + (4 + i) * BLOCK, _mm256_permute2f128_ps(a[i], a[4 + i], 0x31));
  }
}
#elif !NYB_AVX512
#define TURN 8
FN void NAME(turn)(const char *const *at, int64_t d, int is_bf16, float *out) {
  for (int i = 0; i < TURN; i++) {
    float line[TURN];
    widen(at[i], d, TURN, is_bf16, line);
    for (int k = 0; k < TURN; k++) out[k * BLOCK + i] = line[k];
  }
}
#endif

/* Keys [BLOCK] where at[] points (elements of head_dim) to transposed float32 [head_dim][BLOCK]. */
KERNEL void NAME(transpose)(const char *const *at, int64_t head_dim, int is_bf16, float *out) {
#if NYB_AVX512
  for (int key = 0; key < BLOCK; key += 16) {
    for (int64_t d = 0; d < head_dim; d += is_bf16 ? 32 : 16) transpose_16(at + key, d, head_dim, is_bf16, out + key);
  }
#else
  int64_t whole = head_dim / TURN * TURN;
  for (int key = 0; key < BLOCK; key += TURN) {
    for (int64_t d = 0; d < whole; d += TURN) NAME(turn)(at + key, d, is_bf16, out + d * BLOCK + key);
  }
  for (int key = 0; key < BLOCK; key++) {
    float line[TURN];
    widen(at[key], whole, (int)(head_dim - whole), is_bf16, line);
    for (int64_t d = whole; d < head_dim; d++) out[d * BLOCK + key] = line[d - whole];
  }
#endif
}

/* Values where at[] points to float32 [BLOCK][stride], zeros from head_dim on. Returns whether all are finite. */
KERNEL int NAME(gather)(const char *const *at, int64_t head_dim, int64_t stride, int is_bf16, float *out) {
#if NYB_AVX512
  __m512i most = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const int64_t whole = head_dim / 16 * 16;
  const __mmask16 rest = (__mmask16)((1u << (head_dim - whole)) - 1);
  for (int key = 0; key < BLOCK; key++, out += stride) {
    for (int64_t d = 0; d < stride; d += 16) {
      __m512i x;
      if (is_bf16) {
        const char *p = at[key] + d * 2;
        __m256i half = d < whole ? _mm256_loadu_si256((const void *)p) : _mm256_maskz_loadu_epi16(rest, p);
        x = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
      } else {
        const char *p = at[key] + d * 4;
        x = d < whole ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32(rest, p);
      }
      most = _mm512_max_epi32(most, _mm512_and_si512(x, magnitude));
      _mm512_storeu_si512(out + d, x);
    }
  }
  return _mm512_reduce_max_epi32(most) < 0x7f800000; /* not NaN or infinity */
#else
  uint32_t most = 0;
  for (int key = 0; key < BLOCK; key++, out += stride) {
    widen(at[key], 0, (int)head_dim, is_bf16, out);
    for (int64_t d = head_dim; d < stride; d++) out[d] = 0;
    for (int64_t d = 0; d < head_dim; d++) {
      uint32_t bits;
      memcpy(&bits, out + d, 4);
      bits &= 0x7fffffff;
      most = bits > most ? bits : most;
    }
  }
  return most < 0x7f800000;
#endif
}
#undef TURN

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

/* Rows first .. first + rows - 1 of the tile, at most ROWS, against the block that begins at position `block`. */
FN void NAME(rows_block)(const tile *t, const scratch *s, int first, int rows, int64_t block, float factor) {
  int from[ROWS], to[ROWS], low = BLOCK, high = 0;
  for (int r = 0; r < rows; r++) {
    int64_t at = t->position + (first + r) / t->group; /* of the query; it sees ]at - window, at] */
    int64_t begin = t->window && at - t->window + 1 > block ? at - t->window + 1 - block : 0;
    int64_t end = at + 1 - block < BLOCK ? at + 1 - block : BLOCK;
    from[r] = begin < BLOCK ? (int)begin : BLOCK;
    to[r] = end > 0 ? (int)end : 0;
    if (from[r] >= to[r]) continue;
    low = from[r] < low ? from[r] : low;
    high = to[r] > high ? to[r] : high;
  }
  if (low >= high) return;
  const int offset = low / LANES * LANES, vectors = (high - offset + LANES - 1) / LANES;
  float *scores = s->scores + offset;
  NAME(multiply)(rows, vectors, t->head_dim, s->q + first * t->head_dim, t->head_dim, s->keys + offset, BLOCK, scores,
                 BLOCK, NULL);
  float keep[LANES > ROWS ? LANES : ROWS] = {0};
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
  NAME(multiply)(rows, (int)(t->stride / LANES), high - low, s->scores + low, BLOCK, s->values + low * t->stride,
                 t->stride, s->mixed + first * t->stride, t->stride, keep);
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
  int64_t begin = t->window && t->position - t->window + 1 > 0 ? t->position - t->window + 1 : 0;
  int64_t from = segment * SEGMENT, to = from + SEGMENT < end ? from + SEGMENT : end;
  if (from < begin) from = begin / BLOCK * BLOCK;
  for (int64_t block = from; block < to; block += BLOCK) {
    const char *at[BLOCK];
    find(t, t->keys, block, begin, end, s->nothing, at);
    NAME(transpose)(at, t->head_dim, t->is_bf16, s->keys);
    find(t, t->values, block, begin, end, s->nothing, at);
    /* A weight of 0 hides a position, but not if it is to be multiplied by infinity: then row by row. */
    int step = NAME(gather)(at, t->head_dim, t->stride, t->is_bf16, s->values) ? ROWS : 1;
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
