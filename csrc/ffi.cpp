// The core as XLA FFI handlers, so that jitted JAX programs on the CPU call it on their own buffers.
//
// A handler gets the parameters that depend on the rule alone as the bytes of a StepParams (without its
// pointers), and the arrays by name.  Logits and noise are read where XLA has them; what the core wants in
// another integer or floating type, all of it (B, N) or smaller, is converted here.
#include "ffi.h"

#ifdef MASKGIT_WITH_FFI
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "dispatch.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace maskgit {
namespace {

// What a call owns until it ends.
struct Converted {
  std::vector<std::vector<int64_t>> integers;
  std::vector<std::vector<double>> numbers;
};

template <class From, class To>
void convert(const void* from, size_t count, To* to) {
  const From* source = static_cast<const From*>(from);
  for (size_t i = 0; i < count; ++i) to[i] = static_cast<To>(source[i]);
}

const int64_t* as_integers(const ffi::AnyBuffer& x, Converted& own) {
  if (x.element_type() == ffi::DataType::S64) return static_cast<const int64_t*>(x.untyped_data());
  auto& to = own.integers.emplace_back(x.element_count());
  convert<int32_t>(x.untyped_data(), to.size(), to.data());
  return to.data();
}

double* as_numbers(const ffi::AnyBuffer& x, Converted& own) {
  auto& to = own.numbers.emplace_back(x.element_count());
  if (x.element_type() == ffi::DataType::F64)
    convert<double>(x.untyped_data(), to.size(), to.data());
  else
    convert<float>(x.untyped_data(), to.size(), to.data());
  return to.data();
}

Strided as_strided(const ffi::AnyBuffer& x) {
  const auto dims = x.dimensions();
  return Strided{x.untyped_data(), dims[1] * dims[2], dims[2], 1};
}

void give_back(const std::vector<int64_t>& from, ffi::AnyBuffer to) {
  if (to.element_type() == ffi::DataType::S64)
    convert<int64_t>(from.data(), from.size(), static_cast<int64_t*>(to.untyped_data()));
  else
    convert<int64_t>(from.data(), from.size(), static_cast<int32_t*>(to.untyped_data()));
}

void give_back(const std::vector<double>& from, ffi::AnyBuffer to) {
  if (to.element_type() == ffi::DataType::F64)
    convert<double>(from.data(), from.size(), static_cast<double*>(to.untyped_data()));
  else
    convert<double>(from.data(), from.size(), static_cast<float*>(to.untyped_data()));
}

// Whether the handler reads the field `name` in this type.
bool is_read(std::string_view name, ffi::DataType type) {
  using T = ffi::DataType;
  if (name == "logits" || name == "uncond_logits") return type == T::F32 || type == T::BF16 || type == T::F16;
  if (name == "eligible") return type == T::PRED;
  if (name == "seeds" || name == "positions") return type == T::U32;
  if (name == "table") return type == T::S32;
  for (const char* number : {"token_gumbel", "choice_gumbel", "remask_bounds", "scores", "drawn_scores", "guidance_scale"})
    if (name == number) return type == T::F32 || type == T::F64;
  return type == T::S32 || type == T::S64;
}

// Whether a result of this type is written: integers or numbers.
bool is_written(ffi::DataType type, bool integers) {
  using T = ffi::DataType;
  return integers ? type == T::S32 || type == T::S64 : type == T::F32 || type == T::F64;
}

// Sets the field `name` of the parameters to the array; false for an unknown name.
bool set(std::string_view name, const ffi::AnyBuffer& x, StepParams& p, Converted& own,
         std::vector<int64_t>& candidates, std::vector<double>& confidence, std::vector<double>& noise) {
  const void* data = x.untyped_data();
  if (name == "logits") {
    p.logits = as_strided(x), p.vocab = x.dimensions()[2];
  } else if (name == "uncond_logits") {
    p.uncond = as_strided(x);
  } else if (name == "token_gumbel") {
    p.token_gumbel = as_strided(x), p.noise_is_double = x.element_type() == ffi::DataType::F64;
  } else if (name == "tokens") {
    p.tokens = as_integers(x, own), p.batch = x.dimensions()[0], p.length = x.dimensions()[1];
  } else if (name == "eligible") {
    p.eligible = static_cast<const uint8_t*>(data);
  } else if (name == "num_masked_at_start") {
    p.masked_at_start = as_integers(x, own);
  } else if (name == "num_commit") {
    p.num_commit = as_integers(x, own);
  } else if (name == "seeds") {
    p.seeds = static_cast<const uint32_t*>(data);
  } else if (name == "positions") {
    p.positions = static_cast<const uint32_t*>(data);
  } else if (name == "choice_gumbel") {
    const double* from = as_numbers(x, own);
    noise.assign(from, from + x.element_count()), p.draw_choice_noise = 0;
  } else if (name == "remask_bounds") {
    p.remask_bounds = as_numbers(x, own);
  } else if (name == "scores") {
    p.scores = as_numbers(x, own);
  } else if (name == "drawn") {
    const int64_t* from = as_integers(x, own);
    candidates.assign(from, from + x.element_count());
  } else if (name == "drawn_scores") {
    const double* from = as_numbers(x, own);
    confidence.assign(from, from + x.element_count());
  } else if (name == "banned") {
    p.banned = as_integers(x, own), p.num_banned = static_cast<int64_t>(x.element_count());
  } else if (name == "score_banned") {
    p.score_banned = as_integers(x, own), p.num_score_banned = static_cast<int64_t>(x.element_count());
  } else if (name == "table") {
    p.table = static_cast<const int32_t*>(data), p.table_size = static_cast<int64_t>(x.element_count());
  } else if (name == "guidance_scale") {
    p.guidance_scale = *as_numbers(x, own);
  } else {
    return false;
  }
  return true;
}

ffi::Error run(bool is_step, ffi::RemainingArgs args, ffi::RemainingRets rets, std::string_view names,
               ffi::Span<const uint8_t> bytes, int64_t num_threads) {
  StepParams p;
  if (bytes.size() != sizeof(StepParams)) return ffi::Error::InvalidArgument("parameters of another build");
  std::memcpy(static_cast<void*>(&p), bytes.begin(), sizeof(StepParams));
  Converted own;
  own.integers.reserve(args.size()), own.numbers.reserve(args.size());
  std::vector<int64_t> candidates, next;
  std::vector<double> confidence, noise, log_z;
  for (size_t i = 0; i < args.size(); ++i) {
    const size_t end = names.find(',');
    const auto buffer = args.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    const std::string_view name = names.substr(0, end);
    if (!is_read(name, buffer->element_type()))
      return ffi::Error::InvalidArgument("another type of " + std::string(name) + " expected");
    if (!set(name, *buffer, p, own, candidates, confidence, noise))
      return ffi::Error::InvalidArgument("unknown field " + std::string(name));
    names = end == std::string_view::npos ? std::string_view() : names.substr(end + 1);
  }
  const size_t rows = static_cast<size_t>(p.batch * p.length);
  candidates.resize(rows), confidence.resize(rows), noise.resize(rows), next.resize(rows), log_z.resize(rows);
  p.candidates = candidates.data(), p.confidence = confidence.data();
  p.num_threads = static_cast<int>(num_threads);
  if (is_step) {
    p.next_tokens = next.data(), p.choice_noise = noise.data();
    decode_step(p);
  } else {
    p.log_z = log_z.data(), p.draw_choice_noise = 0;
    sample_tokens(p);
  }
  std::vector<ffi::AnyBuffer> out;
  for (size_t i = 0; i < 3; ++i) {
    auto buffer = rets.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    out.push_back(**buffer);
    const bool fits = out[i].element_count() == rows && is_written(out[i].element_type(), i < (is_step ? 2 : 1));
    if (!fits) return ffi::Error::InvalidArgument("another size or type of results expected");
  }
  if (is_step) give_back(next, out[0]);
  give_back(candidates, out[is_step ? 1 : 0]), give_back(confidence, out[is_step ? 2 : 1]);
  if (!is_step) give_back(log_z, out[2]);
  return ffi::Error::Success();
}

ffi::Error step(ffi::RemainingArgs args, ffi::RemainingRets rets, std::string_view names,
                ffi::Span<const uint8_t> bytes, int64_t threads) {
  return run(true, args, rets, names, bytes, threads);
}

ffi::Error sample(ffi::RemainingArgs args, ffi::RemainingRets rets, std::string_view names,
                  ffi::Span<const uint8_t> bytes, int64_t threads) {
  return run(false, args, rets, names, bytes, threads);
}

auto binding() {
  return ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attr<std::string_view>("names").Attr<ffi::Span<const uint8_t>>("params").Attr<int64_t>("threads");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER(StepHandler, step, binding());
XLA_FFI_DEFINE_HANDLER(SampleHandler, sample, binding());

std::vector<std::pair<std::string, void*>> ffi_handlers() {
  return {{"maskgit_decode_step", reinterpret_cast<void*>(StepHandler)},
          {"maskgit_sample_tokens", reinterpret_cast<void*>(SampleHandler)}};
}

}  // namespace maskgit

#else

namespace maskgit {
std::vector<std::pair<std::string, void*>> ffi_handlers() { return {}; }
}  // namespace maskgit

#endif
