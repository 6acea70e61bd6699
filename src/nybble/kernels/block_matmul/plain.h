/* Float operands in eight lanes: AVX2 with NYB_AVX2 = 1, portable C with 0. Included by matmul.c for each. */
#if NYB_AVX2
#define NAME(x) x##_avx2
#define FN static __attribute__((target("avx2,fma")))
#else
#define NAME(x) x##_portable
#define FN static
#endif

#if NYB_AVX2
/* 16 elements of eight bytes: even ones at out, odd ones at out + 32. */
static inline __attribute__((always_inline, target("avx2,fma"))) void NAME(nibbles_16)(const uint8_t *bytes,
                                                                                       float scale, float *out) {
  const __m256 values = _mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6);
  __m256i low = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes)), high = _mm256_srli_epi32(low, 4);
  __m256 each = _mm256_set1_ps(scale);
  const __m256i sign = _mm256_set1_epi32((int)0x80000000u);
  __m256 a = _mm256_permutevar8x32_ps(values, low), b = _mm256_permutevar8x32_ps(values, high);
  a = _mm256_or_ps(a, _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(low, 28), sign)));
  b = _mm256_or_ps(b, _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(high, 28), sign)));
  _mm256_storeu_ps(out, _mm256_mul_ps(a, each));
  _mm256_storeu_ps(out + 32, _mm256_mul_ps(b, each));
}
#else
static void NAME(nibbles_16)(const uint8_t *bytes, float scale, float *out) {
  for (int i = 0; i < 8; i++) {
    out[i] = e2m1_values[bytes[i] & 15] * scale;
    out[32 + i] = e2m1_values[bytes[i] >> 4] * scale;
  }
}
#endif

FN void NAME(look_up)(const uint8_t *codes, int64_t count, float *out) {
  int64_t i = 0;
#if NYB_AVX2
  for (; i + 8 <= count; i += 8) {
    /* Arithmetic, because gathers are slower: exponents rebased, subnormal ones as integers times 2^-9. */
    __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + i)));
    __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi32(127));
    __m256i value = _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23));
    __m256i small = _mm256_castps_si256(_mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(0x1p-9f)));
    value = _mm256_blendv_epi8(value, small, _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude));
    __m256i nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(127));
    value = _mm256_or_si256(value, _mm256_and_si256(nan, _mm256_set1_epi32(0x7fc00000)));
    value = _mm256_or_si256(value, _mm256_slli_epi32(_mm256_srli_epi32(code, 7), 31));
    _mm256_storeu_ps(out + i, _mm256_castsi256_ps(value));
  }
#endif
  for (; i < count; i++) out[i] = tables.e4m3_float[codes[i]];
}

FN void NAME(decode)(const nyb_segment *s, int64_t row, int64_t from, int64_t to, int64_t k, void *out) {
  const uint8_t *codes = s->codes + row * s->row_bytes;
  float *o = out;
  int64_t count = to - from, padded = (count + 63) / 64 * 64;
  for (int64_t i = count / 64 * 64; i < padded; i++) o[i] = 0;
  switch (s->format) {
    case NYB_WEIGHT_NVFP4:
    case NYB_WEIGHT_MXFP4: {
      const int is_mx = s->format == NYB_WEIGHT_MXFP4;
      const uint8_t *scales = s->scale + row * (is_mx ? k / 32 : k / 16);
      for (int64_t i = 0; i < count; i += 16) {
        int64_t at = from + i;
        float scale = is_mx ? float_of((uint32_t)tables.mxfp4[scales[at / 32]][2] << 16)
                            : tables.e4m3_float[scales[at / 16]];
        NAME(nibbles_16)(codes + at / 2, scale, o + i / 64 * 64 + i % 64 / 2);
      }
      break;
    }
    case NYB_WEIGHT_BF16:
      for (int64_t i = 0; i < count; i++) {
        uint16_t bits;
        memcpy(&bits, codes + 2 * (from + i), 2);
        o[i] = float_of((uint32_t)bits << 16);
      }
      break;
    case NYB_WEIGHT_F16:
      for (int64_t i = 0; i < count; i++) {
        uint16_t bits;
        memcpy(&bits, codes + 2 * (from + i), 2);
        o[i] = float_of_half(bits);
      }
      break;
    case NYB_WEIGHT_F32: memcpy(o, codes + 4 * from, (size_t)count * 4); break;
    case NYB_WEIGHT_FP8_BLOCK: {
      const uint8_t *scales = block_scales(s, row, k);
      NAME(look_up)(codes + from, count, o);
      for (int64_t b = 0; b < count; b += SCALE_BLOCK) { /* a piece of K begins with a block */
        float scale = load_float(scales + (from + b) / SCALE_BLOCK * 4);
        int64_t end = b + SCALE_BLOCK < count ? b + SCALE_BLOCK : count;
        for (int64_t i = b; i < end; i++) o[i] *= scale;
      }
      break;
    }
    default: NAME(look_up)(codes + from, count, o);
  }
}

