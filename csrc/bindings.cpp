// Python module maskgit._C: numbers and arrays (anything with a buffer) in, nothing of any framework.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string_view>
#include <type_traits>
#include <unordered_map>

#include "dispatch.h"
#include "ffi.h"
#include "thread_pool.h"

namespace py = pybind11;
using maskgit::StepParams;
using maskgit::Strided;

namespace {

// Takes the memory of an array; what is made of it keeps the arrays alive.
using Take = void (*)(StepParams&, PyObject*);

// A C-contiguous array.
template <auto member>
void take(StepParams& p, PyObject* array) {
  Py_buffer view;
  if (PyObject_GetBuffer(array, &view, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  p.*member = static_cast<std::remove_reference_t<decltype(p.*member)>>(view.buf);
  PyBuffer_Release(&view);
}

// A (B, N, V) array of any strides that are whole elements.
template <Strided StepParams::* member>
void take_strided(StepParams& p, PyObject* array) {
  Py_buffer view;
  if (PyObject_GetBuffer(array, &view, PyBUF_STRIDES) != 0) throw py::error_already_set();
  const bool fits = view.ndim == 3;
  if (fits)
    p.*member = Strided{view.buf, view.strides[0] / view.itemsize, view.strides[1] / view.itemsize,
                        view.strides[2] / view.itemsize};
  PyBuffer_Release(&view);
  if (!fits) throw py::value_error("expected an array of three dimensions");
}

const std::unordered_map<std::string_view, Take> kArrays = {
    {"logits", take_strided<&StepParams::logits>},
    {"uncond", take_strided<&StepParams::uncond>},
    {"token_gumbel", take_strided<&StepParams::token_gumbel>},
    {"tokens", take<&StepParams::tokens>},
    {"eligible", take<&StepParams::eligible>},
    {"masked_at_start", take<&StepParams::masked_at_start>},
    {"seeds", take<&StepParams::seeds>},
    {"positions", take<&StepParams::positions>},
    {"choice_noise", take<&StepParams::choice_noise>},
    {"score_banned", take<&StepParams::score_banned>},
    {"num_commit", take<&StepParams::num_commit>},
    {"remask_bounds", take<&StepParams::remask_bounds>},
    {"scores", take<&StepParams::scores>},
    {"banned", take<&StepParams::banned>},
    {"table", take<&StepParams::table>},
    {"next_tokens", take<&StepParams::next_tokens>},
    {"candidates", take<&StepParams::candidates>},
    {"confidence", take<&StepParams::confidence>},
    {"log_z", take<&StepParams::log_z>},
};

StepParams with_arrays(StepParams p, const py::dict& arrays) {
  for (const auto& [key, array] : arrays) {
    Py_ssize_t size = 0;
    const char* name = PyUnicode_AsUTF8AndSize(key.ptr(), &size);
    if (name == nullptr) throw py::error_already_set();
    const auto found = kArrays.find(std::string_view(name, static_cast<size_t>(size)));
    if (found == kArrays.end()) throw py::key_error(name);
    found->second(p, array.ptr());
  }
  return p;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ core of the decode step";
  py::class_<StepParams> c(m, "StepParams");
  c.def(py::init([](const py::dict& arrays) { return with_arrays({}, arrays); }), py::keep_alive<1, 2>());
  c.def(py::init(&with_arrays), py::keep_alive<1, 2>(), py::keep_alive<1, 3>());
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
  MASKGIT_NUMBER(guide);
  MASKGIT_NUMBER(top_p_below);
  MASKGIT_NUMBER(num_score_banned);
  MASKGIT_NUMBER(remask_below);
  MASKGIT_NUMBER(edit_threshold);
  MASKGIT_NUMBER(compare_rounding);
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
  c.def("to_bytes", [](StepParams p) {  // without what points into this process
    p.logits = p.uncond = p.token_gumbel = Strided{};
    p.tokens = p.masked_at_start = p.banned = p.score_banned = p.num_commit = nullptr;
    p.eligible = nullptr, p.seeds = p.positions = nullptr, p.table = nullptr;
    p.choice_noise = nullptr, p.scores = p.remask_bounds = nullptr;
    p.next_tokens = p.candidates = nullptr, p.confidence = p.log_z = nullptr;
    return py::bytes(reinterpret_cast<const char*>(&p), sizeof p);
  });
  m.def("ffi_handlers", [] {
    py::dict found;
    for (const auto& [name, handler] : maskgit::ffi_handlers()) found[name.c_str()] = py::capsule(handler);
    return found;
  });
  m.def("decode_step", &maskgit::decode_step, py::call_guard<py::gil_scoped_release>());
  m.def("sample_tokens", &maskgit::sample_tokens, py::call_guard<py::gil_scoped_release>());
  m.def("supported_implementations", &maskgit::supported_implementations);
  m.def("active_implementation", &maskgit::active_implementation);
  m.def("use_openmp", &maskgit::use_openmp, py::arg("gomp_parallel"));
  m.def("set_implementation", &maskgit::set_implementation, py::arg("name"));
}
