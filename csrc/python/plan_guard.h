// The plan guard: reads groups, gradients and state of each step, and notices that the plan no longer holds.
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

// The Python side of an entry, at the same index. Objects are borrowed: fused_tricks/backends/compiled.py holds them
// for as long as the guard lives, where the garbage collector can see it.
struct GuardedEntry {
  PyObject* object = nullptr;  // the parameter as its group lists it
  PyObject* source = nullptr;  // whose memory and gradient are used: the parameter, or its dense stand-in
  PyObject* alias = nullptr;   // shares the parameter's version counter; null: the caller writes the parameter
  Layout layout;
  dlpack::Device device{};
  bool has_buffer = false;       // also where it has no elements, and so no address
  bool watches_version = false;  // a master must notice that user code wrote to its parameter
  int64_t version = 0;
  int64_t version_step = 1;   // views of one tensor share its counter, which then grows by more than one in an update
  PyObject* state = nullptr;  // the parameter's dict in Optimizer.state, and what it must still hold
  PyObject* held[kStateTensors] = {};
  PyObject* own[kStateTensors] = {};  // what the plan works on: the same, or this process's part of it
  Range unwritten{0, 0};              // addresses that no step writes, around the last gradient
};

// A learning rate that follows the updates applied: `object`, where a group has it, stands for `base` times the factor
// that is due. A null object: the group has none.
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
  // step_state: the uint8 tensor behind StepState. reads_lr: whether the kernels read a learning rate that is a tensor
  // themselves, so that the host need not wait for it. rates: for each group None or a CompiledLR. reduction: None,
  // or the StepReduction of fused_tricks/distributed/found_inf_reduction.py.
  PlanGuard(const py::list& entries, const py::object& step_state, bool reads_lr, const py::list& rates,
            const py::object& reduction);
  PlanGuard(const PlanGuard&) = delete;
  PlanGuard& operator=(const PlanGuard&) = delete;
  ~PlanGuard() { release_gradients(); }

  // Whether a step over the plan runs. Another one, which Python code within it may begin, needs a plan of its own.
  bool is_running = false;

  // Reads groups and gradients for this step. False: something that the plan holds has changed, Optimizer.state since
  // the first step included, and nothing was touched; make a new plan.
  bool refresh(const py::list& group_dicts, const py::dict& state);

  // Drops the gradients that `refresh` read.
  void release_gradients();

  // After an update: tells autograd that the parameters changed.
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
  py::list updated_;              // aliases of what the last step updated
  std::vector<PyObject*> grads_;  // owned during a step, which runs without the interpreter lock
  std::vector<Range> written_;    // the memory of parameters, masters and buffers, by address
  bool watches_state_ = false;
  std::vector<std::pair<PyObject*, PyObject*>> watched_;  // the items of Optimizer.state
};

}  // namespace fused_tricks
