/* The gated delta rule and the causal convolution for one instruction set: see ../elementwise/floats.h. */
#include "../elementwise/floats.h"

/* Registers: a tile holds TILE_ROWS x TILE_VECTORS sums, a token 2 x TOKEN_VECTORS. */
#if NYB_AVX512
#define TILE_ROWS 4
#define TILE_VECTORS 4
#define TOKEN_VECTORS 8
#else
#define TILE_ROWS 4
#define TILE_VECTORS 2
#define TOKEN_VECTORS 4
#endif

/* ---------------------------------------------------------------- a small matrix product */

/* c [rows, vectors] (+)= a b: rows of a are `a_row` apart and its columns `a_step`, so a may be a transposed matrix.
 * Every output is one chain of multiply-adds in the order of the inner dimension, whatever the tile it falls in. */
FN void NAME(tile)(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_row, int64_t inner,
                   float *c, int64_t c_row, int rows, int vectors, int last, int is_sum) {
  vf sum[TILE_ROWS][TILE_VECTORS];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) {
      const float *from = c + r * c_row + v * LANES;
      sum[r][v] = !is_sum ? v_all(0) : v == vectors - 1 && last < LANES ? v_load_some(from, last) : v_load(from);
    }
  for (int64_t k = 0; k < inner; k++) {
    vf row[TILE_VECTORS];
    for (int v = 0; v < vectors; v++) {
      const float *from = b + k * b_row + v * LANES;
      row[v] = v == vectors - 1 && last < LANES ? v_load_some(from, last) : v_load(from);
    }
    for (int r = 0; r < rows; r++) {
      vf one = v_all(a[r * a_row + k * a_step]);
      for (int v = 0; v < vectors; v++) sum[r][v] = v_fma(one, row[v], sum[r][v]);
    }
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) {
      float *to = c + r * c_row + v * LANES;
      if (v == vectors - 1 && last < LANES) v_store_some(to, sum[r][v], last);
      else v_store(to, sum[r][v]);
    }
}

/* The same for any number of rows and columns; columns outside, so that their strip of b stays in the first cache. */
KERNEL void NAME(product)(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_row, int64_t inner,
                          float *c, int64_t c_row, int64_t rows, int64_t columns, int is_sum) {
#define TILE(r, v, last) NAME(tile)(at, a_row, a_step, b + x, b_row, inner, to, c_row, r, v, last, is_sum)
  for (int64_t x = 0; x < columns;) {
    int64_t left = columns - x;
    int vectors = left >= TILE_VECTORS * LANES ? TILE_VECTORS : left >= 2 * LANES ? 2 : 1;
    int last = left < LANES ? (int)left : LANES;
    for (int64_t y = 0; y < rows;) {
      const float *at = a + y * a_row;
      float *to = c + y * c_row + x;
      if (rows - y >= TILE_ROWS) {
        if (vectors == TILE_VECTORS) TILE(TILE_ROWS, TILE_VECTORS, LANES);
        else if (vectors == 2) TILE(TILE_ROWS, 2, LANES);
        else TILE(TILE_ROWS, 1, last);
        y += TILE_ROWS;
      } else {
        if (vectors == TILE_VECTORS) TILE(1, TILE_VECTORS, LANES);
        else if (vectors == 2) TILE(1, 2, LANES);
        else TILE(1, 1, last);
        y++;
      }
    }
    x += vectors * LANES;
  }
#undef TILE
}

/* ---------------------------------------------------------------- rows */

#define LEFT(at, n) ((n) - (at) < LANES ? (int)((n) - (at)) : LANES)
#define EACH(i, n) for (int64_t i = 0, some; i < (n) && (some = LEFT(i, n), 1); i += LANES)

/* y = x * scale. */
FN void NAME(scale_row)(const float *x, float scale, float *y, int64_t n) {
  EACH(i, n) v_store_some(y + i, v_load_some(x + i, (int)some) * v_all(scale), (int)some);
}

/* y += x * scale. */
FN void NAME(add_row)(const float *x, float scale, float *y, int64_t n) {
  EACH(i, n) {
    vf sum = v_fma(v_load_some(x + i, (int)some), v_all(scale), v_load_some(y + i, (int)some));
    v_store_some(y + i, sum, (int)some);
  }
}

