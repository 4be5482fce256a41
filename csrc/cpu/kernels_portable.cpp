// One element at a time in standard C++: for processors without a vector version, and as the reference of their tests.
#include "kernels_impl.h"

namespace fused_tricks::cpu {

const Kernels kPortable = kernels_of<Scalar>();

}  // namespace fused_tricks::cpu
