#include "step.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>
#include <stdexcept>

namespace fused_tricks::cuda {

namespace {

// Kernels read whole records, padding included, so that every byte must be defined.
template <typename Record>
Record zeroed() {
  Record record;
  std::memset(static_cast<void*>(&record), 0, sizeof record);
  return record;
}

template <typename Args>
constexpr size_t kGradCapacity = sizeof(Args::grads) / sizeof(const void*);
template <typename Args>
constexpr size_t kGroupCapacity = sizeof(Args::groups) / sizeof(Group);

// Writes records to device memory as 64-bit words, by `write_kernel`.
template <typename Record>
void write(Record* to, const std::vector<Record>& records, const Target& target) {
  static_assert(sizeof(Record) % sizeof(uint64_t) == 0);
  static thread_local const auto args = std::make_unique<WriteArguments>(zeroed<WriteArguments>());
  const size_t words = records.size() * sizeof(Record) / sizeof(uint64_t);
  for (size_t begin = 0; begin < words; begin += WriteArguments::kCapacity) {
    const size_t count = std::min(words - begin, WriteArguments::kCapacity);
    args->to = reinterpret_cast<uint64_t*>(to) + begin;
    args->count = static_cast<int64_t>(count);
    std::memcpy(args->words, reinterpret_cast<const uint64_t*>(records.data()) + begin, count * sizeof(uint64_t));
    launch_write(*args, target);
  }
}

// Writes the records only if they differ from `written`, the records on the device.
template <typename Record>
void update(Record* to, const std::vector<Record>& records, std::vector<Record>& written, const Target& target) {
  const size_t size = records.size() * sizeof(Record);
  if (written.size() == records.size() && std::memcmp(written.data(), records.data(), size) == 0) return;
  written.clear();
  write(to, records, target);
  written = records;
}

}  // namespace

Step::Step(const Plan& plan) {
  tables_.state = plan.state;
  tables_.partials = plan.reduction.partials;
  tables_.shard_classes = plan.reduction.shard_classes;
  grads_.resize(plan.entries.size());
  for (size_t i = 0; i < plan.entries.size(); ++i) {
    const Entry& entry = plan.entries[i];
    auto record = zeroed<TensorRecord>();
    if (entry.live) {
      record.param = entry.param;
      std::copy(std::begin(entry.state), std::end(entry.state), record.state);
      std::copy(std::begin(entry.first_update), std::end(entry.first_update), record.first_update);
      record.count = entry.count;
      record.group = static_cast<int32_t>(entry.group);
      record.type = entry.type;
      record.grad_type = entry.grad_type;
      record.is_matrix = entry.is_matrix;
    }
    tensor_records_.push_back(record);
    if (groups_.size() <= entry.group) groups_.resize(entry.group + 1);
    for (int64_t begin = 0; begin < record.count; begin += kCudaChunk) {
      auto chunk = zeroed<ChunkRecord>();
      chunk.begin = begin;
      chunk.tensor = static_cast<int32_t>(i);
      chunk.shard_class = entry.shard_class;
      chunk_records_.push_back(chunk);
    }
  }
  if (chunk_records_.size() > 0x7fffffff) throw std::runtime_error("more than 2**31 - 1 chunks in one optimizer");
}

size_t Step::table_size() const {
  return tensor_records_.size() * sizeof(TensorRecord) + chunk_records_.size() * sizeof(ChunkRecord);
}

void Step::set_tables(void* memory, const Target& target) {
  auto* tensors = static_cast<TensorRecord*>(memory);
  auto* chunks = reinterpret_cast<ChunkRecord*>(tensors + tensor_records_.size());
  write(tensors, tensor_records_, target);
  write(chunks, chunk_records_, target);
  tables_.tensors = tensors;
  tables_.chunks = chunks;
  tables_.chunk_count = static_cast<int64_t>(chunk_records_.size());
}

size_t Step::scratch_size() const {
  return chunk_records_.size() * sizeof(double) + grads_.size() * sizeof(const void*) + groups_.size() * sizeof(Group);
}

void Step::set_scratch(void* memory) {
  tables_.partial_squares = static_cast<double*>(memory);
  grad_memory_ = reinterpret_cast<const void**>(tables_.partial_squares + chunk_records_.size());
  group_memory_ = reinterpret_cast<Group*>(grad_memory_ + grads_.size());
  written_grads_.clear();
  written_groups_.clear();
}

template <typename Args>
void Step::launch(const Reduction& reduction, const StepRequest& request, const External& external,
                  const Target& target) {
  // Allocated once for each thread, because the argument has up to 32 KiB.
  static thread_local const std::unique_ptr<Args> args = std::make_unique<Args>(zeroed<Args>());
  args->tables = tables_;
  args->request = request;
  args->external_scale = external.scale;
  args->external_found_inf = external.found_inf;
  args->scanned = request.scans();
  args->more_grads = nullptr;
  args->more_groups = nullptr;
  if (grads_.size() <= kGradCapacity<Args>) {
    std::memcpy(args->grads, grads_.data(), grads_.size() * sizeof(const void*));
  } else {
    update(grad_memory_, grads_, written_grads_, target);
    args->more_grads = grad_memory_;
  }
  if (groups_.size() <= kGroupCapacity<Args>) {
    std::memcpy(static_cast<void*>(args->groups), groups_.data(), groups_.size() * sizeof(Group));
  } else {
    update(group_memory_, groups_, written_groups_, target);
    args->more_groups = group_memory_;
  }
  // A plan without chunks still launches one block, which decides and counts the step.
  const int64_t blocks = tables_.chunk_count > 0 ? tables_.chunk_count : 1;
  if (args->scanned) {
    launch_scan(*args, blocks, target);
    if (reduction.partials != nullptr) {
      reduction.all_reduce();
      launch_decide({tables_, request, external.scale, external.found_inf}, target);
    }
  }
  launch_update(*args, blocks, target);
}

void Step::run(const Plan& plan, const StepRequest& request, const External& external, const Target& target) {
  for (size_t i = 0; i < grads_.size(); ++i) grads_[i] = plan.entries[i].grad;
  for (size_t i = 0; i < groups_.size(); ++i) {
    std::memcpy(static_cast<void*>(&groups_[i]), &plan.groups[i], sizeof(Group));
  }
  if (grads_.size() <= kGradCapacity<SmallArguments> && groups_.size() <= kGroupCapacity<SmallArguments>) {
    launch<SmallArguments>(plan.reduction, request, external, target);
  } else if (grads_.size() <= kGradCapacity<MediumArguments> && groups_.size() <= kGroupCapacity<MediumArguments>) {
    launch<MediumArguments>(plan.reduction, request, external, target);
  } else {
    launch<LargeArguments>(plan.reduction, request, external, target);
  }
}

}  // namespace fused_tricks::cuda