/* y = x * scale / |x|, with 1e-6 under the root. */
FN void NAME(unit_row)(const float *x, float scale, float *y, int64_t n) {
  vf sum = v_all(0);
  EACH(i, n) {
    vf v = v_load_some(x + i, (int)some);
    sum = v_fma(v, v, sum);
  }
  NAME(scale_row)(x, scale / sqrtf(v_sum(sum) + L2_EPS), y, n);
}

/* ---------------------------------------------------------------- one token */

/* S and o for `vectors` vectors of columns: the old state, which may be the same memory, is read twice, and the new one
 * written once, row by row. */
FN void NAME(token_columns)(const float *old, float *state, int64_t dv, int64_t dk, const float *q, const float *k,
                            const float *v, float grow, float beta, float *out, int vectors, int last) {
  vf wrong[TOKEN_VECTORS], sum[TOKEN_VECTORS];
  vf decay = v_all(grow);
#define IN(p, c) ((c) == vectors - 1 && last < LANES ? v_load_some((p) + (c) * LANES, last) : v_load((p) + (c) * LANES))
#define OUT(p, c, x)                                                              \
  if ((c) == vectors - 1 && last < LANES) v_store_some((p) + (c) * LANES, x, last); \
  else v_store((p) + (c) * LANES, x)
  for (int c = 0; c < vectors; c++) wrong[c] = sum[c] = v_all(0);
  for (int64_t d = 0; d < dk; d++) {
    vf key = v_all(k[d]);
    for (int c = 0; c < vectors; c++) wrong[c] = v_fma(IN(old + d * dv, c), key, wrong[c]);
  }
  for (int c = 0; c < vectors; c++) wrong[c] = (IN(v, c) - wrong[c] * decay) * v_all(beta);
  for (int64_t d = 0; d < dk; d++) {
    vf key = v_all(k[d]), query = v_all(q[d]);
    for (int c = 0; c < vectors; c++) {
      vf s = v_fma(key, wrong[c], IN(old + d * dv, c) * decay);
      OUT(state + d * dv, c, s);
      sum[c] = v_fma(s, query, sum[c]);
    }
  }
  for (int c = 0; c < vectors; c++) {
    OUT(out, c, sum[c]);
  }
#undef IN
#undef OUT
}

/* Tokens [from, to) one by one, from the old state, which may be the same memory, to the new one. */
KERNEL void NAME(recurrent)(const delta_job *j, float *scratch, const float *old, float *state, int64_t head,
                            int64_t from, int64_t to) {
  int64_t dk = j->key_dim, dv = j->value_dim;
  float *q = scratch, *k = scratch + dk;
  for (int64_t t = from; t < to; t++, old = state) {
    NAME(unit_row)(query_of(j, t, head), j->scale, q, dk);
    NAME(unit_row)(key_of(j, t, head), 1.0f, k, dk);
    const float *v = value_of(j, t, head);
    float *out = j->out + (t * j->value_heads + head) * dv;
    float grow = expf(j->g[t * j->value_heads + head]), beta = j->beta[t * j->value_heads + head];
#define COLUMNS(n, last) \
  NAME(token_columns)(old + x, state + x, dv, dk, q, k, v + x, grow, beta, out + x, n, last)
    for (int64_t x = 0; x < dv;) {
      int64_t left = dv - x;
      if (left >= TOKEN_VECTORS * LANES) {
        COLUMNS(TOKEN_VECTORS, LANES);
        x += TOKEN_VECTORS * LANES;
      } else if (left >= 4 * LANES) {
        COLUMNS(4, LANES);
        x += 4 * LANES;
      } else {
        COLUMNS(1, LEFT(x, dv));
        x += LANES;
      }
    }
#undef COLUMNS
  }
}

/* ---------------------------------------------------------------- one chunk */

/* row[j] *= scale * exp(G_i - G_j) for j <= i, and 0 from there to `until`. G is a sum of two floats: the difference
 * of two large sums would lose what tokens next to each other differ by. Lanes with j > i may overflow: those before
 * `until` are zeroed, and nobody reads on. */
