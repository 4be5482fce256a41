// The Python module fused_tricks._extension.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/kernels.h"
#include "cpu/step.h"
#if defined(FUSED_TRICKS_CUDA)
#include "cuda/step.h"
#endif
#include "plan.h"
#include "threads.h"

// The emulation of the CUDA kernels is built from the same sources under another name.
#if !defined(FUSED_TRICKS_MODULE)
#define FUSED_TRICKS_MODULE _extension
#endif

namespace fused_tricks {
namespace {

using ScaleRuleFields = std::tuple<double, double, double, double, int32_t, int32_t>;

// In the order of fused_tricks/backends/request.py.
enum Outcome : int { kStale, kSkipped, kApplied };

void connect(const py::object& tensor_type, const py::object& parameter_type, const py::object& increment_version,
             const py::dict& functions, const py::list& samples) {
  connect_torch(tensor_type, parameter_type, increment_version, functions, samples);
  void* parallel_for = nullptr;
  if (functions.contains("torch_parallel_for")) {
    parallel_for = reinterpret_cast<void*>(functions["torch_parallel_for"].cast<uintptr_t>());
  }
  set_parallel_for(parallel_for);
}

// grad_scale and found_inf are a GradScaler's: numbers on the host, or tensors that the kernels read.
StepRequest request_of(bool unscales, bool external, std::optional<double> max_norm,
                       const std::optional<ScaleRuleFields>& scale_rule) {
  StepRequest request{};
  request.unscales = unscales;
  request.external = external;
  request.grad_scale = 1.0f;
  request.clips = max_norm.has_value();
  request.max_norm = max_norm.value_or(0.0);
  request.dynamic = scale_rule.has_value();
  if (scale_rule) {
    const auto& [growth, backoff, floor, ceiling, interval, hysteresis] = *scale_rule;
    request.rule = {growth, backoff, static_cast<float>(floor), static_cast<float>(ceiling), interval, hysteresis};
  }
  return request;
}

struct ReleaseGradients {
  Plan& plan;
  ~ReleaseGradients() { plan.release_gradients(); }
};

int cpu_step(Plan& plan, const py::list& groups, const py::dict& state, bool unscales, std::optional<double> grad_scale,
             bool found_inf, std::optional<double> max_norm, const std::optional<ScaleRuleFields>& scale_rule) {
  StepRequest request = request_of(unscales, grad_scale.has_value(), max_norm, scale_rule);
  request.grad_scale = static_cast<float>(grad_scale.value_or(1.0));
  request.found_inf = found_inf;
  const ReleaseGradients release{plan};
  if (!plan.refresh(groups, state)) return kStale;
  return cpu::run_step(plan, request) ? kApplied : kSkipped;
}

#if defined(FUSED_TRICKS_CUDA)

cuda::Target target_of(const Plan& plan) { return {plan.device.index, current_stream(plan.device)}; }

void set_cuda_tables(cuda::Step& step, const Plan& plan, const py::object& memory) {
  step.set_tables(data_of(memory), target_of(plan));
}

void set_cuda_scratch(cuda::Step& step, const py::object& memory) { step.set_scratch(data_of(memory)); }

int cuda_step(cuda::Step& step, Plan& plan, const py::list& groups, const py::dict& state, bool unscales,
              const py::object& grad_scale, const py::object& found_inf, std::optional<double> max_norm,
              const std::optional<ScaleRuleFields>& scale_rule) {
  const StepRequest request = request_of(unscales, !grad_scale.is_none(), max_norm, scale_rule);
  const ReleaseGradients release{plan};
  if (!plan.refresh(groups, state)) return kStale;
  const cuda::External external{static_cast<const float*>(data_of(grad_scale)),
                                static_cast<const float*>(data_of(found_inf))};
  step.run(plan, request, external, target_of(plan));
  plan.mark_updated();
  return kApplied;
}

#endif

PYBIND11_MODULE(FUSED_TRICKS_MODULE, module) {
  module.def("connect", &connect, py::arg("tensor_type"), py::arg("parameter_type"), py::arg("increment_version"),
             py::arg("functions"), py::arg("samples"));
  module.attr("CPU_COMPARED") = cpu::kCompared;
  module.def("instruction_sets", &cpu::instruction_sets);
  module.def("selected_instruction_set", &cpu::selected_instruction_set);
  module.def("select_instruction_set", &cpu::select_instruction_set, py::arg("name"));
  py::class_<Plan>(module, "Plan", py::module_local())
      .def(py::init<const py::list&, const py::object&, bool, int64_t>(), py::arg("entries"), py::arg("step_state"),
           py::arg("reads_lr"), py::arg("compared"))
      .def("watch_state", &Plan::watch_state, py::arg("state"))
      .def("cpu_step", &cpu_step, py::arg("groups"), py::arg("state"), py::arg("unscales"), py::arg("grad_scale"),
           py::arg("found_inf"), py::arg("max_norm"), py::arg("scale_rule"));
#if defined(FUSED_TRICKS_CUDA)
  py::class_<cuda::Step>(module, "CudaStep", py::module_local())
      .def(py::init<const Plan&>(), py::arg("plan"))
      .def("table_size", &cuda::Step::table_size)
      .def("set_tables", &set_cuda_tables, py::arg("plan"), py::arg("memory"))
      .def("scratch_size", &cuda::Step::scratch_size)
      .def("set_scratch", &set_cuda_scratch, py::arg("memory"))
      .def("run", &cuda_step, py::arg("plan"), py::arg("groups"), py::arg("state"), py::arg("unscales"),
           py::arg("grad_scale"), py::arg("found_inf"), py::arg("max_norm"), py::arg("scale_rule"));
#endif
#if defined(FUSED_TRICKS_VERSION)
  module.attr("__version__") = FUSED_TRICKS_VERSION;
#endif
}

}  // namespace
}  // namespace fused_tricks
