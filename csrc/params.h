// What one call of the decode step gets: plain pointers, sizes and numbers, no framework types.
#pragma once
#include <cstdint>

namespace maskgit {

enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum Score : int { kProb, kLogProb, kTop1Prob, kMargin, kNegEntropy, kLogit, kRandom, kGiven };
enum Count : int { kMasked, kQuota, kFraction, kBernoulli, kThreshold, kFactor, kEntropyBound, kRuns, kGivenCount };
enum CountRows : int { kEach, kFirst, kMean, kSum };
enum Clamp : int { kNoClamp, kCommitOne, kKeepOne };
enum Revise : int { kNever, kHeld, kDrawn };
enum Cut : int { kStrict, kInclusive, kExact };
enum Guidance : int { kInFloat32 = 1, kFromUncond, kFromCond, kWeighted };
enum Filter : int { kTemperature, kTopK, kTopP, kMinP, kTypicalP };
enum Rounding : int { kToFloat32, kToFloat64, kToBfloat16, kToFloat16 };

struct Strided {  // a (B, N, V) array; strides in elements
  const void* data = nullptr;
  int64_t b = 0, n = 0, v = 1;
};

struct StepParams {
  int64_t batch = 0, length = 0, vocab = 0;
  int dtype = kFloat32;
  Strided logits, uncond, token_gumbel;
  int noise_is_double = 0;  // token_gumbel is float64, else float32
  double guidance_scale = 1.0;

  const int64_t* tokens = nullptr;          // (B, N) contiguous, as all below
  const uint8_t* eligible = nullptr;        // (B, N)
  const int64_t* masked_at_start = nullptr; // (B)
  const uint32_t* seeds = nullptr;          // (B, 2) key words
  const uint32_t* positions = nullptr;      // (B, N)
  double* choice_noise = nullptr;           // (B, N): the caller's, or drawn here
  int draw_choice_noise = 0;
  const double* scores = nullptr;           // (B, N) for score given
  const int64_t* banned = nullptr;          // column indices after vocab_slice
  int64_t num_banned = 0;
  const int64_t* score_banned = nullptr;    // columns outside the score's softmax alone
  int64_t num_score_banned = 0;
  const int64_t* num_commit = nullptr;      // (B) for count given
  const double* remask_bounds = nullptr;    // (B, N), or null where remask_below holds for all
  int64_t mask_token_id = 0, vocab_start = 0;
  uint32_t step = 0;

  double sample_temperature = 1.0, filter_temperature = 1.0, score_temperature = 1.0, choice_temperature = 0.0;
  int guide = kInFloat32, top_p_below = 0;
  int greedy_on_probs = 0, score = kLogProb, score_filtered = 0, score_rounding = kToFloat32;
  int compare_rounding = kToFloat32;  // of what is computed to be compared with scores
  int num_filters = 0;
  int filters[5] = {};
  double filter_values[5] = {};

  int count = kMasked, cut = kExact, count_rows = kEach, commit_all = 0;
  int clamps[2] = {kCommitOne, kKeepOne};  // in this order
  int revise = kNever, edits = 0, remasks = 0, skip_mask_token = 0;
  int base_is_positions = 0;
  const int32_t* table = nullptr;
  int64_t table_size = 0;
  float commit_fraction = 0.f;
  double commit_below = 0.0, remask_below = 0.0, threshold = 0.0, factor = 0.0;
  double low_threshold = 0.0, threshold_slack = 0.0, edit_threshold = 0.0;
  int factor_tail = 1, threshold_strict = 0, has_slack = 0, min_is_quota = 0;

  int64_t* next_tokens = nullptr;  // (B, N); null in sample_tokens
  int64_t* candidates = nullptr;   // (B, N)
  double* confidence = nullptr;    // (B, N)
  double* log_z = nullptr;         // (B, N) or null
  int num_threads = 1;
};

// Without logits the candidates and their scores are given, and only choice noise is drawn.
// Scores the rows [begin, end) of `rows` (flat positions b * N + n): candidate or -1, score, log_z.
using ScoreRows = void (*)(const StepParams&, const int64_t* rows, int64_t begin, int64_t end);

struct Implementation {
  const char* name;
  bool (*is_supported)();
  ScoreRows score_rows;
};

}  // namespace maskgit
