#include "problem.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "core/key_codes.h"

namespace checks {
namespace {

constexpr int32_t kNoPage = std::numeric_limits<int32_t>::max();
constexpr double kQueryScale = 2.0;
constexpr double kValueMean = 1.0;  // a part that all values share lets outputs settle

int64_t page_of(const DecodeParams& params, int64_t batch, int64_t head, int64_t token) {
  return params.block_table[batch * params.block_table_batch_stride +
                            head * params.block_table_head_stride + token / params.page_size];
}

int64_t scale_index(const DecodeParams& params, const art::PagedScales& scales, int64_t batch,
                    int64_t head, int64_t token) {
  return page_of(params, batch, head, token) * scales.page_stride +
         token % params.page_size * scales.token_stride + head * scales.head_stride;
}

void set_strides(const Case& what, bool values, art::PagedCache& cache) {
  const int64_t dim = values ? what.value_dim : what.head_dim;
  const int64_t heads = what.num_kv_heads, tokens = what.page_size;
  cache.dim_stride = 1;
  switch (what.layout) {
    case Layout::kHeadsFirst:
      cache.token_stride = dim;
      cache.head_stride = tokens * dim;
      cache.page_stride = heads * tokens * dim;
      break;
    case Layout::kPageTables:
      cache.token_stride = dim;
      cache.head_stride = 0;
      cache.page_stride = tokens * dim;
      break;
    case Layout::kTokensLast:
      if (!values) {
        cache.token_stride = 1;
        cache.dim_stride = tokens;
        cache.head_stride = dim * tokens;
        cache.page_stride = heads * tokens * dim;
        break;
      }
      [[fallthrough]];
    default:
      const int64_t row = dim + (what.layout == Layout::kPaddedRows ? 8 : 0);
      cache.token_stride = heads * row;
      cache.head_stride = row;
      cache.page_stride = tokens * heads * row;
  }
}

// Exactly as many elements as there are up to the last one, all of them NaN.
void allocate(const Case& what, DType dtype, int64_t num_pages, bool values, art::PagedCache& cache,
              std::vector<uint8_t>& memory) {
  set_strides(what, values, cache);
  const int64_t dim = values ? what.value_dim : what.head_dim;
  const int64_t last = (num_pages - 1) * cache.page_stride +
                       (what.page_size - 1) * cache.token_stride +
                       (what.num_kv_heads - 1) * cache.head_stride + (dim - 1) * cache.dim_stride;
  memory.resize((last + 1) * size_of(dtype));
  for (int64_t i = 0; i <= last; ++i) write(dtype, memory.data(), i, NAN);
  cache.data = memory.data();
}

// A scale for each row of an int8 cache, all of them NaN.
void allocate(const Case& what, int64_t num_pages, art::PagedScales& scales,
              std::vector<float>& memory) {
  const bool one_head = what.layout == Layout::kPageTables;
  const int64_t heads = one_head ? 1 : what.num_kv_heads, tokens = what.page_size;
  const bool heads_first = one_head || what.layout == Layout::kHeadsFirst;
  scales.page_stride = heads * tokens;
  scales.token_stride = heads_first ? 1 : heads;
  scales.head_stride = one_head ? 0 : (heads_first ? tokens : 1);
  memory.assign(num_pages * scales.page_stride, NAN);
  scales.data = memory.data();
}

// The first token that may be read. Codes are of whole groups, also where a part of one is visible.
int32_t first_token(const Case& what, const Problem& problem, int32_t batch) {
  if (what.guided) return 0;
  const int32_t start = problem.starts[batch];
  return what.window > 0 ? std::max(start, what.lens[batch] - what.window) : start;
}

// Pages in random order for what is visible; other entries are no pages.
void set_tables(const Case& what, Random& random, Problem& problem) {
  DecodeParams& params = problem.params;
  int32_t longest = 1;
  for (const int32_t len : what.lens) longest = std::max(longest, len);
  // More than is used, but a single page stays one: then units may have any size.
  params.max_pages = (longest + what.page_size - 1) / what.page_size;
  if (params.max_pages > 1) ++params.max_pages;
  problem.capacity = params.max_pages * what.page_size;
  const bool per_head = what.layout == Layout::kPageTables;
  const int64_t tables = int64_t{params.batch} * (per_head ? what.num_kv_heads : 1);
  params.num_pages = tables * params.max_pages + 1;
  params.block_table_head_stride = per_head ? params.max_pages : 0;
  params.block_table_batch_stride = params.max_pages * (per_head ? what.num_kv_heads : 1);
  std::vector<int32_t> pages(params.num_pages);
  std::iota(pages.begin(), pages.end(), 0);
  for (size_t i = pages.size() - 1; i > 0; --i) std::swap(pages[i], pages[random.below(i + 1)]);
  problem.block_table.assign(pages.begin(), pages.end() - 1);
  problem.lens = what.lens;
  problem.starts.resize(params.batch);
  for (int32_t b = 0; b < params.batch; ++b) {
    if (what.starts) problem.starts[b] = random.below(what.lens[b] + 1);
    const int32_t begin = first_token(what, problem, b);
    for (int64_t row = b * tables / params.batch; row < (b + 1) * tables / params.batch; ++row) {
      for (int32_t page = 0; page < params.max_pages; ++page) {
        const bool used = begin < what.lens[b] && page >= begin / what.page_size &&
                          page * what.page_size < what.lens[b];
        if (!used) problem.block_table[row * params.max_pages + page] = kNoPage;
      }
    }
  }
  params.block_table = problem.block_table.data();
  params.seq_lens = problem.lens.data();
  params.seq_lens_batch_stride = 1;
  params.seq_starts = what.starts ? problem.starts.data() : nullptr;
}

// All units in random order, without the last few of them; some hold no visible token.
void set_walk(const Case& what, Random& random, Problem& problem) {
  DecodeParams& params = problem.params;
  params.walk_order = what.order;
  params.num_pinned = what.num_pinned;
  params.unit_size = what.unit_size;
  params.block_size = what.block_size;
  if (what.order != WalkOrder::kExplicit) return;
  params.max_units = (problem.capacity + what.unit_size - 1) / what.unit_size;
  const int64_t items = int64_t{params.batch} * params.num_kv_heads;
  problem.walk.resize(items * params.max_units);
  problem.walk_lens.resize(items);
  for (int64_t item = 0; item < items; ++item) {
    int32_t* units = problem.walk.data() + item * params.max_units;
    std::iota(units, units + params.max_units, 0);
    for (int32_t i = params.max_units - 1; i > 0; --i) {
      std::swap(units[i], units[random.below(i + 1)]);
    }
    problem.walk_lens[item] = params.max_units - random.below(params.max_units / 3 + 1);
  }
  params.walk = problem.walk.data();
  params.walk_lens = problem.walk_lens.data();
}

void set_logits(const Case& what, Random& random, Problem& problem) {
  DecodeParams& params = problem.params;
  params.scale = static_cast<float>(1.0 / std::sqrt(what.head_dim));
  params.softcap = what.softcap;
  params.sliding_window = what.window;
  for (int32_t h = 0; h < params.num_q_heads; ++h) {
    problem.sinks.push_back(static_cast<float>(random.normal()));
    problem.slopes.push_back(0.01f * static_cast<float>(1 + random.below(8)));
  }
  for (int32_t h = 0; h < params.num_kv_heads; ++h) {
    const float factor = static_cast<float>(h + 1);
    problem.thresholds.push_back(what.d_scale / factor);
    problem.thresholds.push_back(what.d_direction / factor);
  }
  params.attn_sinks = what.sinks ? problem.sinks.data() : nullptr;
  params.alibi_slopes = what.alibi ? problem.slopes.data() : nullptr;
  params.use_stability = what.stability;
  params.d_scale = what.d_scale;
  params.d_direction = what.d_direction;
  params.thresholds = what.thresholds ? problem.thresholds.data() : nullptr;
  params.patience = what.patience;
}

// One row of a cache, of an int8 one with a random scale.
void fill_row(const DecodeParams& params, const art::PagedCache& cache, int64_t first, int32_t dim,
              double mean, float* scale, Random& random, std::vector<uint8_t>& memory) {
  if (scale != nullptr) *scale = 0x1p-6f * static_cast<float>(2 + random.below(4));
  for (int32_t d = 0; d < dim; ++d) {
    const double x = mean + random.normal();
    write(params.dtype, memory.data(), first + d * cache.dim_stride,
          scale == nullptr ? x : x / *scale);
  }
}

// Queries, and the keys and values of visible tokens.
void fill(const Case& what, Random& random, Problem& problem) {
  const DecodeParams& params = problem.params;
  const int64_t elements = int64_t{params.batch} * params.num_q_heads * params.head_dim;
  problem.query.resize(elements * size_of(params.query_dtype));
  for (int64_t i = 0; i < elements; ++i) {
    write(params.query_dtype, problem.query.data(), i, kQueryScale * random.normal());
  }
  for (int32_t b = 0; b < params.batch; ++b) {
    for (int32_t token = first_token(what, problem, b); token < what.lens[b]; ++token) {
      for (int32_t h = 0; h < params.num_kv_heads; ++h) {
        const auto scale = [&](const art::PagedScales& scales, std::vector<float>& memory) {
          const int64_t at = scale_index(params, scales, b, h, token);
          return scales.data == nullptr ? nullptr : memory.data() + at;
        };
        fill_row(params, params.key, element(params, params.key, b, h, token, 0), params.head_dim,
                 0.0, scale(params.key_scale, problem.key_scales), random, problem.keys);
        fill_row(params, params.value, element(params, params.value, b, h, token, 0),
                 params.value_dim, kValueMean, scale(params.value_scale, problem.value_scales),
                 random, problem.values);
      }
    }
  }
}

}  // namespace

double Random::normal() {
  double sum = 0.0;
  for (int i = 0; i < 4; ++i) sum += bits_() * 0x1p-32;
  return (sum - 2.0) * 1.7320508;
}

int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : (dtype == DType::kInt8 ? 1 : 2);
}

