// What this processor can do.
#include "../ops.h"

namespace vfmvae {

bool cpu_multiplies_bfloat16() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512bf16");  // AMX comes with it
#else
  return false;
#endif
}

}  // namespace vfmvae
