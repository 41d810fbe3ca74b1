// Argument errors: what was expected, and what came.
#pragma once

#include <concepts>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>

namespace art {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A macro, so that the message is only put together when the check fails.
#define ART_CHECK(condition, ...)                     \
  do {                                                \
    if (!(condition)) ::art::fail_check(__VA_ARGS__); \
  } while (false)

// No streams: they depend on the process's locale objects, of which there are two copies where the
// compiler links libstdc++ statically, and formatting a number then crashes.
inline std::string to_text(const char* text) { return text; }
inline std::string to_text(const std::string& text) { return text; }
inline std::string to_text(double number) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", number);
  return text;
}
template <std::integral T>
std::string to_text(T number) {
  return std::to_string(number);
}

template <class... Parts>
[[noreturn]] void fail_check(const Parts&... parts) {
  throw std::runtime_error((to_text(parts) + ...));
}

// ART_CHECKED=1 asks for the checks that cost time; an operator's own argument goes before it.
inline bool checked_by_environment() {
  const char* value = std::getenv("ART_CHECKED");
  return value != nullptr && std::string(value) == "1";
}

inline bool is_checked(const std::optional<bool>& checked) {
  return checked ? *checked : checked_by_environment();
}

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "ScalarType " + std::to_string(static_cast<int>(dtype));
  }
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text += (d == 0 ? "" : ", ") + std::to_string(tensor.size(d));
  }
  return text + "]";
}

inline std::string text_of(std::initializer_list<int64_t> shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// Where a value was found. `head_stride` 0: all heads share it, and none is named.
inline std::string text_of_item(int64_t batch, int64_t head, int64_t head_stride) {
  const std::string sequence = "sequence " + std::to_string(batch);
  return head_stride == 0 ? sequence : sequence + ", KV head " + std::to_string(head);
}

inline bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t d = 0;
  for (const int64_t size : shape) {
    if (tensor.size(d++) != size) return false;
  }
  return true;
}

// "dtype of" at the start of a message makes it a TypeError in Python; all others are ValueErrors.
inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType want) {
  ART_CHECK(tensor.scalar_type() == want, op, ": dtype of ", name, " must be ", dtype_name(want),
            ", got ", dtype_name(tensor.scalar_type()));
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& tensor,
                             const char* other_name, const Tensor& other) {
  ART_CHECK(tensor.scalar_type() == other.scalar_type(), op, ": dtype of ", name, " must be ",
            dtype_name(other.scalar_type()), " like that of ", other_name, ", got ",
            dtype_name(tensor.scalar_type()));
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, const char* meaning,
                        std::initializer_list<int64_t> shape) {
  ART_CHECK(has_shape(tensor, shape), op, ": ", name, " must have shape ", meaning, " = ",
            text_of(shape), ", got ", shape_of(tensor));
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const Tensor& query) {
  ART_CHECK(tensor.device() == query.device(), op, ": ", name,
            " must be on the device of the first argument (all tensors of a call share one)");
}

}  // namespace art
