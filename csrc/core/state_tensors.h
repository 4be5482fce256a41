// The tensors of a parameter in the optimizer's state.
#pragma once

#include <cstddef>

namespace fused_tricks {

// In the order of STATE_TENSORS in fused_tricks/step/parameters.py.
enum StateTensor : size_t { kMaster, kBuffer, kStateTensors };

// The keys in the optimizer's state.
constexpr const char* kStateKeys[kStateTensors] = {"master_param", "momentum_buffer"};

}  // namespace fused_tricks
