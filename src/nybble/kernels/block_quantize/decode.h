/* amax, decoding and comparison, plain loops: compilers vectorise them for the instruction set of the moment.
 * Included once per instruction set, after lanes.h. */

/* The largest magnitude of elements [from, to) as float32 bits. Magnitudes of IEEE numbers order as their bits do,
 * and infinities and NaN lie above all finite ones, so they show in the result. */
KERNEL uint32_t NAME(amax_bits)(const char *source, int64_t from, int64_t to, int dtype) {
  if (dtype == NYB_F32) {
    uint32_t most = 0;
    for (int64_t i = from; i < to; i++) {
      uint32_t b;
      memcpy(&b, source + i * 4, 4);
      b &= 0x7fffffff;
      most = b > most ? b : most;
    }
    return most;
  }
  uint16_t most = 0;
  for (int64_t i = from; i < to; i++) {
    uint16_t b;
    memcpy(&b, source + i * 2, 2);
    b &= 0x7fff;
    most = b > most ? b : most;
  }
  if (dtype == NYB_BF16) return (uint32_t)most << 16;
  float value = f16_to_float(&most);
  uint32_t wide;
  memcpy(&wide, &value, 4);
  return wide;
}

FN float NAME(fp8_value)(uint8_t code) {
  uint32_t magnitude = code & 0x7f, wide;
  float value;
  if (magnitude < 8) {
    value = (float)magnitude * 0x1p-9f;
  } else {
    wide = magnitude == 0x7f ? 0x7fc00000 : (magnitude << 20) + (120u << 23);
    memcpy(&value, &wide, 4);
  }
  return code & 0x80 ? -value : value;
}

/* What each scale byte is worth, tensor scale included, rounded once in float32; of FP8, what each code is worth. */
FN void NAME(byte_values)(const nyb_segment *segment, int format, float table[256]) {
  for (int code = 0; code < 256; code++) {
    if (format == NYB_MXFP4) {
      uint32_t wide = code == 255 ? 0x7fc00000 : code ? (uint32_t)code << 23 : 0x00400000; /* 0 means 2^-127 */
      memcpy(&table[code], &wide, 4);
    } else {
      table[code] = NAME(fp8_value)((uint8_t)code) * segment->tensor_scale;
    }
  }
}

#if NYB_AVX512
/* Sixteen E2M1 codes, eight bytes, as their values. */
FN __m512 NAME(e2m1_values)(const uint8_t *codes) {
  const __m512 values = _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6);
  const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  int64_t packed;
  memcpy(&packed, codes, 8);
  __m512i spread = _mm512_permutexvar_epi32(halves, _mm512_set1_epi64(packed));
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(spread, shifts), values);
}
#endif

/* Decode elements [from, to), `from` at a block boundary, into out[0 .. to - from); `worth` is from byte_values. */
FN void NAME(decode_elements)(const nyb_segment *segment, int64_t from, int64_t to, int format, const float *worth,
                              float *out) {
  if (format == NYB_FP8) {
    for (int64_t i = from; i < to; i++) out[i - from] = worth[segment->codes[i]];
    return;
  }
  const int block = format == NYB_MXFP4 ? 32 : 16;
  for (int64_t b = from / block; b < to / block; b++, out += block) {
    float s = worth[segment->scale[b]];
    const uint8_t *codes = segment->codes + b * (block / 2);
#if NYB_AVX512
    for (int i = 0; i < block; i += 16)
      _mm512_storeu_ps(out + i, _mm512_mul_ps(NAME(e2m1_values)(codes + i / 2), _mm512_set1_ps(s)));
#else
    static const float values[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
    for (int i = 0; i < block / 2; i++) {
      out[2 * i] = values[codes[i] & 15] * s;
      out[2 * i + 1] = values[codes[i] >> 4] * s;
    }
#endif
  }
}

KERNEL void NAME(decode_range)(const nyb_segment *segment, int64_t from, int64_t to, int format, float *out) {
  float worth[256];
  NAME(byte_values)(segment, format, worth);
  NAME(decode_elements)(segment, from, to, format, worth, out);
}

#if NYB_AVX512
FN double NAME(sum16)(__m512 a) {
  return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a)),
                                            _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1))));
}
#endif

/* Squared error and energy of n elements in double. */
FN void NAME(compare_exactly)(const float *x, const float *y, int n, nyb_comparison *out) {
  for (int k = 0; k < n; k++) {
    double d = x[k] - y[k];
    out->error += d * d;
    out->energy += (double)x[k] * x[k];
  }
}

/* Squared error and energy of elements [from, to): in float32 over 256 elements at a time, in double beyond. Where a
 * sum leaves the range in which float32 squares are safe, those 256 are done again in double. */
KERNEL void NAME(compare_range)(const nyb_segment *segment, int64_t from, int64_t to, int dtype, int format,
                                nyb_comparison *out) {
  float worth[256];
  NAME(byte_values)(segment, format, worth);
  for (int64_t i = from; i < to; i += 256) {
    int n = to - i < 256 ? (int)(to - i) : 256;
#if NYB_AVX512
    if (dtype == NYB_BF16 && n == 256 && format != NYB_FP8) {
      const char *x = segment->source + i * 2;
      const uint8_t *codes = segment->codes + i / 2, *scale = segment->scale + i / (format == NYB_MXFP4 ? 32 : 16);
      const int halves = format == NYB_MXFP4; /* two runs of sixteen share a scale */
      __m512 error = _mm512_setzero_ps(), energy = error;
      for (int k = 0; k < 16; k++) {
        __m512i half = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(x + 32 * k)));
        __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(half, 16));
        __m512 s = _mm512_set1_ps(worth[scale[k >> halves]]);
        __m512 d = _mm512_sub_ps(value, _mm512_mul_ps(NAME(e2m1_values)(codes + 8 * k), s));
        error = _mm512_add_ps(error, _mm512_mul_ps(d, d));
        energy = _mm512_add_ps(energy, _mm512_mul_ps(value, value));
      }
      double e = NAME(sum16)(error), all = NAME(sum16)(energy);
      if (e < 0x1p100 && all < 0x1p100 && all > 0x1p-60) {
        out->error += e;
        out->energy += all;
        continue;
      }
    }
#endif
    float x[256], y[256], error = 0, energy = 0;
    NAME(decode_elements)(segment, i, i + n, format, worth, y);
    widen(segment->source, i, n, dtype, x);
    for (int k = 0; k < n; k++) {
      float d = x[k] - y[k];
      error += d * d;
      energy += x[k] * x[k];
    }
    if (error < 0x1p100f && energy < 0x1p100f && energy > 0x1p-60f) {
      out->error += (double)error;
      out->energy += (double)energy;
    } else {
      NAME(compare_exactly)(x, y, n, out);
    }
  }
  if (format == NYB_FP8) return;
  const int block = format == NYB_MXFP4 ? 32 : 16;
  const uint8_t worst = format == NYB_NVFP4 ? 0x7e : 254, least = format == NYB_NVFP4 ? 1 : 0;
  for (int64_t b = from / block; b < to / block; b++) {
    uint8_t s = segment->scale[b];
    out->bad_scales += (s < least) | (s > worst);
  }
}