double read(DType dtype, const void* elements, int64_t index) {
  const char* from = static_cast<const char*>(elements) + index * size_of(dtype);
  if (dtype == DType::kFloat32) {
    float x;
    std::memcpy(&x, from, sizeof(x));
    return x;
  }
  if (dtype == DType::kInt8) return static_cast<int8_t>(*from);
  uint16_t bits;
  std::memcpy(&bits, from, sizeof(bits));
  if (dtype == DType::kBFloat16) return art::float_of_bits(uint32_t{bits} << 16);
  return (bits & 0x7fff) > 0x7c00 ? NAN : art::float_of(bits);
}

void write(DType dtype, void* elements, int64_t index, double x) {
  char* to = static_cast<char*>(elements) + index * size_of(dtype);
  const float rounded = static_cast<float>(x);
  if (dtype == DType::kFloat32) {
    std::memcpy(to, &rounded, sizeof(rounded));
    return;
  }
  if (dtype == DType::kInt8) {  // what must not be read has a scale that is NaN
    const double code = std::isnan(x) ? -128.0 : std::clamp(std::nearbyint(x), -127.0, 127.0);
    *to = static_cast<char>(static_cast<int8_t>(code));
    return;
  }
  uint16_t bits;
  if (std::isnan(x)) {
    bits = 0x7fff;
  } else if (dtype == DType::kFloat16) {
    bits = art::half_of(rounded);
  } else {
    const uint32_t all = art::bits_of(rounded);
    bits = static_cast<uint16_t>((all + 0x7fff + (all >> 16 & 1)) >> 16);
  }
  std::memcpy(to, &bits, sizeof(bits));
}

