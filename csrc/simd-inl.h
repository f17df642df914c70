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

// The same from bfloat16: each is the upper half of a 32-bit word, or the lower half of the first.
static inline void load_every_16th(const uint16_t* x, bool is_first, float* out) {
#if defined(__AVX2__) || defined(__AVX512F__)
  const __m256i places = _mm256_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56);
  const __m256i words = _mm256_i32gather_epi32(reinterpret_cast<const int*>(x - !is_first), places, 4);
  const __m256i bits = is_first ? _mm256_slli_epi32(words, 16) : _mm256_and_si256(words, _mm256_set1_epi32(int(0xffff0000u)));
  _mm256_storeu_ps(out, _mm256_castsi256_ps(bits));
#else
  for (int j = 0; j < 8; ++j) {
    const uint32_t bits = uint32_t(x[16 * j]) << 16;
    __builtin_memcpy(out + j, &bits, 4);
  }
  (void)is_first;
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

// (even, odd) become (even[0], odd[0], even[1], ...) and what follows it.
static inline void interleave(vf& even, vf& odd) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const __m512 a = (__m512)even, b = (__m512)odd;
  even = (vf)_mm512_permutex2var_ps(a, first, b), odd = (vf)_mm512_permutex2var_ps(a, second, b);
#elif defined(__AVX2__)
  const __m256 low = _mm256_unpacklo_ps((__m256)even, (__m256)odd), high = _mm256_unpackhi_ps((__m256)even, (__m256)odd);
  even = (vf)_mm256_permute2f128_ps(low, high, 0x20), odd = (vf)_mm256_permute2f128_ps(low, high, 0x31);
#else
  const vf a = even, b = odd;
  for (int i = 0; i < W / 2; ++i) {
    even[2 * i] = a[i], even[2 * i + 1] = b[i];
    odd[2 * i] = a[W / 2 + i], odd[2 * i + 1] = b[W / 2 + i];
  }
#endif
}

// Sums of 2^(x * scale - r), r near the largest x * scale.  With y = x * scale - r = n + i / kParts + f,
// 2^y is the power of two and the i-th root, from a table in registers, times a polynomial near 2^f.
//
// r is a multiple of 1 / kParts, so that t = x * scale + (kMagic - r) is a float whose last bits are n
// and i, and f = x * scale + (kMagic - r - t) costs one rounding: no subtraction of r comes first,
// save where a product is rounded before it is added (kFused is false).
// The table's entries are reduced by i, which the shift puts under the exponent.
//
// AVX-512 has room for 32 roots, and for these a parabola of one fma does, g = f + 23 / 16:
// 2^f is 0.2411 (g g + 2.08126) within 1.3e-7, and the constant falls away.  AVX2 has 8 roots and a
// cubic, scalar code 1 and degree 5: relative errors below 2e-7.
#if defined(__AVX512F__)
constexpr float kParts = 32.f, kCentre = 1.4375f;
alignas(64) static const int32_t kRoots[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
static inline vf power_of(vf t) {
  const __m512i low = _mm512_load_si512(kRoots), high = _mm512_load_si512(kRoots + 16);
  return as_float((vi)_mm512_permutex2var_epi32(low, (__m512i)t, high) + (as_int(t) << 18));
}
static inline vf curve(vf g) { return fma(g, g, splat(2.08126f)); }
#elif defined(__AVX2__)
constexpr float kParts = 8.f, kCentre = 0.f;
alignas(32) static const int32_t kRoots[8] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                              0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
static inline vf power_of(vf t) {
  const __m256i roots = *reinterpret_cast<const __m256i*>(kRoots);
  return as_float((vi)_mm256_permutevar8x32_epi32(roots, (__m256i)t) + (as_int(t) << 20));
}
static inline vf curve(vf f) {
  vf p = fma(f, splat(0.0554962232708931f), splat(0.2402576357126236f));
  p = fma(f, p, splat(0.6931472420692444f));
  return fma(f, p, splat(1.f));
}
#else
constexpr float kParts = 1.f, kCentre = 0.f;
static inline vf power_of(vf t) { return as_float((as_int(t) << 23) + splat_i(0x3f800000)); }
static inline vf curve(vf f) {
  vf p = splat(1.326472731307149e-3f);
  p = fma(p, f, splat(9.671512991189957e-3f));
  p = fma(p, f, splat(5.550733581185341e-2f));
  p = fma(p, f, splat(0.24022242426872253f));
  p = fma(p, f, splat(0.6931470036506653f));
  return fma(p, f, splat(1.f));
}
#endif
constexpr float kMagic = 12582912.f / kParts;  // 1.5 * 2^23 / kParts
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

struct Exponent {
  vf scale, start, centre, low, high, from;
  // exp2((x - top) * scale); `reaches(top, scale)` must hold.
  explicit Exponent(float s, float top = 0) : scale(splat(s)), from(splat(top)) {
    if (!kFused) top = 0;
    const double whole = 6755399441055744.0 / kParts, r = (double(top) * s + whole) - whole;
    start = splat(float(kMagic - r)), centre = splat(float(kMagic - r) + kCentre);
    low = splat(float((r - 126) / s)), high = splat(float((r + 127.9) / s));
  }
  // What sums are divided by: the term of the top, which so counts 1 exactly.
  inline double unit(float top) const;
  // Further away the constants would lose the bits of i.
  static bool reaches(float top, float s) { return __builtin_fabs(double(top) * s) <= 65536; }
};

// sum += 2^(x * scale - r).  Everything below -126 counts 2^-126, NaN too, which is nothing beside a
// term of 1; above 127 (kSaturating) the term is huge.
template <bool kSaturating = false>
static inline vf add_exp2(vf sum, vf x, const Exponent& e) {
  if (!kFused) x = x - e.from;
  x = vmax(x, e.low);
  if (kSaturating) x = vmin(x, e.high);
  const vf t = fma(x, e.scale, e.start), g = fma(x, e.scale, e.centre - t);
  return fma(power_of(t), curve(g), sum);
}

inline double Exponent::unit(float top) const { return add_exp2(vf{}, splat(top), *this)[0]; }

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

// Philox4x32-10 on counters (block, position, step, stream), one block a lane.  The keys of the ten
// rounds are one sequence's for all lanes (RowKeys, read as broadcasts) or one per lane (LaneKeys).
struct Words { vu x, y, z, w; };
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
struct RowKeys {
  static constexpr bool same = true;
  uint32_t at[20];
  void set(uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; ++round) at[2 * round] = k0, at[2 * round + 1] = k1, k0 += kWeyl0, k1 += kWeyl1;
  }
  vu operator()(int i) const { return vu{} + at[i]; }
};
struct LaneKeys {
  static constexpr bool same = false;
  vu k0, k1;
  vu operator()(int i) const { return i % 2 ? k1 + uint32_t(i / 2) * kWeyl1 : k0 + uint32_t(i / 2) * kWeyl0; }
};

