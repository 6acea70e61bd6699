/* Vectors of float and int32 lanes for one instruction set. cpu.c includes the kernels once per set; NYB_AVX512 or
 * NYB_AVX2 is 1, or neither (portable). Every operation below is an IEEE single-precision operation rounded once (or
 * an integer one), so the kernels give the same bits on all of them; nothing here may be contracted or reordered. */

#undef FN
#undef KERNEL
#undef LANES
#undef NAME
#undef vf
#undef vi
#undef vm
#undef f_all
#undef i_all
#undef f_load
#undef f_add
#undef f_sub
#undef f_mul
#undef f_div
#undef f_min
#undef f_max
#undef f_abs
#undef f_less
#undef f_at_most
#undef f_pick
#undef i_pick
#undef any
#undef bits
#undef from_bits
#undef to_float
#undef to_int
#undef i_add
#undef i_sub
#undef i_and
#undef i_or
#undef i_or_where
#undef i_max
#undef i_min
#undef i_less
#undef gather
#undef i_store
#undef from_ints
#undef f_fnma
#undef i_left
#undef i_right

#if NYB_AVX512
#define FN static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq")))
#define KERNEL static __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define NAME(x) x##_avx512
#define LANES 16
typedef __m512 NAME(vf);
typedef __m512i NAME(vi);
typedef __mmask16 NAME(vm);
#elif NYB_AVX2
#define FN static inline __attribute__((always_inline, target("avx2,fma")))
#define KERNEL static __attribute__((target("avx2,fma")))
#define NAME(x) x##_avx2
#define LANES 8
typedef __m256 NAME(vf);
typedef __m256i NAME(vi);
typedef __m256i NAME(vm);
#else
#define FN static inline
#define KERNEL static
#define NAME(x) x##_portable
#define LANES 8
typedef struct { float at[8]; } NAME(vf);
typedef struct { int32_t at[8]; } NAME(vi);
typedef struct { int32_t at[8]; } NAME(vm);
#endif
#define vf NAME(vf)
#define vi NAME(vi)
#define vm NAME(vm)

