// The plan guard: reads groups, gradients and state of each step, and detects a stale plan.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "../core/plan.h"
#include "tensors.h"

namespace fused_tricks {

// Shape and strides of a tensor, in elements.
struct Layout {
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
  bool matches(const TensorView& tensor) const;
};

// The addresses in [begin, end).
struct Range {
  uintptr_t begin;
  uintptr_t end;
};

// A version counter that an update increments.
struct Counter {
  PyObject* tensor = nullptr;   // the tensor whose counter is incremented; null: no counter
  PyObject* watched = nullptr;  // the tensor whose counter is read, because a new version means that user code wrote
  int64_t version = 0;
  int64_t step = 1;  // growth in one update; more than 1 if parameters are views that share the counter
};

// The Python side of the entry at the same index. All objects are borrowed. fused_tricks/backends/compiled.py owns the
// objects of the entries while the guard lives, so that the garbage collector sees the references.
struct GuardedEntry {
  PyObject* object = nullptr;  // the parameter as its group lists it
  PyObject* source = nullptr;  // the tensor whose gradient the kernels use: the parameter, or a stand-in
  PyObject* home = nullptr;    // the tensor whose memory the kernels write
  PyObject* spec = nullptr;    // the DTensorSpec of a DTensor whose local part is `home`; null: no DTensor
  Layout layout;
  dlpack::Device device{};
  bool has_grad = false;       // in this step; `Entry.grad` is null for a gradient without elements
  unsigned state_tensors = 0;  // a bit for each state tensor, also for an empty one, whose address is null
  Counter counters[2];         // of the parameter, and of the local part of a DTensor
  PyObject* state = nullptr;   // the parameter's dict in Optimizer.state, and the tensors in the dict
  PyObject* held[kStateTensors] = {};
  PyObject* own[kStateTensors] = {};  // the tensors of the plan: `held`, or the local parts of `held`
};

// A learning rate that follows the number of applied updates. If `object` is a group's `lr`, the rate is `base` times
// the factor that is due. Null `object`: the group has a plain `lr`.
struct DeviceLR {
  PyObject* object = nullptr;
  double base = 0;
  const double* factors = nullptr;
  int64_t last = 0;
  int64_t origin = 0;
};

class PlanGuard {
 public:
  // entries: a CompiledEntry (fused_tricks/backends/compiled.py) for each parameter of every group, in order.
  // step_state: the uint8 tensor of StepState.
  // reads_lr: true if the kernels read a tensor `lr` on the device, which avoids a synchronisation.
  // rates: a CompiledLR or None for each group.
  // reduction: a StepReduction (fused_tricks/distributed/found_inf_reduction.py) or None.
  PlanGuard(const py::list& entries, const py::object& step_state, bool reads_lr, const py::list& rates,
            const py::object& reduction);
  PlanGuard(const PlanGuard&) = delete;
  PlanGuard& operator=(const PlanGuard&) = delete;
  ~PlanGuard() { release_gradients(); }

  // True while a step over the plan runs. A nested step, begun by Python code inside the step, gets its own plan.
  bool is_running = false;

  // Reads groups and gradients for this step. Returns false, and writes no tensor, if the plan is stale.
  // Optimizer.state is compared with Optimizer.state at the first call.
  bool refresh(const py::list& group_dicts, const py::dict& state);

  // Drops the gradients that `refresh` read.
  void release_gradients();

  // Increments the version counters of the updated parameters, by which autograd detects the change.
  void mark_updated();

  Plan plan;
  dlpack::Device device{};

 private:
  void add_entry(const py::handle& compiled_entry);
  bool refresh_group(PyObject* dict, size_t& index);
  bool refresh_entry(Entry& entry, GuardedEntry& guarded);
  void read_lr(PyObject* dict, Group& group) const;
  void follow(const DeviceLR& rate, Group& group) const;
  void find_written_memory();
  Range unwritten_around(uintptr_t address) const;
  template <typename Function>
  void for_each_updated(const Function& function);
  void watch_state(const py::dict& state);
  bool state_is_unchanged(const py::dict& state) const;

  std::vector<GuardedEntry> guarded_;
  bool reads_lr_;
  unsigned required_ = 0;         // of the group that is read: a bit for each state tensor that an option requires
  std::vector<DeviceLR> rates_;   // by group
  py::list updated_;              // the tensors whose version counters the last step incremented
  std::vector<PyObject*> grads_;  // owned during a step, which releases the interpreter lock
  std::vector<Range> written_;    // the memory of parameters, masters and buffers, by address
  bool watches_state_ = false;
  std::vector<std::pair<PyObject*, PyObject*>> watched_;  // the items of Optimizer.state
};

}  // namespace fused_tricks