FN void NAME(pack)(const void *x, int x_is_bf16, int64_t k, int rounded, int is_split, void *out) {
  float *o = out;
  for (int64_t at = 0; at < k; at += 64, o += 64) {
    float v[64] = {0};
    int count = k - at < 64 ? (int)(k - at) : 64;
    if (x_is_bf16) {
      for (int i = 0; i < count; i++) v[i] = float_of((uint32_t)((const uint16_t *)x)[at + i] << 16);
    } else {
      memcpy(v, (const float *)x + at, (size_t)count * 4);
      if (rounded)
        for (int i = 0; i < 64; i++) v[i] = round_to_bf16(v[i]);
    }
    if (is_split) {
      for (int i = 0; i < 32; i++) {
        o[i] = v[2 * i];
        o[32 + i] = v[2 * i + 1];
      }
    } else {
      memcpy(o, v, sizeof v);
    }
  }
}

static inline float NAME(lanes)(const float s[8]) {
  float a = s[0] + s[4], b = s[1] + s[5], c = s[2] + s[6], d = s[3] + s[7];
  return (a + c) + (b + d);
}

/* Four weight rows times mr rows of x. */
static inline __attribute__((always_inline
#if NYB_AVX2
                             ,
                             target("avx2,fma")
#endif
                             )) void NAME(panel)(const int mr, const product *p, int64_t row) {
  const char *x = p->x + row * p->x_stride;
  float *kept = p->sums + row * TILE_ROWS * 16;
#if NYB_AVX2
  __m256 s[3][4];
#pragma GCC unroll 4
  for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
      s[i][j] = p->is_first ? _mm256_setzero_ps() : _mm256_load_ps(kept + (i * TILE_ROWS + j) * 16);
  for (int64_t at = 0; at < p->bytes; at += 32) {
    __m256 v[3];
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++) v[i] = _mm256_load_ps((const float *)(x + i * p->x_stride + at));
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      __m256 w = _mm256_load_ps((const float *)(p->tile + j * TILE_STRIDE + at));
#pragma GCC unroll 4
      for (int i = 0; i < mr; i++) s[i][j] = _mm256_fmadd_ps(w, v[i], s[i][j]);
    }
  }
#else
  float s[2][4][8];
  for (int i = 0; i < mr; i++)
    for (int j = 0; j < 4; j++)
      for (int l = 0; l < 8; l++) s[i][j][l] = p->is_first ? 0 : kept[(i * TILE_ROWS + j) * 16 + l];
  for (int i = 0; i < mr; i++)
    for (int j = 0; j < 4; j++) {
      const float *v = (const float *)(x + i * p->x_stride), *w = (const float *)(p->tile + j * TILE_STRIDE);
      for (int64_t at = 0; at < p->bytes / 4; at += 8)
        for (int l = 0; l < 8; l++) s[i][j][l] += w[at + l] * v[at + l];
    }
#endif
  for (int i = 0; i < mr; i++)
    for (int j = 0; j < 4; j++) {
      float sum[8];
#if NYB_AVX2
      _mm256_storeu_ps(sum, s[i][j]);
#else
      memcpy(sum, s[i][j], sizeof sum);
#endif
      if (!p->is_last) memcpy(kept + (i * TILE_ROWS + j) * 16, sum, sizeof sum);
      else if (j < p->valid) p->y[(row + i) * p->n + j] = NAME(lanes)(sum) * p->scale[j] + p->bias[j];
    }
}

UNSCHEDULED FN void NAME(multiply)(const product *p) {
  int64_t i = 0;
#if NYB_AVX2
  for (; i + 3 <= p->rows; i += 3) NAME(panel)(3, p, i);
#endif
  for (; i + 2 <= p->rows; i += 2) NAME(panel)(2, p, i);
  if (i < p->rows) NAME(panel)(1, p, i);
}
#undef FN
#undef NAME
