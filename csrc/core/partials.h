// The partials of a step: the results of a scan that processes reduce before they decide.
#pragma once

#include <cstddef>

namespace fused_tricks {

// Indices in the array of partials. Same order as PARTIALS in fused_tricks/distributed/found_inf_reduction.py.
enum Partial : size_t {
  kFoundInf,  // 0 for false
  kInDouble,  // 1 if a gradient is FP64
  kSquares,   // the sum of squares of the first shard class; the sums of the other classes follow
  kPartials
};

constexpr const char* kPartialNames[kPartials] = {"found_inf", "in_double", "squares"};

}  // namespace fused_tricks
