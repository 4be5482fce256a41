// The Python module fused_tricks._extension.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/kernels.h"
#include "../cpu/step.h"
#if defined(FUSED_TRICKS_CUDA)
#include "../cuda/step.h"
#endif
#include "../cpu/threads.h"
#include "plan_guard.h"

// The emulation of the CUDA kernels is built from the same sources as a module of another name.
#if !defined(FUSED_TRICKS_MODULE)
#define FUSED_TRICKS_MODULE _extension
#endif

namespace fused_tricks {
namespace {

// Same numbers as Outcome in fused_tricks/step/request.py.
enum Outcome : int { kStale = 0, kSkipped = 1, kApplied = 2 };

void connect(const py::object& tensor_type, const py::object& parameter_type, const py::object& increment_version,
             const py::dict& functions, const py::list& samples, const py::object& negative) {
  connect_torch(tensor_type, parameter_type, increment_version, functions, samples, negative);
  void* parallel_for = nullptr;
  if (functions.contains("torch_parallel_for")) {
    parallel_for = reinterpret_cast<void*>(functions["torch_parallel_for"].cast<uintptr_t>());
  }
  set_parallel_for(parallel_for);
}

double number(const py::handle& object) {
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// Returns the keys of a table of options.
template <typename T, size_t N>
std::vector<std::string> keys_of(const Option<T> (&options)[N]) {
  std::vector<std::string> keys;
  for (const Option<T>& option : options) keys.emplace_back(option.key);
  return keys;
}

py::handle interned(const char* text) { return PyUnicode_InternFromString(text); }

// The attributes of StepRequest (fused_tricks/step/request.py) and ScaleRule (fused_tricks/loss_scale.py).
struct Names {
  py::handle unscales = interned("unscales");
  py::handle grad_scale = interned("grad_scale");
  py::handle found_inf = interned("found_inf");
  py::handle max_norm = interned("max_norm");
  py::handle scale_rule = interned("scale_rule");
  py::handle growth_factor = interned("growth_factor");
  py::handle backoff_factor = interned("backoff_factor");
  py::handle min_scale = interned("min_scale");
  py::handle max_scale = interned("max_scale");
  py::handle growth_interval = interned("growth_interval");
  py::handle hysteresis = interned("hysteresis");
};

const Names& names() {
  static const Names all;
  return all;
}

ScaleRule scale_rule_of(const py::object& rule) {
  return {number(rule.attr(names().growth_factor)),
          number(rule.attr(names().backoff_factor)),
          static_cast<float>(number(rule.attr(names().min_scale))),
          static_cast<float>(number(rule.attr(names().max_scale))),
          static_cast<int32_t>(number(rule.attr(names().growth_interval))),
          static_cast<int32_t>(number(rule.attr(names().hysteresis)))};
}

// Converts a StepRequest, except a GradScaler's grad_scale and found_inf: the CPU step reads both as numbers, and the
// CUDA kernels read both as tensors.
StepRequest request_of(const py::object& asked) {
  const py::object max_norm = asked.attr(names().max_norm), rule = asked.attr(names().scale_rule);
  StepRequest request{};
  request.unscales = asked.attr(names().unscales).ptr() == Py_True;
  request.external = !asked.attr(names().grad_scale).is_none();
  request.grad_scale = 1.0f;
  request.wants_norm = !max_norm.is_none();
  if (request.wants_norm) request.max_norm = number(max_norm);
  request.dynamic = !rule.is_none();
  if (request.dynamic) request.rule = scale_rule_of(rule);
  return request;
}

// Marks a plan guard as running during a step. `began` returns false if another step over the plan is running.
class Running {
 public:
  explicit Running(PlanGuard& guard) : guard_(guard), began_(!guard.is_running) { guard.is_running = true; }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;
  ~Running() {
    if (!began_) return;
    guard_.release_gradients();
    guard_.is_running = false;
  }

  bool began() const { return began_; }

 private:
  PlanGuard& guard_;
  bool began_;
};

// Returns (addresses, in_double) for kernels that Python launches; None if the plan is stale. An address is 0 without a
// gradient. The gradients live until `release_gradients`.
py::object gradient_addresses(PlanGuard& guard, const py::list& groups, const py::dict& state) {
  guard.release_gradients();
  if (!guard.refresh(groups, state)) {
    guard.release_gradients();
    return py::none();
  }
  const std::vector<Entry>& entries = guard.plan.entries;
  py::list addresses(entries.size());
  for (size_t i = 0; i < entries.size(); ++i) addresses[i] = reinterpret_cast<uintptr_t>(entries[i].grad);
  return py::make_tuple(addresses, guard.plan.in_double);
}

cpu::Step make_cpu_step(const PlanGuard& guard) { return cpu::Step(guard.plan); }

int cpu_step(cpu::Step& step, PlanGuard& guard, const py::list& groups, const py::dict& state,
             const py::object& asked) {
  StepRequest request = request_of(asked);
  if (request.external) request.grad_scale = static_cast<float>(number(asked.attr(names().grad_scale)));
  const py::object found_inf = asked.attr(names().found_inf);
  request.found_inf = !found_inf.is_none() && number(found_inf) != 0;
  const Running running(guard);
  if (!running.began() || !guard.refresh(groups, state)) return kStale;
  request.in_double = guard.plan.in_double;
  bool is_applied;
  {
    const py::gil_scoped_release release;
    is_applied = step.run(guard.plan, request);
  }
  if (!is_applied) return kSkipped;
  guard.mark_updated();
  return kApplied;
}

// Returns the byte offset of each field of StepState by name.
py::dict step_state_offsets() {
  py::dict offsets;
#define FUSED_TRICKS_FIELD(name) offsets[#name] = offsetof(StepState, name)
  FUSED_TRICKS_FIELD(scale);
  FUSED_TRICKS_FIELD(growth_tracker);
  FUSED_TRICKS_FIELD(hysteresis_tracker);
  FUSED_TRICKS_FIELD(found_inf);
  FUSED_TRICKS_FIELD(applied_steps);
  FUSED_TRICKS_FIELD(skipped_steps);
  FUSED_TRICKS_FIELD(skip);
  FUSED_TRICKS_FIELD(inverse_scale);
  FUSED_TRICKS_FIELD(clip);
  FUSED_TRICKS_FIELD(arrivals);
  FUSED_TRICKS_FIELD(skipped_in_a_row);
  FUSED_TRICKS_FIELD(grad_norm);
#undef FUSED_TRICKS_FIELD
  return offsets;
}

#if defined(FUSED_TRICKS_CUDA)

cuda::Target target_of(const PlanGuard& guard) { return {guard.device.index, current_stream(guard.device)}; }

cuda::Step make_cuda_step(const PlanGuard& guard) { return cuda::Step(guard.plan); }

void set_cuda_tables(cuda::Step& step, const PlanGuard& guard, const py::object& memory) {
  step.set_tables(data_of(memory), target_of(guard));
}

void set_cuda_scratch(cuda::Step& step, const py::object& memory) { step.set_scratch(data_of(memory)); }

int cuda_step(cuda::Step& step, PlanGuard& guard, const py::list& groups, const py::dict& state,
              const py::object& asked) {
  StepRequest request = request_of(asked);
  const Running running(guard);
  if (!running.began() || !guard.refresh(groups, state)) return kStale;
  request.in_double = guard.plan.in_double;
  const cuda::External external{static_cast<const float*>(data_of(asked.attr(names().grad_scale))),
                                static_cast<const float*>(data_of(asked.attr(names().found_inf)))};
  step.run(guard.plan, request, external, target_of(guard));
  guard.mark_updated();
  return kApplied;
}

#endif

PYBIND11_MODULE(FUSED_TRICKS_MODULE, module) {
  module.def("connect", &connect, py::arg("tensor_type"), py::arg("parameter_type"), py::arg("increment_version"),
             py::arg("functions"), py::arg("samples"), py::arg("negative"));
  module.def("step_state_offsets", &step_state_offsets);
  module.attr("STATE_TENSORS") = std::vector<std::string>(std::begin(kStateKeys), std::end(kStateKeys));
  module.attr("PARTIALS") = std::vector<std::string>(std::begin(kPartialNames), std::end(kPartialNames));
  module.attr("NUMBERS") = keys_of(kNumbers);
  module.attr("FLAGS") = keys_of(kFlags);
  module.def("instruction_sets", &cpu::instruction_sets);
  module.def("selected_instruction_set", &cpu::selected_instruction_set);
  module.def("select_instruction_set", &cpu::select_instruction_set, py::arg("name"));
  py::class_<PlanGuard>(module, "PlanGuard", py::module_local())
      .def(py::init<const py::list&, const py::object&, bool, const py::list&, const py::object&>(), py::arg("entries"),
           py::arg("step_state"), py::arg("reads_lr"), py::arg("rates"), py::arg("reduction"))
      .def("gradient_addresses", &gradient_addresses, py::arg("groups"), py::arg("state"))
      .def("release_gradients", &PlanGuard::release_gradients)
      .def("mark_updated", &PlanGuard::mark_updated);
  py::class_<cpu::Step>(module, "CpuStep", py::module_local())
      .def(py::init(&make_cpu_step), py::arg("guard"))
      .def("run", &cpu_step, py::arg("guard"), py::arg("groups"), py::arg("state"), py::arg("request"));
#if defined(FUSED_TRICKS_CUDA)
  module.def("cuda_unusable_because", &cuda::unusable_because, py::arg("device"));
  py::class_<cuda::Step>(module, "CudaStep", py::module_local())
      .def(py::init(&make_cuda_step), py::arg("guard"))
      .def("table_size", &cuda::Step::table_size)
      .def("set_tables", &set_cuda_tables, py::arg("guard"), py::arg("memory"))
      .def("scratch_size", &cuda::Step::scratch_size)
      .def("set_scratch", &set_cuda_scratch, py::arg("memory"))
      .def("run", &cuda_step, py::arg("guard"), py::arg("groups"), py::arg("state"), py::arg("request"));
#endif
#if defined(FUSED_TRICKS_VERSION)
  module.attr("__version__") = FUSED_TRICKS_VERSION;
#endif
}

}  // namespace
}  // namespace fused_tricks
