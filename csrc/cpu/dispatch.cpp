#include <stdexcept>

#include "kernels.h"

namespace fused_tricks::cpu {

namespace {

struct Candidate {
  const char* name;
  const Kernels* kernels;
  bool usable;
};

const std::vector<Candidate>& candidates() {
#if defined(FUSED_TRICKS_X86)
  static const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const std::vector<Candidate> all = {
      {"avx512", &kAvx512, avx512}, {"avx2", &kAvx2, avx2}, {"portable", &kPortable, true}};
#else
  static const std::vector<Candidate> all = {{"portable", &kPortable, true}};
#endif
  return all;
}

const Candidate* best() {
  for (const Candidate& candidate : candidates()) {
    if (candidate.usable) return &candidate;
  }
  return nullptr;
}

const Candidate*& selected() {
  static const Candidate* current = best();
  return current;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) {
    if (candidate.usable) names.emplace_back(candidate.name);
  }
  return names;
}

const Kernels& selected_kernels() { return *selected()->kernels; }

std::string selected_instruction_set() { return selected()->name; }

void select_instruction_set(const std::string& name) {
  for (const Candidate& candidate : candidates()) {
    if (candidate.usable && name == candidate.name) {
      selected() = &candidate;
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' is not usable on this processor");
}

}  // namespace fused_tricks::cpu
