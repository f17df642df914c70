// The vector vocabulary: the few operations on W lanes that the row body needs.
//
// Written once over the compiler's vector extension; each translation unit defines MASKGIT_ISA (its
// namespace) and MASKGIT_LANES and is compiled with its own flags.  Nothing here may call inline
// functions of the standard library: the linker could keep this unit's copy for the whole program.
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace maskgit {
namespace MASKGIT_ISA {

constexpr int W = MASKGIT_LANES;
typedef float vf __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(W * 2), aligned(2), may_alias));

constexpr float kFloatMax = 3.402823466e38f;
static const float kNegInf = -__builtin_inff();

static inline vf splat(float x) { return x - vf{}; }
static inline vi splat_i(int32_t x) { return x - vi{}; }
// Through the vector type itself: a memcpy becomes two half-width moves, and their load stalls.
static inline vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
static inline void store(float* p, vf x) { *reinterpret_cast<vf*>(p) = x; }
static inline vf as_float(vi x) { return (vf)x; }
static inline vi as_int(vf x) { return (vi)x; }

// max(a, b) that returns b where a is NaN.
static inline vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
static inline vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
// a * b + c; fused where the target has it (the compiler contracts the product and the sum).
static inline vf fma(vf a, vf b, vf c) { return a * b + c; }

static inline float hsum(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float lanes[W];
  store(lanes, x);
  for (int width = W / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
#endif
}
// out[k] = sum of the lanes of x[k], k < 8.
static inline void hsum8(const vf* x, float* out) {
#if defined(__AVX512F__)
  auto pairs = [](__m512 a, __m512 b) {  // per quarter: a0 + a1, a2 + a3, b0 + b1, b2 + b3
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
  };
  auto quarters = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  };
  __m512 low = pairs(pairs((__m512)x[0], (__m512)x[1]), pairs((__m512)x[2], (__m512)x[3]));
  __m512 high = pairs(pairs((__m512)x[4], (__m512)x[5]), pairs((__m512)x[6], (__m512)x[7]));
  __m512 halves = quarters(low, high), sums = quarters(halves, halves);
  _mm256_storeu_ps(out, _mm512_castps512_ps256(sums));
#else
  for (int k = 0; k < 8; ++k) out[k] = hsum(x[k]);
#endif
}

// out[j] = x[16 j], j < 8, without scalar stores that a vector load would have to wait for.
static inline void load_every_16th(const float* x, float* out) {
#if defined(__AVX2__) || defined(__AVX512F__)
  _mm256_storeu_ps(out, _mm256_i32gather_ps(x, _mm256_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112), 4));
#else
  for (int j = 0; j < 8; ++j) out[j] = x[16 * j];
#endif
}

static inline float hmax(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float lanes[W];
  store(lanes, x);
  for (int width = W / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
#endif
}

// out[2 i] = even[i], out[2 i + 1] = odd[i].
static inline void store_interleaved(vf even, vf odd, float* out) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  store(out, (vf)_mm512_permutex2var_ps((__m512)even, low, (__m512)odd));
  store(out + W, (vf)_mm512_permutex2var_ps((__m512)even, high, (__m512)odd));
#elif defined(__AVX2__)
  __m256 low = _mm256_unpacklo_ps((__m256)even, (__m256)odd), high = _mm256_unpackhi_ps((__m256)even, (__m256)odd);
  store(out, (vf)_mm256_permute2f128_ps(low, high, 0x20));
  store(out + W, (vf)_mm256_permute2f128_ps(low, high, 0x31));
#else
  for (int i = 0; i < W; ++i) out[2 * i] = even[i], out[2 * i + 1] = odd[i];
#endif
}

// Round to the nearest integer, |x| < 2^22.
static inline vf round_near(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const float magic = 12582912.f;  // 1.5 * 2^23
  return (x + magic) - magic;
#endif
}

// 2^y for y <= 0, relative error 1.5e-7; everything below -126 gives 2^-126, which callers may count
// as nothing beside a term of 1.  Minimax polynomial on [-1/2, 1/2].
static inline vf exp2_clamped(vf y) {
  y = vmax(y, splat(-126.f));
  vf n = round_near(y), f = y - n;
  vf p = splat(1.326472731307149e-3f);
  p = fma(p, f, splat(9.671512991189957e-3f));
  p = fma(p, f, splat(5.550733581185341e-2f));
  p = fma(p, f, splat(0.24022242426872253f));
  p = fma(p, f, splat(0.6931470036506653f));
  p = fma(p, f, splat(1.f));
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  vi exponent = __builtin_convertvector(n, vi);
  return as_float(as_int(p) + (exponent << 23));
#endif
}

