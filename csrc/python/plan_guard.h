// The plan guard: reads groups, gradients and state in each step, and detects a stale plan.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "../core/plan.h"
#include "tensors.h"

namespace fused_tricks {

// Size and order of a tensor's elements in memory.
struct Layout {
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
  bool matches(const TensorView& tensor) const;
};

// Addresses from `begin` up to `end`.
struct Range {
  uintptr_t begin;
  uintptr_t end;
};

// The Python objects of an entry, at the same index. Objects are borrowed: fused_tricks/backends/compiled.py holds them
// as long as the guard exists, in view of the garbage collector.
struct GuardedEntry {
  PyObject* object = nullptr;  // the parameter, as listed in the group
  PyObject* source = nullptr;  // the parameter or its stand-in, whose memory and gradient the kernels use
  PyObject* alias = nullptr;   // shares the parameter's version counter; null: Python writes the parameter
  Layout layout;
  dlpack::Device device{};
  bool has_buffer = false;       // also true for a buffer without elements, and so without an address
  bool watches_version = false;  // a new version makes the plan stale: user code wrote to a parameter with a master
  int64_t version = 0;
  int64_t version_step = 1;   // more than 1 for views of one tensor, which share a counter
  PyObject* state = nullptr;  // the parameter's dict in Optimizer.state, and its tensors at the first step
  PyObject* held[kStateTensors] = {};
  PyObject* own[kStateTensors] = {};  // the local parts of these tensors
  Range unwritten{0, 0};              // addresses around the last gradient that no step writes
};

// A learning rate that follows the applied updates. A group whose `lr` is `object` has `base` times the factor of the
// update. Null: the group has another learning rate.
struct DeviceLR {
  PyObject* object = nullptr;
  double base = 0;
  const double* factors = nullptr;
  int64_t last = 0;
  int64_t origin = 0;
};

class PlanGuard {
 public:
  // entries: a CompiledEntry of fused_tricks/backends/compiled.py for each parameter of every group in order.
  // step_state: the uint8 tensor of StepState. reads_lr: the kernels read a learning-rate tensor, so that the host does
  // not wait for it. rates: for each group None or a CompiledLR. reduction: None, or a StepReduction of
  // fused_tricks/distributed/found_inf_reduction.py.
  PlanGuard(const py::list& entries, const py::object& step_state, bool reads_lr, const py::list& rates,
            const py::object& reduction);
  PlanGuard(const PlanGuard&) = delete;
  PlanGuard& operator=(const PlanGuard&) = delete;
  ~PlanGuard() { release_gradients(); }

  // True while a step over the plan runs. A step inside it, from Python code that it calls, requires another plan.
  bool is_running = false;

  // Reads the groups and gradients of this step. Returns false for a stale plan, before any change.
  bool refresh(const py::list& group_dicts, const py::dict& state);

  // Drops the gradients that `refresh` read.
  void release_gradients();

  // Increments the version counters of the updated parameters, for autograd.
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
  void watch_state(const py::dict& state);
  bool state_is_unchanged(const py::dict& state) const;

  std::vector<GuardedEntry> guarded_;
  bool reads_lr_;
  std::vector<DeviceLR> rates_;   // by group
  py::list updated_;              // aliases of the parameters of the last update
  std::vector<PyObject*> grads_;  // owned during a step, which releases the interpreter lock
  std::vector<Range> written_;    // the memory of parameters and state tensors, by address
  bool watches_state_ = false;
  std::vector<std::pair<PyObject*, PyObject*>> watched_;  // the items of Optimizer.state
};

}  // namespace fused_tricks