FN void NAME(decay_row)(float *row, float scale, const float *high, const float *low, int64_t i, int64_t until) {
  vf a = v_all(high[i]), b = v_all(low[i]), factor = v_all(scale);
  for (int64_t j = 0; j <= i; j += LANES) {
    vf gap = (a - v_load(high + j)) + (b - v_load(low + j));
    v_store(row + j, v_load(row + j) * (factor * v_exp(gap)));
  }
  for (int64_t j = i + 1; j < until; j++) row[j] = 0.0f;
}

/* At most CHUNK tokens [from, to): the equations of reference.py, `_chunk`. */
KERNEL void NAME(chunk)(const delta_job *j, float *scratch, float *state, int64_t head, int64_t from, int64_t to) {
  int64_t dk = j->key_dim, dv = j->value_dim, n = to - from;
  scratch_parts s = parts_of(j, scratch);
  double total = 0;
  for (int64_t i = 0; i < n; i++) {
    total += (double)j->g[(from + i) * j->value_heads + head];
    s.high[i] = (float)total;
    s.low[i] = (float)(total - (double)s.high[i]);
    s.beta[i] = j->beta[(from + i) * j->value_heads + head];
    NAME(unit_row)(query_of(j, from + i, head), j->scale, s.q + i * dk, dk);
    NAME(unit_row)(key_of(j, from + i, head), 1.0f, s.k + i * dk, dk);
    /* Rows are pages apart: no machine guesses the next. */
    int64_t soon = from + (i + 4 < n ? i + 4 : i);
    for (int64_t x = 0; x < dk; x += 16) __builtin_prefetch(query_of(j, soon, head) + x);
    for (int64_t x = 0; x < dk; x += 16) __builtin_prefetch(key_of(j, soon, head) + x);
    for (int64_t x = 0; x < dv; x += 16) __builtin_prefetch(value_of(j, from + i, head) + x);
  }
  for (int64_t i = n; i < CHUNK; i++) s.high[i] = s.low[i] = 0.0f;
  for (int64_t d = 0; d < dk; d++) {
    for (int64_t i = 0; i < n; i++) s.kt[d * CHUNK + i] = s.k[i * dk + d];
    for (int64_t i = n; i < CHUNK; i++) s.kt[d * CHUNK + i] = 0.0f;
  }
  /* What tokens see of each other: -A and the scores, lower triangles. */
  for (int64_t i = 0; i < n; i += TILE_ROWS) {
    int64_t end = i + TILE_ROWS < n ? i + TILE_ROWS : n, wide = (end + LANES - 1) / LANES * LANES;
    NAME(product)(s.k + i * dk, dk, 1, s.kt, CHUNK, dk, s.a + i * CHUNK, CHUNK, end - i, wide, 0);
    NAME(product)(s.q + i * dk, dk, 1, s.kt, CHUNK, dk, s.p + i * CHUNK, CHUNK, end - i, wide, 0);
    for (int64_t r = i; r < end; r++) {
      NAME(decay_row)(s.a + r * CHUNK, -s.beta[r], s.high, s.low, r, end);
      NAME(decay_row)(s.p + r * CHUNK, 1.0f, s.high, s.low, r, end);
    }
  }
  /* The corrections E: beta (V - exp(G) K S), then forward substitution, TILE_ROWS rows at a time. */
  NAME(product)(s.k, dk, 1, state, dv, dk, s.e, dv, n, dv, 0);
  for (int64_t i = 0; i < n; i++) {
    const float *v = value_of(j, from + i, head);
    vf seen = v_all(expf(s.high[i])), beta = v_all(s.beta[i]);
    float *e = s.e + i * dv;
    EACH(x, dv) {
      vf wanted = v_load_some(v + x, (int)some) - v_load_some(e + x, (int)some) * seen;
      v_store_some(e + x, wanted * beta, (int)some);
    }
  }
  for (int64_t i = 0; i < n; i += TILE_ROWS) {
    int64_t end = i + TILE_ROWS < n ? i + TILE_ROWS : n;
    NAME(product)(s.a + i * CHUNK, CHUNK, 1, s.e, dv, i, s.e + i * dv, dv, end - i, dv, 1);
    for (int64_t r = i + 1; r < end; r++)
      for (int64_t c = i; c < r; c++) NAME(add_row)(s.e + c * dv, s.a[r * CHUNK + c], s.e + r * dv, dv);
  }
  /* Outputs: what the state answers, and what the tokens of this chunk add. */
  for (int64_t i = 0; i < n; i++) NAME(scale_row)(s.q + i * dk, expf(s.high[i]), s.q + i * dk, dk);
  float *out = j->out + (from * j->value_heads + head) * dv;
  int64_t out_row = j->value_heads * dv;
  NAME(product)(s.q, dk, 1, state, dv, dk, out, out_row, n, dv, 0);
  for (int64_t i = 0; i < n; i += TILE_ROWS) {
    int64_t end = i + TILE_ROWS < n ? i + TILE_ROWS : n;
    NAME(product)(s.p + i * CHUNK, CHUNK, 1, s.e, dv, end, out + i * out_row, out_row, end - i, dv, 1);
  }
  /* The state. */
  for (int64_t i = 0; i < n; i++) {
    float left = expf((s.high[n - 1] - s.high[i]) + (s.low[n - 1] - s.low[i]));
    NAME(scale_row)(s.k + i * dk, left, s.k + i * dk, dk);
  }
  NAME(scale_row)(state, expf(s.high[n - 1]), state, dk * dv);
  NAME(product)(s.k, 1, dk, s.e, dv, n, state, dv, dk, dv, 1);
}