// The same for any y: above 127 the result is at least 2^127, infinity included.
static inline vf exp2_saturating(vf y) {
#if !defined(__AVX512F__)  // there scalef saturates by itself
  y = vmin(vmax(y, splat(-126.f)), splat(128.f));
#endif
  return exp2_clamped(y);
}

// Natural logarithm of normal positive floats, relative error 1e-7 also around 1.
static inline vf vlog(vf x) {
  vi bits = as_int(x);
  vi exponent = ((bits - splat_i(0x3f3504f3)) >> 23);  // mantissa in [sqrt(1/2), sqrt(2))
  vf f = as_float(bits - (exponent << 23)) - splat(1.f);
  vf p = splat(-7.634492963552475e-2f);
  p = fma(p, f, splat(0.12761574983596802f));
  p = fma(p, f, splat(-0.13160182535648346f));
  p = fma(p, f, splat(0.14201758801937103f));
  p = fma(p, f, splat(-0.16623356938362122f));
  p = fma(p, f, splat(0.20001226663589478f));
  p = fma(p, f, splat(-0.2500081956386566f));
  p = fma(p, f, splat(0.3333333134651184f));
  vf f2 = f * f, e = __builtin_convertvector(exponent, vf);
  vf tail = fma(f * f2, p, f2 * splat(-0.5f));
  return fma(e, splat(0.693147180559945f), f + tail);
}

static inline vf to_float(vu x) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepu32_ps((__m512i)x);
#else
  vf high = __builtin_convertvector((vi)(x >> 16), vf), low = __builtin_convertvector((vi)(x & 0xffffu), vf);
  return fma(high, splat(65536.f), low);
#endif
}

// Philox4x32-10 on counters (block, position, step, stream) and keys, one block a lane.
struct Words { vu x, y, z, w; };