#if defined(__AVX512F__) || defined(__AVX2__)
#if defined(__AVX512F__)
typedef __m512i Wide;
static inline Wide wide_mul(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }
static inline Wide wide_high(Wide a) { return _mm512_srli_epi64(a, 32); }
static inline Wide wide_xor(Wide a, Wide b, Wide c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
static inline Wide wide_all(uint32_t x) { return _mm512_set1_epi32(int(x)); }
static inline vu interleaved(Wide even, Wide odd) {
  return (vu)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
}
#else
typedef __m256i Wide;
static inline Wide wide_mul(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
static inline Wide wide_high(Wide a) { return _mm256_srli_epi64(a, 32); }
static inline Wide wide_xor(Wide a, Wide b, Wide c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
static inline Wide wide_all(uint32_t x) { return _mm256_set1_epi32(int(x)); }
static inline vu interleaved(Wide even, Wide odd) {
  return (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
#endif
// Even and odd lanes apart, each word in the low half of 64 bits: a product is then one instruction,
// its low word needs none, and what stands in the high halves is never looked at.
template <class Keys>
static inline Words philox(vu c0, vu c1, vu c2, vu c3, const Keys& keys) {
  struct Both { Wide even, odd; };
  auto split = [](vu x) { return Both{(Wide)x, wide_high((Wide)x)}; };
  Both a = split(c0), b = split(c1), c = split(c2), d = split(c3);
  const Wide m0 = wide_all(0xD2511F53u), m1 = wide_all(0xCD9E8D57u);
  for (int round = 0; round < 10; ++round) {
    const Wide p = (Wide)keys(2 * round), q = (Wide)keys(2 * round + 1);
    const Wide p_odd = Keys::same ? p : wide_high(p), q_odd = Keys::same ? q : wide_high(q);
    const Both x{wide_mul(a.even, m0), wide_mul(a.odd, m0)}, y{wide_mul(c.even, m1), wide_mul(c.odd, m1)};
    a = {wide_xor(wide_high(y.even), b.even, p), wide_xor(wide_high(y.odd), b.odd, p_odd)};
    c = {wide_xor(wide_high(x.even), d.even, q), wide_xor(wide_high(x.odd), d.odd, q_odd)};
    b = y, d = x;
  }
  return {interleaved(a.even, a.odd), interleaved(b.even, b.odd), interleaved(c.even, c.odd),
          interleaved(d.even, d.odd)};
}
#else
template <class Keys>
static inline Words philox(vu c0, vu c1, vu c2, vu c3, const Keys& keys) {
  for (int round = 0; round < 10; ++round) {
    vu high0, low0, high1, low1;
    for (int i = 0; i < W; ++i) {
      const uint64_t x = uint64_t(c0[i]) * 0xD2511F53u, y = uint64_t(c2[i]) * 0xCD9E8D57u;
      high0[i] = uint32_t(x >> 32), low0[i] = uint32_t(x);
      high1[i] = uint32_t(y >> 32), low1[i] = uint32_t(y);
    }
    c0 = high1 ^ c1 ^ keys(2 * round), c2 = high0 ^ c3 ^ keys(2 * round + 1), c1 = low1, c3 = low0;
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

// 2 W bfloat16 side by side: as float32 those at even places, those at odd places.
static inline vf even_bfloat16(vu x) { return (vf)(x << 16); }
static inline vf odd_bfloat16(vu x) { return (vf)(x & 0xffff0000u); }

typedef uint16_t vu16 __attribute__((vector_size(W * 4), aligned(2), may_alias));
static inline uint16_t smallest(vu16 x) {
#if defined(__AVX512F__)
  const __m256i half = _mm256_min_epu16(_mm512_castsi512_si256((__m512i)x), _mm512_extracti64x4_epi64((__m512i)x, 1));
  const __m128i quarter = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return uint16_t(_mm_extract_epi16(_mm_minpos_epu16(quarter), 0));
#elif defined(__AVX2__)
  const __m128i half = _mm_min_epu16(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  return uint16_t(_mm_extract_epi16(_mm_minpos_epu16(half), 0));
#else
  uint16_t least = x[0];
  for (int j = 1; j < 2 * W; ++j) least = x[j] < least ? x[j] : least;
  return least;
#endif
}
static inline vu16 lower(vu16 a, vu16 b) {
#if defined(__AVX512F__)
  return (vu16)_mm512_min_epu16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vu16)_mm256_min_epu16((__m256i)a, (__m256i)b);
#else
  return a < b ? a : b;
#endif
}

static inline vu16 higher_signed(vu16 a, vu16 b) {
#if defined(__AVX512F__)
  return (vu16)_mm512_max_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vu16)_mm256_max_epi16((__m256i)a, (__m256i)b);
#else
  typedef int16_t vs16 __attribute__((vector_size(W * 4), aligned(2), may_alias));
  return (vs16)a > (vs16)b ? a : b;
#endif
}

// The bits of the largest of n bfloat16, n a multiple of 4 W, none of them widened.  As signed
// integers the positive ones are in order and above the negative ones, which are in reverse order as
// unsigned integers and looked at only where they are all.  Above 0x7f80 and 0xff80 a NaN was in the way.
static inline uint16_t largest_bits(const uint16_t* x, int n) {
  auto at = [&](int i) { return *reinterpret_cast<const vu16*>(x + i); };
  const vu16 flip = vu16{} + 0x7fff;  // flip - v: the signed order, reversed, as unsigned integers
  vu16 a = at(0), b = a;
  for (int i = 0; i < n; i += 4 * W) a = higher_signed(a, at(i)), b = higher_signed(b, at(i + 2 * W));
  const uint16_t top = uint16_t(0x7fff - smallest(flip - higher_signed(a, b)));
  if (top < 0x8000) return top;
  a = b = at(0);
  for (int i = 0; i < n; i += 4 * W) a = lower(a, at(i)), b = lower(b, at(i + 2 * W));
  return smallest(lower(a, b));
}

// Index of the first x[i] == bits, which is there; n is a multiple of 2 W.
static inline int64_t first_equal(const uint16_t* x, int64_t n, uint16_t bits) {
  for (int64_t i = 0; i < n; i += 2 * W) {
#if defined(__AVX512F__)
    const __mmask32 same = _mm512_cmpeq_epi16_mask(_mm512_loadu_si512(x + i), _mm512_set1_epi16(int16_t(bits)));
    if (same) return i + __builtin_ctz(same);
#elif defined(__AVX2__)
    const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    const unsigned same = unsigned(_mm256_movemask_epi8(_mm256_cmpeq_epi16(row, _mm256_set1_epi16(int16_t(bits)))));
    if (same) return i + __builtin_ctz(same) / 2;
#else
    for (int64_t j = i; j < i + 2 * W; ++j)
      if (x[j] == bits) return j;
#endif
  }
  return 0;
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

// x rounded to float16 and back.
static inline vf rounded_to_float16(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; ++i) {
    const float size = x[i] < 0 ? -x[i] : x[i];
    if (!(size < 65520.f)) {
      if (size == size) x[i] = x[i] < 0 ? kNegInf : -kNegInf;
      continue;
    }
    float unit = 0x1p-24f;  // of the last bit; subnormals have the smallest
    while (size >= unit * 2048) unit *= 2;
    x[i] = __builtin_rintf(x[i] / unit) * unit;
  }
  return x;
#endif
}

// Two 16-bit formats, to float32 by bits.
static inline vf widen(vh x, bool is_bfloat16) {
  vu bits = __builtin_convertvector(x, vu);
  if (is_bfloat16) return (vf)(bits << 16);
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)x);
#else
  vu sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
  vf magnitude = (vf)rest * splat(0x1p112f);
  vi special = (vi)rest >= splat_i(0x0f800000);  // exponent all ones: infinity or NaN
  vu out = (vu)(special ? as_float((vi)(rest | 0x7f800000u)) : magnitude);
  return (vf)(out | sign);
#endif
}

}  // namespace MASKGIT_ISA
}  // namespace maskgit
