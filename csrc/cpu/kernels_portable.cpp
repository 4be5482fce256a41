// One element at a time in standard C++: for other processors, and as the reference for tests of the vector versions.
#include "kernels_impl.h"

namespace fused_tricks::cpu {

const Kernels kPortable = kernels_of<Scalar>();

}  // namespace fused_tricks::cpu