#if defined(__AVX512F__) || defined(__AVX2__)
#if defined(__AVX512F__)
typedef __m512i Wide;
static inline Wide wide_mul(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }
static inline Wide wide_high(Wide a) { return _mm512_srli_epi64(a, 32); }
static inline Wide wide_xor(Wide a, Wide b, Wide c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
static inline Wide wide_add(Wide a, Wide b) { return _mm512_add_epi32(a, b); }
static inline Wide wide_all(uint32_t x) { return _mm512_set1_epi32(int(x)); }
static inline vu interleaved(Wide even, Wide odd) {
  return (vu)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}
#else
typedef __m256i Wide;
static inline Wide wide_mul(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
static inline Wide wide_high(Wide a) { return _mm256_srli_epi64(a, 32); }
static inline Wide wide_xor(Wide a, Wide b, Wide c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
static inline Wide wide_add(Wide a, Wide b) { return _mm256_add_epi32(a, b); }
static inline Wide wide_all(uint32_t x) { return _mm256_set1_epi32(int(x)); }
static inline vu interleaved(Wide even, Wide odd) {
  return (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
#endif
// Even and odd lanes apart, each word in the low half of 64 bits: a product is then one instruction,
// its low word needs none, and what stands in the high halves is never looked at.
static inline Words philox(vu c0, vu c1, vu c2, vu c3, vu k0, vu k1) {
  struct Pair { Wide even, odd; };
  auto split = [](vu x) { return Pair{(Wide)x, wide_high((Wide)x)}; };
  Pair a = split(c0), b = split(c1), c = split(c2), d = split(c3), p = split(k0), q = split(k1);
  const Wide m0 = wide_all(0xD2511F53u), m1 = wide_all(0xCD9E8D57u);
  const Wide weyl0 = wide_all(0x9E3779B9u), weyl1 = wide_all(0xBB67AE85u);
  for (int round = 0; round < 10; ++round) {
    const Pair x{wide_mul(a.even, m0), wide_mul(a.odd, m0)}, y{wide_mul(c.even, m1), wide_mul(c.odd, m1)};
    a = {wide_xor(wide_high(y.even), b.even, p.even), wide_xor(wide_high(y.odd), b.odd, p.odd)};
    c = {wide_xor(wide_high(x.even), d.even, q.even), wide_xor(wide_high(x.odd), d.odd, q.odd)};
    b = y, d = x;
    p = {wide_add(p.even, weyl0), wide_add(p.odd, weyl0)};
    q = {wide_add(q.even, weyl1), wide_add(q.odd, weyl1)};
  }
  return {interleaved(a.even, a.odd), interleaved(b.even, b.odd), interleaved(c.even, c.odd),
          interleaved(d.even, d.odd)};
}
#else
static inline Words philox(vu c0, vu c1, vu c2, vu c3, vu k0, vu k1) {
  for (int round = 0; round < 10; ++round) {
    vu high0, low0, high1, low1;
    for (int i = 0; i < W; ++i) {
      const uint64_t x = uint64_t(c0[i]) * 0xD2511F53u, y = uint64_t(c2[i]) * 0xCD9E8D57u;
      high0[i] = uint32_t(x >> 32), low0[i] = uint32_t(x);
      high1[i] = uint32_t(y >> 32), low1[i] = uint32_t(y);
    }
    c0 = high1 ^ c1 ^ k0, c2 = high0 ^ c3 ^ k1, c1 = low1, c3 = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}
#endif

// Exponential variates of 64 random bits each: -log1p(-w) below 1/2, -log(1 - w) above, with the
// distance to the nearer end formed from the (inverted) bits so that neither tail saturates.
static inline vf exponential(vu high, vu low) {
  vu flip = (vu)((vi)high >> 31);  // all ones where w >= 1/2
  high ^= flip, low ^= flip;
  vf t = to_float(high) * splat(0x1p-32f) + (to_float(low) + splat(0.5f)) * splat(0x1p-64f);
  vf u = (vi)flip ? t : splat(1.f) - t;
  vf lost = (vi)flip ? splat(0.f) : (u - splat(1.f)) + t;  // what rounding took from 1 - t
  return lost - vlog(u);
}

// Index of the first x[i] >= bound in [begin, n), or n; x is padded to whole vectors with -inf.
static inline int64_t first_at_least(const float* x, int64_t begin, int64_t n, float bound) {
  int64_t i = begin;
#if defined(__AVX512F__)
  for (; i < n; i += W) {
    unsigned mask = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + i), _mm512_set1_ps(bound), _CMP_GE_OQ);
    if (mask) return i + __builtin_ctz(mask);
  }
#elif defined(__AVX2__)
  for (; i < n; i += W) {
    __m256 ge = _mm256_cmp_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(bound), _CMP_GE_OQ);
    unsigned mask = static_cast<unsigned>(_mm256_movemask_ps(ge));
    if (mask) return i + __builtin_ctz(mask);
  }
#else
  for (; i < n; ++i)
    if (x[i] >= bound) return i;
#endif
  return n;
}

// exp(t) for t <= 0 in float64, relative error 1e-15, for the rules that score in float64.
typedef double vd __attribute__((vector_size(W * 8), aligned(8), may_alias));
typedef int64_t vl __attribute__((vector_size(W * 8), aligned(8), may_alias));
static inline vd exp_double(vd t) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52: the low bits then hold the integer
  vd low = -700.0 + vd{};
  t = t > low ? t : low;
  vd y = t * 1.4426950408889634 + magic;
  vl n = (vl)y;
  y = y - magic;
  vd f = (t - y * 6.93147180369123816490e-01) - y * 1.90821492927058770002e-10;
  vd p = 1.0 / 6227020800.0 + vd{};
  const double inverse_factorials[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                       1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24,
                                       1.0 / 6, 0.5, 1.0, 1.0};
  for (double c : inverse_factorials) p = p * f + c;
  return (vd)((vl)p + (n << 52));
}

static inline double scalar_exp(double t) { return exp_double(t + vd{})[0]; }  // t <= 0

// Two 16-bit formats, to float32 by bits.
static inline vf widen(vh x, bool is_bfloat16) {
  vu bits = __builtin_convertvector(x, vu);
  if (is_bfloat16) return (vf)(bits << 16);
  vu sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
  vf magnitude = (vf)rest * splat(0x1p112f);
  vi special = (vi)rest >= splat_i(0x0f800000);  // exponent all ones: infinity or NaN
  vu out = (vu)(special ? as_float((vi)(rest | 0x7f800000u)) : magnitude);
  return (vf)(out | sign);
}

}  // namespace MASKGIT_ISA
}  // namespace maskgit
