// Pieces of one buffer.
#pragma once

#include <cstddef>

namespace art::cpu {

// Hands out aligned pieces of one buffer; from a null base it only measures.
class Arena {
 public:
  static constexpr size_t kAlignment = 64;  // a cache line

  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(size_t count) {
    char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(piece);
  }

  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace art::cpu
