#include "step.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "../core/chunk.h"
#include "kernels.h"
#include "threads.h"

namespace fused_tricks::cpu {

namespace {

// Up to this number of elements, waking other threads costs more than the threads save.
constexpr int64_t kSmall = 1 << 15;
// From this number of elements on, the caches evict updated parameters before the next forward pass reads them.
constexpr int64_t kLarge = 1 << 22;

bool is_first_update(const Entry& entry, const Group& group, size_t tensor) {
  return entry.first_update[tensor] != nullptr && uses(group, tensor) && *entry.first_update[tensor] < 0;
}

template <typename T>
Rule<T> rule_of(const Plan& plan, const Entry& entry, const StepRequest& request, bool may_be_new) {
  const Group& group = plan.groups[entry.group];
  bool is_first[kStateTensors] = {};
  for (size_t i = 0; i < kStateTensors && may_be_new; ++i) is_first[i] = is_first_update(entry, group, i);
  return make_rule<T>(group, group.lr, entry.is_matrix, is_first, *plan.state, request);
}

const void* at(const void* base, DType type, int64_t index) {
  return static_cast<const char*>(base) + index * size_of(type);
}

void* at(void* base, DType type, int64_t index) { return static_cast<char*>(base) + index * size_of(type); }

Span span_of(const Entry& entry, const Chunk& chunk, bool streams) {
  const DType state_type = entry.type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  Span span{};
  span.grad = at(entry.grad, entry.grad_type, chunk.begin);
  span.param = at(entry.param, entry.type, chunk.begin);
  for (size_t i = 0; i < kStateTensors; ++i) {
    if (entry.state[i] != nullptr) span.state[i] = at(entry.state[i], state_type, chunk.begin);
  }
  span.weight = span.state[kMaster] != nullptr ? span.state[kMaster] : span.param;
  span.grad_type = entry.grad_type;
  span.param_type = entry.type;
  span.count = chunk.count;
  span.streams = streams;
  return span;
}

// Runs after the update, because every thread reads `first_update` during the update. Returns true if a state tensor
// of the plan is still unwritten.
bool note_first_updates(const Plan& plan) {
  bool any_left = false;
  for (const Entry& entry : plan.entries) {
    for (size_t i = 0; i < kStateTensors; ++i) {
      int64_t* first_update = entry.first_update[i];
      if (first_update == nullptr || *first_update >= 0) continue;
      if (entry.grad != nullptr && uses(plan.groups[entry.group], i)) {
        *first_update = plan.state->applied_steps;
      } else {
        any_left = true;
      }
    }
  }
  return any_left;
}

// Reduces `partials` over the processes, in place.
void all_reduce(const Reduction& reduction, std::vector<double>& partials) {
  if (reduction.partials == nullptr) return;
  std::copy(partials.begin(), partials.end(), reduction.partials);
  reduction.all_reduce();
  std::copy_n(reduction.partials, partials.size(), partials.begin());
}

}  // namespace

Step::Step(const Plan& plan) {
  for (size_t i = 0; i < plan.entries.size(); ++i) {
    const int64_t total = plan.entries[i].count;
    for (int64_t begin = 0; begin < total; begin += kCpuChunk)
      chunks_.push_back({i, begin, std::min(kCpuChunk, total - begin)});
    total_count_ += total;
  }
}

// Returns this process's partials.
std::vector<double> Step::scan(const Plan& plan, const StepRequest& request) const {
  const Kernels& kernels = selected_kernels();
  const int64_t chunk_count = static_cast<int64_t>(chunks_.size());
  std::atomic<bool> any{false};
  std::vector<double> squares(request.wants_norm ? chunks_.size() : 0);
  parallel_for(chunk_count, total_count_ <= kSmall, [&](int64_t begin, int64_t end) {
    for (size_t i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      const Chunk& chunk = chunks_[i];
      const Entry& entry = plan.entries[chunk.entry];
      if (entry.grad == nullptr) continue;
      const void* grad = at(entry.grad, entry.grad_type, chunk.begin);
      if (kernels.has_non_finite(grad, entry.grad_type, chunk.count)) any.store(true, std::memory_order_relaxed);
      if (request.wants_norm) squares[i] = kernels.sum_of_squares(grad, entry.grad_type, chunk.count);
    }
  });
  std::vector<double> partials(kSquares + static_cast<size_t>(plan.reduction.shard_classes));
  partials[kFoundInf] = any.load();
  partials[kInDouble] = request.in_double;
  for (size_t i = 0; i < squares.size(); ++i) {
    partials[kSquares + static_cast<size_t>(plan.entries[chunks_[i].entry].shard_class)] += squares[i];
  }
  return partials;
}

void Step::update(const Plan& plan, const StepRequest& request) const {
  const Kernels& kernels = selected_kernels();
  const bool streams = total_count_ >= kLarge;
  parallel_for(static_cast<int64_t>(chunks_.size()), total_count_ <= kSmall, [&](int64_t begin, int64_t end) {
    for (size_t i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      const Chunk& chunk = chunks_[i];
      const Entry& entry = plan.entries[chunk.entry];
      if (entry.grad == nullptr) continue;
      const Span span = span_of(entry, chunk, streams);
      if (entry.type == DType::kFloat64) {
        kernels.update_double(span, rule_of<double>(plan, entry, request, may_be_new_));
      } else {
        kernels.update(span, rule_of<float>(plan, entry, request, may_be_new_));
      }
    }
  });
}

bool Step::run(const Plan& plan, StepRequest request) {
  std::vector<double> partials(kSquares);
  if (request.scans()) {
    partials = scan(plan, request);
    all_reduce(plan.reduction, partials);
  }
  request.in_double = partials[kInDouble] != 0;
  const double squares = std::accumulate(partials.begin() + kSquares, partials.end(), 0.0);
  decide_step(*plan.state, partials[kFoundInf] != 0, squares, request);
  if (plan.state->skip) return false;
  update(plan, request);
  if (may_be_new_) may_be_new_ = note_first_updates(plan);
  return true;
}

}  // namespace fused_tricks::cpu
