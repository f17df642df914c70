// A row of logits and how a chunk of it comes to lie in L1 as float32.
namespace maskgit {
namespace MASKGIT_ISA {

constexpr int kLeaf = 128, kGroups = 16, kPerGroup = 8;
constexpr int kChunk = 2048, kLeaves = kChunk / kLeaf;
constexpr float kLog2e = 1.44269504088896341f;

// A token survives if its key is above `bound`, or equals it and its index is at most `last_tie`.
struct Condition {
  bool typical;         // key = -|center - scale * x|, else key = x
  float center, scale;
  float bound;
  int64_t last_tie;
};
struct Conditions {
  int n = 0;
  Condition at[5];
};

struct Source {  // keys and position of a row's variates
  const RowKeys* keys;
  uint32_t position;
};

// Where the prefetching of short rows has come to: rows are fetched in order, a few lines at a time
// and at every stage, so that memory is busy while variates and races keep the core busy.
struct Cursor {
  const StepParams* p;
  const int64_t *rows, *end;  // the row being fetched, and the end of the list
  int64_t b, base;            // its sequence, and b * N
  const char* from;
  int64_t left;               // bytes of the row that are still to be fetched
  int per_leaf, per_stage;    // lines to fetch for 128 logits walked, and in each other stage of a row

  void start_row() {
    while (*rows >= base + p->length) ++b, base += p->length;
    const int64_t size = p->dtype == kFloat32 ? 4 : 2;
    from = static_cast<const char*>(p->logits.data) + (b * p->logits.b + (*rows - base) * p->logits.n) * size;
    left = p->logits.v == 1 ? p->vocab * size : 0;
  }
  void not_before(const int64_t* row) {
    if (rows < row && row < end) rows = row, start_row();
  }
  void fetch(int lines) {
    while (lines > 0) {
      if (left <= 0) {
        if (rows + 1 >= end) return;
        ++rows, start_row();
      }
      const int count = left < lines * 64 ? int((left + 63) / 64) : lines;
      for (int i = 0; i < count; ++i) __builtin_prefetch(from + 64 * i);
      from += 64 * count, left -= 64 * count, lines -= count;
      if (left <= 0 && rows + 1 >= end) return;
    }
  }
};

struct Row {
  const StepParams* p;
  Cursor* cursor;  // null for rows of several chunks
  const char *logits, *uncond;
  const void* noise;
  Source source;
  float* buffer;     // (kChunk)
  bool as_it_is;     // keep +inf, to tell it from the largest float
  const float* x;    // the loaded chunk, padded with -inf to whole leaves: the logits or the buffer
  int64_t loaded;    // its first index; -1 where it was loaded under other conditions
  bool scoring;      // leave out what is outside the score's softmax
  bool as_bits;      // the whole row is plain bfloat16 and was walked where it lies
  const char* ahead; // what will be read next: the chunk after this one, or the row after this one
  // per chunk: maximum, sum of exp, sum of t exp(t); per leaf: sum of exp; per group, where one
  // chunk is the whole row: sum of exp
  float* chunk_max;
  double *chunk_z, *chunk_tz;
  float* leaf_sum;
  float* group_sum;
  const float* waits;  // exponential variates, see draw_waits
};

static inline int64_t num_chunks(int64_t v) { return (v + kChunk - 1) / kChunk; }

static inline float key_of(const Condition& c, float x) {
  return c.typical ? -__builtin_fabsf(c.center - c.scale * x) : x;
}
static inline bool survives(const Conditions& all, float x, int64_t index) {
  for (int i = 0; i < all.n; ++i) {
    float key = key_of(all.at[i], x);
    if (!(key > all.at[i].bound || (key == all.at[i].bound && index <= all.at[i].last_tie))) return false;
  }
  return true;
}

// W elements of `source` from element i on as float32; lanes at and past `valid` are undefined.
template <int kType>
static inline vf load_elements(const char* source, int64_t i, int64_t stride, int valid) {
  constexpr int size = kType == kFloat32 ? 4 : 2;
  alignas(64) char raw[W * 4] = {};
  const char* at = source + i * stride * size;
  if (stride != 1 || valid < W) {
    for (int j = 0; j < valid; ++j) __builtin_memcpy(raw + j * size, at + j * stride * size, size);
    at = raw;
  }
  if (kType == kFloat32) return load(reinterpret_cast<const float*>(at));
  return widen(*reinterpret_cast<const vh*>(at), kType == kBfloat16);
}

// x rounded to the dtype of the logits.
template <int kType>
static inline vf rounded_as(vf x) {
  if (kType == kFloat32) return x;
  if (kType == kFloat16) return rounded_to_float16(x);
  const vu bits = (vu)x, up = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return x == x ? (vf)up : x;
}

// Guided logits; each operation rounded to the dtype of the logits, save where guidance is in float32.
// A product is fma(a, b, 0), which no compiler joins with the sum after it.
template <int kType>
static inline vf guided(int guide, vf x, vf u, vf scale) {
  if (guide == kInFloat32) return fma(scale, x - u, u);
  const vf zero = splat(0.f), rest = scale - splat(1.f);
  if (guide == kWeighted)
    return rounded_as<kType>(rounded_as<kType>(fma(scale, x, zero)) - rounded_as<kType>(fma(rest, u, zero)));
  const vf start = guide == kFromCond ? x : u, weight = guide == kFromCond ? rest : scale;
  return rounded_as<kType>(start + rounded_as<kType>(fma(weight, rounded_as<kType>(x - u), zero)));
}

// Converts [begin, begin + n) into the buffer, padded with -inf to whole leaves; returns the maximum.
// Without kClean, NaN and +inf stay as they are.
template <int kType, bool kGuided, bool kStrided, bool kClean = true>
static inline float convert_span(const Row& r, int64_t begin, int n) {
  const StepParams& p = *r.p;
  const vf floor = splat(kNegInf), ceiling = splat(kFloatMax), guidance = splat(float(p.guidance_scale));
  const char *logits = r.logits, *uncond = r.uncond;
  const int64_t stride = kStrided ? p.logits.v : 1, uncond_stride = kStrided ? p.uncond.v : 1;
  float* out = r.buffer;
  vf top = floor;
  auto take = [&](int i, int valid) {
    vf x = load_elements<kType>(logits, begin + i, stride, valid);
    if (kGuided) {
      vf u = load_elements<kType>(uncond, begin + i, uncond_stride, valid);
      x = guided<kType>(p.guide, x, u, guidance);
    }
    return kClean ? vmin(vmax(x, floor), ceiling) : x;
  };
  int i = 0;
  for (; i + W <= n; i += W) {
    vf x = take(i, W);
    store(out + i, x);
    top = vmax(x, top);
  }
  if (i < n) {
    store(out + i, take(i, n - i));
    for (int j = n; j < i + W; ++j) out[j] = kNegInf;
    top = vmax(load(out + i), top);
    i += W;
  }
  for (; i % kLeaf != 0; i += W) store(out + i, floor);
  return hmax(top);
}

template <int kType, bool kClean>
static float convert_as(const Row& r, int64_t begin, int n) {
  const bool strided = r.p->logits.v != 1 || (r.uncond && r.p->uncond.v != 1);
  if (r.uncond) return strided ? convert_span<kType, true, true, kClean>(r, begin, n) : convert_span<kType, true, false, kClean>(r, begin, n);
  return strided ? convert_span<kType, false, true, kClean>(r, begin, n) : convert_span<kType, false, false, kClean>(r, begin, n);
}

template <int kType>
static float convert(const Row& r, int64_t begin, int n) {
  if (r.as_it_is) return convert_as<kType, false>(r, begin, n);
  if (r.uncond || r.p->logits.v != 1) return convert_as<kType, true>(r, begin, n);
  const float top = convert_as<kType, false>(r, begin, n);
  return top <= kFloatMax ? top : convert_as<kType, true>(r, begin, n);
}

static inline float max_in_place(const float* x, int n) {
  vf a = splat(kNegInf), b = a, c = a, d = a;
  int i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    a = vmax(load(x + i), a);
    b = vmax(load(x + i + W), b);
    c = vmax(load(x + i + 2 * W), c);
    d = vmax(load(x + i + 3 * W), d);
  }
  for (; i < n; i += W) a = vmax(load(x + i), a);
  return hmax(vmax(vmax(a, b), vmax(c, d)));
}

// Makes [begin, begin + n) available at r.x; returns its maximum.
static float load_chunk(Row& r, int64_t begin, int n, const Conditions& keep) {
  const StepParams& p = *r.p;
  const bool plain = p.num_banned == 0 && keep.n == 0 && !r.scoring;
  r.loaded = begin;
  r.ahead = r.logits + (begin + n) * p.logits.v * (p.dtype == kFloat32 ? 4 : 2);
  if (plain && p.dtype == kFloat32 && !r.uncond && p.logits.v == 1 && n % kLeaf == 0) {
    r.x = reinterpret_cast<const float*>(r.logits) + begin;
    float top = max_in_place(r.x, n);
    if (top <= kFloatMax) return top;
  }
  r.x = r.buffer;
  float top = p.dtype == kFloat32    ? convert<kFloat32>(r, begin, n)
              : p.dtype == kBfloat16 ? convert<kBfloat16>(r, begin, n)
                                     : convert<kFloat16>(r, begin, n);
  if (plain) return top;
  for (int64_t i = 0; i < p.num_banned; ++i)
    if (p.banned[i] >= begin && p.banned[i] < begin + n) r.buffer[p.banned[i] - begin] = kNegInf;
  for (int64_t i = 0; r.scoring && i < p.num_score_banned; ++i)
    if (p.score_banned[i] >= begin && p.score_banned[i] < begin + n) r.buffer[p.score_banned[i] - begin] = kNegInf;
  top = kNegInf;
  for (int i = 0; i < n; ++i) {
    if (keep.n && !survives(keep, r.buffer[i], begin + i)) r.buffer[i] = kNegInf;
    top = r.buffer[i] > top ? r.buffer[i] : top;
  }
  return top;
}

// Fetches as much of what will be read next as `count` logits from the i-th on take, while the
// exponentials of these keep the core busy; without it memory idles for as long.  The next chunk
// into L1, what lies a chunk further into L2: L1 alone cannot keep enough lines in flight.
static inline void prefetch_ahead(const Row& r, int i, int count) {
  if (r.cursor) return r.cursor->fetch(r.cursor->per_leaf * count / kLeaf);
  const int size = r.p->dtype == kFloat32 ? 4 : 2;
  for (int b = 0; b < count * size; b += 64) {
    const char* at = r.ahead + i * size + b;
    __builtin_prefetch(at), __builtin_prefetch(at + kChunk * 4, 0, 2);
  }
}

static inline int span_at(const Row& r, int64_t begin, int most) {
  int64_t left = r.p->vocab - begin;
  return left < most ? int(left) : most;
}
static inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

}  // namespace MASKGIT_ISA
}  // namespace maskgit
