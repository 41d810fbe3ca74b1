// The kernels of one dtype and head size; an instantiation is a file of its own.
#pragma once

#include <type_traits>

#include "cuda/sm90/cluster.cuh"
#include "cuda/sm90/solo.cuh"

namespace art::cuda::sm90 {

template <DType kDType>
struct TypeOf {
  using Type = __nv_bfloat16;
};
template <>
struct TypeOf<DType::kFloat16> {
  using Type = __half;
};

template <DType kDType, int kDim>
Entries entries(int32_t group_size) {
  using T = typename TypeOf<kDType>::Type;
  // A warp has not the registers to compute and fold 8 heads of 256 channels, or 16 of more than
  // 128.
  const auto make = [](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    Entries made = {nullptr, run_cluster<T, kDim, kTiles>, kExchangeBytes<T, kDim, kTiles>};
    if constexpr (kDim * kTiles <= 256 && kDim < 256) made.solo = run_solo<T, kDim, kTiles>;
    return made;
  };
  using std::integral_constant;
  return group_size <= 8 ? make(integral_constant<int, 1>()) : make(integral_constant<int, 2>());
}

}  // namespace art::cuda::sm90