int64_t element(const DecodeParams& params, const art::PagedCache& cache, int64_t batch,
                int64_t head, int64_t token, int64_t dim) {
  const int64_t page = page_of(params, batch, head, token);
  return page * cache.page_stride + token % params.page_size * cache.token_stride +
         head * cache.head_stride + dim * cache.dim_stride;
}

double read(const DecodeParams& params, const art::PagedCache& cache,
            const art::PagedScales& scales, int64_t batch, int64_t head, int64_t token,
            int64_t dim) {
  const double x = read(params.dtype, cache.data, element(params, cache, batch, head, token, dim));
  if (scales.data == nullptr) return x;
  return x * scales.data[scale_index(params, scales, batch, head, token)];
}

void build(const Case& what, DType dtype, uint32_t seed, Problem& problem) {
  Random random(seed);
  DecodeParams& params = problem.params;
  params.dtype = dtype;
  params.query_dtype = dtype == DType::kInt8 ? DType::kFloat32 : dtype;
  params.batch = static_cast<int32_t>(what.lens.size());
  params.num_kv_heads = what.num_kv_heads;
  params.group_size = what.group_size;
  params.num_q_heads = what.num_kv_heads * what.group_size;
  params.head_dim = what.head_dim;
  params.value_dim = what.value_dim;
  params.page_size = what.page_size;
  set_tables(what, random, problem);
  allocate(what, dtype, params.num_pages, /*values=*/false, params.key, problem.keys);
  allocate(what, dtype, params.num_pages, /*values=*/true, params.value, problem.values);
  if (dtype == DType::kInt8) {
    allocate(what, params.num_pages, params.key_scale, problem.key_scales);
    allocate(what, params.num_pages, params.value_scale, problem.value_scales);
  }
  set_walk(what, random, problem);
  set_logits(what, random, problem);
  fill(what, random, problem);
  params.query = problem.query.data();
  params.query_head_stride = params.head_dim;
  params.query_batch_stride = int64_t{params.num_q_heads} * params.head_dim;
}

}  // namespace checks
