// The core as XLA FFI handlers, so that jitted JAX programs on the CPU call it on their own buffers.
//
// A handler gets the parameters that are no arrays as the bytes of a StepParams (without its pointers), in
// the first of its arguments, and the arrays by name after it.  Logits and noise are read where XLA has them; what the core wants in
// another integer or floating type, all of it (B, N) or smaller, is converted here.
#include "ffi.h"

#include <cstring>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "dispatch.h"
#include "xla_ffi.h"

namespace maskgit {
namespace {

namespace ffi = xla;

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

const int64_t* as_integers(const ffi::Buffer& x, Converted& own) {
  if (x.dtype == ffi::DataType::S64) return static_cast<const int64_t*>(x.data);
  auto& to = own.integers.emplace_back(x.element_count());
  convert<int32_t>(x.data, to.size(), to.data());
  return to.data();
}

double* as_numbers(const ffi::Buffer& x, Converted& own) {
  auto& to = own.numbers.emplace_back(x.element_count());
  if (x.dtype == ffi::DataType::F64)
    convert<double>(x.data, to.size(), to.data());
  else
    convert<float>(x.data, to.size(), to.data());
  return to.data();
}

Strided as_strided(const ffi::Buffer& x) {
  return Strided{x.data, x.dims[1] * x.dims[2], x.dims[2], 1};
}

void give_back(const std::vector<int64_t>& from, const ffi::Buffer& to) {
  if (to.dtype == ffi::DataType::S64)
    convert<int64_t>(from.data(), from.size(), static_cast<int64_t*>(to.data));
  else
    convert<int64_t>(from.data(), from.size(), static_cast<int32_t*>(to.data));
}

void give_back(const std::vector<double>& from, const ffi::Buffer& to) {
  if (to.dtype == ffi::DataType::F64)
    convert<double>(from.data(), from.size(), static_cast<double*>(to.data));
  else
    convert<double>(from.data(), from.size(), static_cast<float*>(to.data));
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
bool set(std::string_view name, const ffi::Buffer& x, StepParams& p, Converted& own,
         std::vector<int64_t>& candidates, std::vector<double>& confidence, std::vector<double>& noise) {
  const void* data = x.data;
  if (name == "logits") {
    p.logits = as_strided(x), p.vocab = x.dims[2];
  } else if (name == "uncond_logits") {
    p.uncond = as_strided(x);
  } else if (name == "token_gumbel") {
    p.token_gumbel = as_strided(x), p.noise_is_double = x.dtype == ffi::DataType::F64;
  } else if (name == "tokens") {
    p.tokens = as_integers(x, own), p.batch = x.dims[0], p.length = x.dims[1];
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

// The attributes of a call.
struct Call {
  std::string_view names;  // of the arrays, with commas between
  int64_t num_threads = 0;
};

bool read(const ffi::Attributes& given, Call& call) {
  for (int64_t i = 0; i < given.size; ++i) {
    const std::string_view name(given.names[i]->data, given.names[i]->size);
    const void* value = given.values[i];
    if (name == "names" && given.kinds[i] == ffi::kString) {
      const auto* text = static_cast<const ffi::Text*>(value);
      call.names = {text->data, text->size};
    } else if (name == "threads" && given.kinds[i] == ffi::kScalar) {
      const auto* number = static_cast<const ffi::Scalar*>(value);
      if (number->dtype == ffi::DataType::S64) call.num_threads = *static_cast<const int64_t*>(number->value);
    }
  }
  return call.num_threads > 0;
}

// Runs a call; what is wrong with it, or nothing.
std::string run(bool is_step, const ffi::Buffers& args, const ffi::Buffers& rets, const Call& call) {
  StepParams p;
  const bool fits = args.size > 0 && args.kinds[0] == ffi::kBuffer && args.each[0]->dtype == ffi::DataType::U8;
  if (!fits || args.each[0]->element_count() != sizeof(StepParams)) return "parameters of another build";
  std::memcpy(static_cast<void*>(&p), args.each[0]->data, sizeof(StepParams));
  const size_t count = static_cast<size_t>(args.size);
  Converted own;
  own.integers.reserve(count), own.numbers.reserve(count);
  std::vector<int64_t> candidates, next;
  std::vector<double> confidence, noise, log_z;
  std::string_view names = call.names;
  for (size_t i = 1; i < count; ++i) {
    const size_t end = names.find(',');
    const std::string_view name = names.substr(0, end);
    if (args.kinds[i] != ffi::kBuffer || !is_read(name, args.each[i]->dtype))
      return "another type of " + std::string(name) + " expected";
    if (!set(name, *args.each[i], p, own, candidates, confidence, noise)) return "unknown field " + std::string(name);
    names = end == std::string_view::npos ? std::string_view() : names.substr(end + 1);
  }
  const size_t rows = static_cast<size_t>(p.batch * p.length);
  for (int64_t i = 0; i < 3; ++i) {
    const bool fits = rets.size == 3 && rets.kinds[i] == ffi::kBuffer && rets.each[i]->element_count() == rows &&
                      is_written(rets.each[i]->dtype, i < (is_step ? 2 : 1));
    if (!fits) return "another size or type of results expected";
  }
  candidates.resize(rows), confidence.resize(rows), noise.resize(rows), next.resize(rows), log_z.resize(rows);
  p.candidates = candidates.data(), p.confidence = confidence.data();
  p.num_threads = static_cast<int>(call.num_threads);
  if (is_step) {
    p.next_tokens = next.data(), p.choice_noise = noise.data();
    decode_step(p);
    give_back(next, *rets.each[0]), give_back(candidates, *rets.each[1]), give_back(confidence, *rets.each[2]);
  } else {
    p.log_z = log_z.data(), p.draw_choice_noise = 0;
    sample_tokens(p);
    give_back(candidates, *rets.each[0]), give_back(confidence, *rets.each[1]), give_back(log_z, *rets.each[2]);
  }
  return {};
}

ffi::Error* error(const ffi::CallFrame& frame, const std::string& message, int code) {
  ffi::NewError made{{sizeof(ffi::NewError), nullptr}, message.c_str(), code};
  return frame.api->create_error(&made);
}

// Whether XLA only asked which version of the interface this is.
bool answered(const ffi::CallFrame& frame) {
  for (ffi::Extension* asked = frame.extensions; asked != nullptr; asked = asked->next) {
    if (asked->type != ffi::kMetadata) continue;
    ffi::Metadata* about = static_cast<ffi::MetadataExtension*>(asked)->metadata;
    about->version = {{sizeof(ffi::Version), nullptr}, ffi::kMajor, ffi::kMinor};
    about->traits = 0;
    return true;
  }
  return false;
}

template <bool is_step>
ffi::Error* handle(ffi::CallFrame* frame) {
  if (answered(*frame)) return nullptr;
  try {
    Call call;
    if (frame->stage != ffi::kExecute || !read(frame->attributes, call))
      return error(*frame, "names and threads expected, in a call to be executed", ffi::kInvalidArgument);
    const std::string wrong = run(is_step, frame->args, frame->rets, call);
    return wrong.empty() ? nullptr : error(*frame, wrong, ffi::kInvalidArgument);
  } catch (const std::exception& caught) {
    return error(*frame, caught.what(), ffi::kInternal);
  }
}

}  // namespace

std::vector<std::pair<std::string, void*>> ffi_handlers() {
  return {{"maskgit_decode_step", reinterpret_cast<void*>(&handle<true>)},
          {"maskgit_sample_tokens", reinterpret_cast<void*>(&handle<false>)}};
}

}  // namespace maskgit
