// Python module maskgit._C: numbers and addresses in, nothing of any framework.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dispatch.h"
#include "thread_pool.h"

namespace py = pybind11;
using maskgit::StepParams;
using maskgit::Strided;

namespace {

// A property that takes an address as an integer; kernels/decode_step/cpu.py keeps the array alive.
template <class T>
void pointer(py::class_<StepParams>& c, const char* name, T* StepParams::* member) {
  c.def_property(
      name, [member](const StepParams& p) { return reinterpret_cast<uintptr_t>(p.*member); },
      [member](StepParams& p, uintptr_t address) { p.*member = reinterpret_cast<T*>(address); });
}

// A property that takes (address, stride of b, of n, of v) with strides in elements.
void strided(py::class_<StepParams>& c, const char* name, Strided StepParams::* member) {
  c.def_property(
      name, [](const StepParams&) { return py::none(); },
      [member](StepParams& p, const std::tuple<uintptr_t, int64_t, int64_t, int64_t>& a) {
        p.*member = Strided{reinterpret_cast<const void*>(std::get<0>(a)), std::get<1>(a), std::get<2>(a),
                            std::get<3>(a)};
      });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ core of the decode step";
  py::class_<StepParams> c(m, "StepParams");
  c.def(py::init<>());
  c.def(py::init<const StepParams&>());
  strided(c, "logits", &StepParams::logits);
  strided(c, "uncond", &StepParams::uncond);
  strided(c, "token_gumbel", &StepParams::token_gumbel);
  pointer(c, "tokens", &StepParams::tokens);
  pointer(c, "eligible", &StepParams::eligible);
  pointer(c, "masked_at_start", &StepParams::masked_at_start);
  pointer(c, "seeds", &StepParams::seeds);
  pointer(c, "positions", &StepParams::positions);
  pointer(c, "choice_noise", &StepParams::choice_noise);
  pointer(c, "score_banned", &StepParams::score_banned);
  pointer(c, "num_commit", &StepParams::num_commit);
  pointer(c, "remask_bounds", &StepParams::remask_bounds);
  pointer(c, "scores", &StepParams::scores);
  pointer(c, "banned", &StepParams::banned);
  pointer(c, "table", &StepParams::table);
  pointer(c, "next_tokens", &StepParams::next_tokens);
  pointer(c, "candidates", &StepParams::candidates);
  pointer(c, "confidence", &StepParams::confidence);
  pointer(c, "log_z", &StepParams::log_z);
#define MASKGIT_NUMBER(name) c.def_readwrite(#name, &StepParams::name)
  MASKGIT_NUMBER(batch);
  MASKGIT_NUMBER(length);
  MASKGIT_NUMBER(vocab);
  MASKGIT_NUMBER(dtype);
  MASKGIT_NUMBER(guidance_scale);
  MASKGIT_NUMBER(noise_is_double);
  MASKGIT_NUMBER(draw_choice_noise);
  MASKGIT_NUMBER(num_banned);
  MASKGIT_NUMBER(mask_token_id);
  MASKGIT_NUMBER(vocab_start);
  MASKGIT_NUMBER(step);
  MASKGIT_NUMBER(sample_temperature);
  MASKGIT_NUMBER(score_temperature);
  MASKGIT_NUMBER(choice_temperature);
  MASKGIT_NUMBER(greedy_on_probs);
  MASKGIT_NUMBER(score);
  MASKGIT_NUMBER(score_filtered);
  MASKGIT_NUMBER(score_rounding);
  MASKGIT_NUMBER(count);
  MASKGIT_NUMBER(cut);
  MASKGIT_NUMBER(count_rows);
  MASKGIT_NUMBER(revise);
  MASKGIT_NUMBER(edits);
  MASKGIT_NUMBER(remasks);
  MASKGIT_NUMBER(skip_mask_token);
  MASKGIT_NUMBER(filter_temperature);
  MASKGIT_NUMBER(guidance_rounds);
  MASKGIT_NUMBER(top_p_below);
  MASKGIT_NUMBER(num_score_banned);
  MASKGIT_NUMBER(remask_below);
  MASKGIT_NUMBER(edit_threshold);
  MASKGIT_NUMBER(low_threshold);
  MASKGIT_NUMBER(threshold_slack);
  MASKGIT_NUMBER(threshold_strict);
  MASKGIT_NUMBER(has_slack);
  MASKGIT_NUMBER(min_is_quota);
  MASKGIT_NUMBER(commit_all);
  MASKGIT_NUMBER(base_is_positions);
  MASKGIT_NUMBER(table_size);
  MASKGIT_NUMBER(commit_fraction);
  MASKGIT_NUMBER(commit_below);
  MASKGIT_NUMBER(threshold);
  MASKGIT_NUMBER(factor);
  MASKGIT_NUMBER(factor_tail);
  MASKGIT_NUMBER(num_threads);
#undef MASKGIT_NUMBER
  c.def_property(
      "clamps", [](const StepParams&) { return py::none(); },
      [](StepParams& p, const std::vector<int>& clamps) {
        if (clamps.size() > 2) throw py::value_error("clamps: expected at most 2");
        for (size_t i = 0; i < 2; ++i) p.clamps[i] = i < clamps.size() ? clamps[i] : maskgit::kNoClamp;
      });
  c.def("set_filters", [](StepParams& p, const std::vector<std::pair<int, double>>& filters) {
    if (filters.size() > 5) throw py::value_error("filters: expected at most 5");
    p.num_filters = static_cast<int>(filters.size());
    for (size_t i = 0; i < filters.size(); ++i) p.filters[i] = filters[i].first, p.filter_values[i] = filters[i].second;
  });
  m.def("decode_step", &maskgit::decode_step, py::call_guard<py::gil_scoped_release>());
  m.def("sample_tokens", &maskgit::sample_tokens, py::call_guard<py::gil_scoped_release>());
  m.def("supported_implementations", &maskgit::supported_implementations);
  m.def("active_implementation", &maskgit::active_implementation);
  m.def("use_openmp", &maskgit::use_openmp, py::arg("gomp_parallel"));
  m.def("set_implementation", &maskgit::set_implementation, py::arg("name"));
}
