// What stays the same between steps: the tensors, their sizes and types.
#pragma once

#include <cstdint>
#include <vector>

#include "../core/group.h"
#include "../core/step_state.h"
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

// How processes that hold parts of one model decide together: fused_tricks/distributed/found_inf_reduction.py's object,
// which Plan borrows.
struct Agreement {
  PyObject* object = nullptr;  // null: this process decides alone
  // On the parameters' device: whether a gradient is not finite, whether one is FP64, then one sum of squares for each
  // of the entries' parts.
  double* verdict = nullptr;
  int32_t parts = 1;

  // Makes the verdict that of all of them. On a GPU that is only launched.
  void reach() const;
};

// One parameter. Python objects are borrowed: fused_tricks/backends/compiled.py holds them for as long as the plan
// lives, where the garbage collector can see it.
struct Entry {
  size_t group = 0;
  PyObject* object = nullptr;  // the parameter as its group lists it
  PyObject* source = nullptr;  // whose memory and gradient are used: the parameter, or its dense stand-in
  PyObject* alias = nullptr;   // shares the parameter's version counter; null: the caller writes the parameter
  bool live = false;           // false: it had no gradient when the plan was made, and the fields below are empty
  Layout layout;
  int64_t count = 0;
  DType type = DType::kFloat32;
  DType grad_type = DType::kFloat32;
  void* param = nullptr;
  dlpack::Device device{};
  bool has_master = false;  // of an empty tensor the addresses below are null
  bool has_buffer = false;
  void* master = nullptr;
  void* buffer = nullptr;
  int64_t* first_update = nullptr;  // number of the update that first wrote the buffer; -1: none yet
  bool watches_version = false;     // a master must notice that user code wrote to its parameter
  int64_t version = 0;
  int64_t version_step = 1;   // views of one tensor share its counter, which then grows by more than one in an update
  PyObject* state = nullptr;  // the parameter's dict in Optimizer.state, and what it must still hold
  PyObject* state_buffer = nullptr;
  PyObject* state_master = nullptr;
  PyObject* own_buffer = nullptr;  // what the plan works on: the same, or this process's part of it
  PyObject* own_master = nullptr;

  const void* grad = nullptr;  // of this step; null: no gradient, no update
  int32_t part = 0;            // which of the verdict's sums of squares the gradient belongs to
  Range unwritten{0, 0};       // addresses that no step writes, around the last gradient
};

// A learning rate that follows the updates applied: `object`, where a group has it, stands for `base` times the factor
// that is due. A null object: the group has none.
struct AppliedRate {
  PyObject* object = nullptr;
  double base = 0;
  const double* factors = nullptr;
  int64_t last = 0;
  int64_t origin = 0;
};

class Plan {
 public:
  // entries: a CompiledEntry of fused_tricks/backends/compiled.py for each parameter of every group in order.
  // step_state: the uint8 tensor behind StepState. reads_lr: whether the kernels read a learning rate that is a tensor
  // themselves, so that the host need not wait for it. rates: for each group None or a CompiledRate. agreement: None,
  // or what decides with other processes.
  Plan(const py::list& entries, const py::object& step_state, bool reads_lr, const py::list& rates,
       const py::object& agreement);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() { release_gradients(); }

  // Whether a step over this plan runs. Another one, which Python code within it may begin, needs a plan of its own.
  bool is_running = false;

  // Reads groups and gradients for this step. False: something that the plan holds has changed, Optimizer.state since
  // the first step included, and nothing was touched; make a new plan.
  bool refresh(const py::list& group_dicts, const py::dict& state);

  // Lets go of the gradients that `refresh` read.
  void release_gradients();

  // After an update: tells autograd that the parameters changed.
  void mark_updated();

  std::vector<Entry> entries;
  std::vector<Group> groups;
  StepState* state = nullptr;
  dlpack::Device device{};
  Agreement agreement;
  bool in_double = false;  // a gradient of this step is FP64

 private:
  bool refresh_group(PyObject* dict, size_t& index);
  bool refresh_entry(Entry& entry);
  void read_lr(PyObject* dict, Group& group) const;
  void follow(const AppliedRate& rate, Group& group) const;
  void find_written_memory();
  Range unwritten_around(uintptr_t address) const;
  void watch_state(const py::dict& state);
  bool state_is_unchanged(const py::dict& state) const;

  bool reads_lr_;
  std::vector<AppliedRate> rates_;  // by group
  py::list updated_;                // aliases of what the last step updated
  std::vector<PyObject*> grads_;    // owned during a step, which runs without the interpreter lock
  std::vector<Range> written_;      // the memory of parameters, masters and buffers, by address
  bool watches_state_ = false;
  std::vector<std::pair<PyObject*, PyObject*>> watched_;  // the items of Optimizer.state
};

}  // namespace fused_tricks