/* ---------------------------------------------------------------- decay */

/* g = -exp(a_log) softplus(a + dt_bias) and beta = sigmoid(b) of tokens [from, to). */
KERNEL void NAME(decays)(const decay_job *j, int64_t from, int64_t to) {
  EACH(h, j->heads) {
    vf rate = v_all(0) - v_exp(v_load_some(j->a_log + h, (int)some)), bias = v_load_some(j->dt_bias + h, (int)some);
    for (int64_t t = from; t < to; t++) {
      vf a = v_load_some(j->a + t * j->a_row + h, (int)some), b = v_load_some(j->b + t * j->b_row + h, (int)some);
      v_store_some(j->g + t * j->heads + h, rate * v_softplus(a + bias), (int)some);
      v_store_some(j->beta + t * j->heads + h, v_sigmoid(b), (int)some);
    }
  }
}

/* ---------------------------------------------------------------- the convolution */

/* The weights [channels, taps] of channels [from, to) as rows of one tap. Four taps are what networks have. */
FN void NAME(spread_taps)(const conv_job *j, int64_t from, int64_t to, float rows[MOST_TAPS][CONV_CHANNELS]) {
  int64_t taps = j->taps, c = from;
#if NYB_AVX512
  __m512i every = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7),
                                     _mm512_set1_epi32(4));
  for (; taps == 4 && c + LANES <= to; c += LANES) {
    const float *w = j->weight + c * 4;
    vf a = v_load(w), b = v_load(w + 16), x = v_load(w + 32), y = v_load(w + 48);
    for (int k = 0; k < 4; k++) {
      __m512i mine = _mm512_add_epi32(every, _mm512_set1_epi32(k));
      vf low = _mm512_permutex2var_ps(a, mine, b), high = _mm512_permutex2var_ps(x, mine, y);
      v_store(&rows[k][c - from], _mm512_mask_blend_ps(0xff00, low, high));
    }
  }
#elif NYB_AVX2
  for (; taps == 4 && c + LANES <= to; c += LANES) { /* channels i and i + 4 share a register: lanes end in order */
    const float *w = j->weight + c * 4;
#define PAIR(i) \
  _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(w + (i) * 4)), _mm_loadu_ps(w + (i) * 4 + 16), 1)
    vf a = PAIR(0), b = PAIR(1), x = PAIR(2), y = PAIR(3);
