// Checks of what Python hands over. A failure is std::invalid_argument, which Python sees as ValueError.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace vfmvae {

enum class DType { kFloat32, kFloat16, kBFloat16 };

inline DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  throw std::invalid_argument("dtype " + name + " is not one of float32, float16, bfloat16");
}

inline void check(bool condition, const std::string& sentence) {
  if (!condition) throw std::invalid_argument(sentence);
}

inline void check_at_least(const char* name, int64_t value, int64_t least) {
  check(value >= least, std::string(name) + " is " + std::to_string(value) + ", but must be at least " +
                            std::to_string(least));
}

inline bool is_aligned(uintptr_t pointer, size_t bytes) { return pointer % bytes == 0; }

}  // namespace vfmvae
