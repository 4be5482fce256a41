// The tensors of a parameter in optimizer_state.
#pragma once

#include <cstddef>

namespace fused_tricks {

// Same order as STATE_TENSORS in fused_tricks/step/parameters.py.
enum StateTensor : size_t { kMaster, kBuffer, kEma, kStateTensors };

// The keys in a parameter's dict in optimizer_state.
constexpr const char* kStateKeys[kStateTensors] = {"master_param", "momentum_buffer", "ema_param"};

}  // namespace fused_tricks