#undef PAIR
    vf ab = _mm256_unpacklo_ps(a, b), xy = _mm256_unpacklo_ps(x, y);
    v_store(&rows[0][c - from], _mm256_shuffle_ps(ab, xy, 0x44));
    v_store(&rows[1][c - from], _mm256_shuffle_ps(ab, xy, 0xee));
    ab = _mm256_unpackhi_ps(a, b), xy = _mm256_unpackhi_ps(x, y);
    v_store(&rows[2][c - from], _mm256_shuffle_ps(ab, xy, 0x44));
    v_store(&rows[3][c - from], _mm256_shuffle_ps(ab, xy, 0xee));
  }
#endif
  for (; c < to; c++)
    for (int64_t k = 0; k < taps; k++) rows[k][c - from] = j->weight[c * taps + k];
}

/* One token: row[k] holds the inputs that meet tap k. */
FN void NAME(convolve_token)(const float *const *row, float weight[MOST_TAPS][CONV_CHANNELS], int64_t taps,
                             int64_t channels, float *y) {
  int64_t c = 0;
  for (; c + LANES <= channels; c += LANES) {
    vf sum = v_all(0);
    for (int64_t k = 0; k < taps; k++) sum = v_fma(v_load(row[k] + c), v_load(&weight[k][c]), sum);
    v_store(y + c, v_silu(sum));
  }
  if (c == channels) return;
  int some = LEFT(c, channels);
  vf sum = v_all(0);
  for (int64_t k = 0; k < taps; k++) sum = v_fma(v_load_some(row[k] + c, some), v_load_some(&weight[k][c], some), sum);
  v_store_some(y + c, v_silu(sum), some);
}

/* Channels [from, to) of one sequence. What its slot holds is set aside: a slot may be written while it is needed. */
FN void NAME(convolve_sequence)(const conv_job *j, int64_t b, int64_t from, int64_t to,
                                float weight[MOST_TAPS][CONV_CHANNELS]) {
  int64_t taps = j->taps, channels = j->channels, first = j->starts[b], n = j->starts[b + 1] - first;
  const float *x = j->x + first * j->x_row + from, *row[MOST_TAPS];
  float *y = j->y + first * channels + from, *state = j->state + from, old[MOST_TAPS - 1][CONV_CHANNELS];
  size_t bytes = (size_t)(to - from) * sizeof(float);
  for (int64_t t = 0; t < taps - 1; t++) {
    if (j->lengths[b]) memcpy(old[t], state + (j->slots[b] * (taps - 1) + t) * channels, bytes);
    else memset(old[t], 0, bytes);
  }
/* The input at position t of this call; the state holds those before 0. */
#define ROW(t) ((t) < 0 ? old[taps - 1 + (t)] : x + (t) * j->x_row)
  for (int64_t t = 0; t < n; t++) {
    for (int64_t k = 0; k < taps; k++) row[k] = ROW(t - (taps - 1) + k);
    if (t + 4 < n) /* rows are pages apart: no machine guesses the next */
      for (int64_t c = 0; c < to - from; c += 16) __builtin_prefetch(ROW(t + 4) + c);
    if (taps == 4) NAME(convolve_token)(row, weight, 4, to - from, y + t * channels);
    else NAME(convolve_token)(row, weight, taps, to - from, y + t * channels);
    int64_t slot = j->writes[first + t];
    for (int64_t k = 0; slot >= 0 && k < taps - 1; k++)
      memcpy(state + (slot * (taps - 1) + k) * channels, row[k + 1], bytes);
  }
#undef ROW
}

/* Channels [from, to), at most CONV_CHANNELS, of every sequence. */
KERNEL void NAME(convolve)(const conv_job *j, int64_t from, int64_t to) {
  float weight[MOST_TAPS][CONV_CHANNELS];
  NAME(spread_taps)(j, from, to, weight);
  for (int64_t b = 0; b < j->sequences; b++)
    if (j->starts[b] < j->starts[b + 1]) NAME(convolve_sequence)(j, b, from, to, weight);
}
#undef LEFT
#undef EACH
#undef TILE_ROWS
#undef TILE_VECTORS
#undef TOKEN_VECTORS