#if NYB_AVX512
#define OP(type, name, args, expression) FN type NAME(name) args { return expression; }
OP(vf, f_all, (float a), _mm512_set1_ps(a))
OP(vi, i_all, (int32_t a), _mm512_set1_epi32(a))
OP(vf, f_load, (const float *p), _mm512_loadu_ps(p))
OP(vf, f_add, (vf a, vf b), _mm512_add_ps(a, b))
OP(vf, f_sub, (vf a, vf b), _mm512_sub_ps(a, b))
OP(vf, f_mul, (vf a, vf b), _mm512_mul_ps(a, b))
OP(vf, f_div, (vf a, vf b), _mm512_div_ps(a, b))
OP(vf, f_min, (vf a, vf b), _mm512_min_ps(a, b))
OP(vf, f_max, (vf a, vf b), _mm512_max_ps(a, b))
OP(vf, f_abs, (vf a), _mm512_abs_ps(a))
OP(vm, f_less, (vf a, vf b), _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ))
OP(vm, f_at_most, (vf a, vf b), _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ))
OP(vf, f_pick, (vm m, vf yes, vf no), _mm512_mask_blend_ps(m, no, yes))
OP(vi, i_pick, (vm m, vi yes, vi no), _mm512_mask_blend_epi32(m, no, yes))
OP(int, any, (vm m), m != 0)
OP(vi, bits, (vf a), _mm512_castps_si512(a))
OP(vf, from_bits, (vi a), _mm512_castsi512_ps(a))
OP(vf, to_float, (vi a), _mm512_cvtepi32_ps(a))
OP(vi, to_int, (vf a), _mm512_cvttps_epi32(a))
OP(vi, i_add, (vi a, vi b), _mm512_add_epi32(a, b))
OP(vi, i_sub, (vi a, vi b), _mm512_sub_epi32(a, b))
OP(vi, i_and, (vi a, vi b), _mm512_and_si512(a, b))
OP(vi, i_or, (vi a, vi b), _mm512_or_si512(a, b))
OP(vi, i_or_where, (vm m, vi a, vi b), _mm512_mask_or_epi32(a, m, a, b))
OP(vi, i_max, (vi a, vi b), _mm512_max_epi32(a, b))
OP(vi, i_min, (vi a, vi b), _mm512_min_epi32(a, b))
OP(vm, i_less, (vi a, vi b), _mm512_cmplt_epi32_mask(a, b))
#define i_left(a, n) _mm512_slli_epi32(a, n)
#define i_right(a, n) _mm512_srli_epi32(a, n)
OP(vf, gather, (const float *p, vi at), _mm512_i32gather_ps(at, p, 4))
FN void NAME(i_store)(int32_t *p, vi a) { _mm512_storeu_si512(p, a); }
FN vi NAME(from_ints)(const int32_t *p) { return _mm512_loadu_si512(p); }
FN vf NAME(f_fnma)(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); } /* c - a * b, for exact products only */
#undef OP
#elif NYB_AVX2
#define OP(type, name, args, expression) FN type NAME(name) args { return expression; }
OP(vf, f_all, (float a), _mm256_set1_ps(a))
OP(vi, i_all, (int32_t a), _mm256_set1_epi32(a))
OP(vf, f_load, (const float *p), _mm256_loadu_ps(p))
OP(vf, f_add, (vf a, vf b), _mm256_add_ps(a, b))
OP(vf, f_sub, (vf a, vf b), _mm256_sub_ps(a, b))
OP(vf, f_mul, (vf a, vf b), _mm256_mul_ps(a, b))
OP(vf, f_div, (vf a, vf b), _mm256_div_ps(a, b))
OP(vf, f_min, (vf a, vf b), _mm256_min_ps(a, b))
OP(vf, f_max, (vf a, vf b), _mm256_max_ps(a, b))
OP(vf, f_abs, (vf a), _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))))
OP(vm, f_less, (vf a, vf b), _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LT_OQ)))
OP(vm, f_at_most, (vf a, vf b), _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LE_OQ)))
OP(vf, f_pick, (vm m, vf yes, vf no), _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(m)))
OP(vi, i_pick, (vm m, vi yes, vi no), _mm256_blendv_epi8(no, yes, m))
OP(int, any, (vm m), _mm256_movemask_epi8(m) != 0)
OP(vi, bits, (vf a), _mm256_castps_si256(a))
OP(vf, from_bits, (vi a), _mm256_castsi256_ps(a))
OP(vf, to_float, (vi a), _mm256_cvtepi32_ps(a))
OP(vi, to_int, (vf a), _mm256_cvttps_epi32(a))
OP(vi, i_add, (vi a, vi b), _mm256_add_epi32(a, b))
OP(vi, i_sub, (vi a, vi b), _mm256_sub_epi32(a, b))
OP(vi, i_and, (vi a, vi b), _mm256_and_si256(a, b))
OP(vi, i_or, (vi a, vi b), _mm256_or_si256(a, b))
OP(vi, i_or_where, (vm m, vi a, vi b), _mm256_or_si256(a, _mm256_and_si256(m, b)))
OP(vi, i_max, (vi a, vi b), _mm256_max_epi32(a, b))
OP(vi, i_min, (vi a, vi b), _mm256_min_epi32(a, b))
OP(vm, i_less, (vi a, vi b), _mm256_cmpgt_epi32(b, a))
#define i_left(a, n) _mm256_slli_epi32(a, n)
#define i_right(a, n) _mm256_srli_epi32(a, n)
OP(vf, gather, (const float *p, vi at), _mm256_i32gather_ps(p, at, 4))
FN void NAME(i_store)(int32_t *p, vi a) { _mm256_storeu_si256((void *)p, a); }
FN vi NAME(from_ints)(const int32_t *p) { return _mm256_loadu_si256((const void *)p); }
FN vf NAME(f_fnma)(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); } /* c - a * b, for exact products only */
#undef OP
#else
#define EACH(type, expression) type r; for (int l = 0; l < LANES; l++) r.at[l] = (expression); return r;
#define OP(type, name, args, expression) FN type NAME(name) args { EACH(type, expression) }
OP(vf, f_all, (float a), a)
OP(vi, i_all, (int32_t a), a)
OP(vf, f_load, (const float *p), p[l])
OP(vf, f_add, (vf a, vf b), a.at[l] + b.at[l])
OP(vf, f_sub, (vf a, vf b), a.at[l] - b.at[l])
OP(vf, f_mul, (vf a, vf b), a.at[l] * b.at[l])
OP(vf, f_div, (vf a, vf b), a.at[l] / b.at[l])
OP(vf, f_min, (vf a, vf b), a.at[l] < b.at[l] ? a.at[l] : b.at[l])
OP(vf, f_max, (vf a, vf b), a.at[l] > b.at[l] ? a.at[l] : b.at[l])
OP(vf, f_abs, (vf a), fabsf(a.at[l]))
OP(vm, f_less, (vf a, vf b), a.at[l] < b.at[l] ? -1 : 0)
OP(vm, f_at_most, (vf a, vf b), a.at[l] <= b.at[l] ? -1 : 0)
OP(vf, f_pick, (vm m, vf yes, vf no), m.at[l] ? yes.at[l] : no.at[l])
OP(vi, i_pick, (vm m, vi yes, vi no), m.at[l] ? yes.at[l] : no.at[l])
FN int NAME(any)(vm m) { int32_t r = 0; for (int l = 0; l < LANES; l++) r |= m.at[l]; return r != 0; }
FN vi NAME(bits)(vf a) { vi r; memcpy(&r, &a, sizeof r); return r; }
FN vf NAME(from_bits)(vi a) { vf r; memcpy(&r, &a, sizeof r); return r; }
OP(vf, to_float, (vi a), (float)a.at[l])
OP(vi, to_int, (vf a), (int32_t)a.at[l])
OP(vi, i_add, (vi a, vi b), (int32_t)((uint32_t)a.at[l] + (uint32_t)b.at[l]))
OP(vi, i_sub, (vi a, vi b), (int32_t)((uint32_t)a.at[l] - (uint32_t)b.at[l]))
OP(vi, i_and, (vi a, vi b), a.at[l] & b.at[l])
OP(vi, i_or, (vi a, vi b), a.at[l] | b.at[l])
OP(vi, i_or_where, (vm m, vi a, vi b), a.at[l] | (m.at[l] & b.at[l]))
OP(vi, i_max, (vi a, vi b), a.at[l] > b.at[l] ? a.at[l] : b.at[l])
OP(vi, i_min, (vi a, vi b), a.at[l] < b.at[l] ? a.at[l] : b.at[l])
OP(vm, i_less, (vi a, vi b), a.at[l] < b.at[l] ? -1 : 0)
OP(vi, i_shl, (vi a, int n), (int32_t)((uint32_t)a.at[l] << n))
OP(vi, i_shr, (vi a, int n), (int32_t)((uint32_t)a.at[l] >> n))
#define i_left(a, n) NAME(i_shl)(a, n)
#define i_right(a, n) NAME(i_shr)(a, n)
FN vf NAME(gather)(const float *p, vi index) {
  vf r;
  for (int l = 0; l < LANES; l++) memcpy(&r.at[l], p + index.at[l], sizeof(float));
  return r;
}
FN void NAME(i_store)(int32_t *p, vi a) { memcpy(p, &a, sizeof a); }
OP(vi, from_ints, (const int32_t *p), p[l])
OP(vf, f_fnma, (vf a, vf b, vf c), c.at[l] - a.at[l] * b.at[l])
#undef OP
#undef EACH
#endif

#define f_all NAME(f_all)
#define i_all NAME(i_all)
#define f_load NAME(f_load)
#define f_add NAME(f_add)
#define f_sub NAME(f_sub)
#define f_mul NAME(f_mul)
#define f_div NAME(f_div)
#define f_min NAME(f_min)
#define f_max NAME(f_max)
#define f_abs NAME(f_abs)
#define f_less NAME(f_less)
#define f_at_most NAME(f_at_most)
#define f_pick NAME(f_pick)
#define i_pick NAME(i_pick)
#define any NAME(any)
#define bits NAME(bits)
#define from_bits NAME(from_bits)
#define to_float NAME(to_float)
#define to_int NAME(to_int)
#define i_add NAME(i_add)
#define i_sub NAME(i_sub)
#define i_and NAME(i_and)
#define i_or NAME(i_or)
#define i_or_where NAME(i_or_where)
#define i_max NAME(i_max)
#define i_min NAME(i_min)
#define i_less NAME(i_less)
#define gather NAME(gather)
#define i_store NAME(i_store)
#define from_ints NAME(from_ints)
#define f_fnma NAME(f_fnma)
