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
Entries entries(int32_t group_size, bool use_residual) {
  using T = typename TypeOf<kDType>::Type;
  // A warp has not the registers for 16 heads of more than 128 channels; nor, to fold besides
  // computing, for 8 of 256.
  const auto make = [use_residual](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    Entries made = {};
    if constexpr (kDim * kTiles <= 256) {
      if constexpr (kDim < 256) made.solo = run_solo<T, kDim, kTiles>;
      made.cluster =
          use_residual ? run_cluster<T, kDim, kTiles, true> : run_cluster<T, kDim, kTiles, false>;
      made.max_producers = num_cluster_producers(kDim);
      made.exchange_bytes = kExchangeBytes<T, kDim, kTiles>;
      made.max_pending_log2 = max_pending_log2(kDim, kTiles);
    }
    return made;
  };
  using std::integral_constant;
  return group_size <= 8 ? make(integral_constant<int, 1>()) : make(integral_constant<int, 2>());
}

}  // namespace art::cuda::sm90
