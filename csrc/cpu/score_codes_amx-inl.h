// Scores of key codes by products of tiles (AMX-INT8). Included after integer_codes-inl.h; the same
// interface as score_codes-inl.h, which it stands in for.
//
// A product adds, for 16 tokens as columns, up to 64 channels: codes as 16 rows of four channels
// each, times a row for each digit of each head.

namespace {

constexpr int kDigitRows = kDigits * kHeadsPerPass;
constexpr int kTileRows = 16;                                      // of codes
constexpr int kMaxRows = kMaxCodeChannels / kPlaces;               // of codes of a unit
constexpr int kSums = 0, kDigitTile = kGroupUnits, kCodeTile = 5;  // the first of four, and one

// Tiles in use while it lives. They are state of the thread that the system saves at every switch.
class ScoringState {
 public:
  ScoringState() {
    struct {
      uint8_t palette = 1;
      uint8_t reserved[15] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {kDigitRows, kDigitRows, kDigitRows, kDigitRows, kDigitRows, kTileRows};
    } config;
    static_assert(sizeof(config) == 64);
    _tile_loadconfig(&config);
  }
  ~ScoringState() { _tile_release(); }
  ScoringState(const ScoringState&) = delete;
  ScoringState& operator=(const ScoringState&) = delete;
};

// Codes of a unit, a byte each: [place, step][token, four fields].
ART_INLINE void spread_codes(const CodeLayout& layout, const uint8_t* arranged, uint8_t* rows) {
  for (int32_t step = 0; step < layout.steps; ++step) {
    const Words four = load_raw<Words>(arranged + step * 64);
#pragma GCC unroll 4
    for (int place = 0; place < kPlaces; ++place) {
      const Bytes codes = (Bytes)(four >> 2 * place) & kMaxCode;
      __builtin_memcpy(rows + (place * layout.steps + step) * 64, &codes, sizeof(codes));
    }
  }
}

// The digits of one head as rows of [place, step], kHeadsPerPass rows apart.
void spread_digits(const CodeLayout& layout, const float* scaled, uint32_t (*rows)[kMaxRows]) {
  const int32_t fields = padded_fields(layout);
  for (int32_t place = 0; place < kPlaces; ++place) {
    // The last vector may reach beyond its place: with zeros, and what comes next is written later.
    for (int32_t step = 0; step < layout.steps; step += 4) {
      const VecU v = load_raw<VecU>(scaled + place * fields + 4 * step);
      const VecU by_digit =
          __builtin_shufflevector(v, v, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      for (int digit = 0; digit < kDigits; ++digit) {
        __builtin_memcpy(&rows[digit * kHeadsPerPass][place * layout.steps + step],
                         reinterpret_cast<const char*>(&by_digit) + 16 * digit, 16);
      }
    }
  }
}

// Sums of the products of all units: [unit][digit, head][token].
void multiply(const CodeLayout& layout, const uint8_t (*codes)[kMaxRows * 64],
              const uint32_t (*digits)[kMaxRows], int32_t (*sums)[kDigitRows][kUnitTokens]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int32_t row = 0; row < kPlaces * layout.steps; row += kTileRows) {
    _tile_loadd(4, digits[0] + row, sizeof(digits[0]));
    _tile_loadd(5, codes[0] + row * 64, 64);
    _tile_dpbsud(0, 4, 5);
    _tile_loadd(5, codes[1] + row * 64, 64);
    _tile_dpbsud(1, 4, 5);
    _tile_loadd(5, codes[2] + row * 64, 64);
    _tile_dpbsud(2, 4, 5);
    _tile_loadd(5, codes[3] + row * 64, 64);
    _tile_dpbsud(3, 4, 5);
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
}

// Scores of one group for all heads, [group_size, kScoreStride]. `next` is a record to fetch.
void score_group(const DecodeParams& params, const CodeLayout& layout, const uint8_t* record,
                 const uint8_t* next, GuidedScratch& scratch) {
  alignas(64) uint8_t arranged[kGroupTokens * kMaxCodeChannels / kPlaces];
  alignas(64) uint8_t codes[kGroupUnits][kMaxRows * 64];
  // Zeros beyond the last row of codes, whatever those are.
  alignas(64) uint32_t digits[kDigitRows][kMaxRows];
  alignas(64) int32_t sums[kGroupUnits][kDigitRows][kUnitTokens];
  if (layout.steps % 4 != 0) __builtin_memset(digits, 0, sizeof(digits));
  arrange_codes(layout, record, arranged);
  for (int32_t unit = 0; unit < kGroupUnits; ++unit) {
    prefetch_record(layout, next, unit, 2 * kGroupUnits);
    spread_codes(layout, arranged + unit * layout.steps * 64, codes[unit]);
  }
  const CodeGrids grids(layout, record);
  const int32_t stride = kPlaces * padded_fields(layout);
  for (int32_t g = 0; g < params.group_size; g += kHeadsPerPass) {
    const int32_t left = params.group_size - g,
                  num_heads = left < kHeadsPerPass ? left : kHeadsPerPass;
    IntegerHead heads[kHeadsPerPass];
    for (int32_t h = 0; h < num_heads; ++h) {
      float* scaled = scratch.scaled + (g + h) * stride;
      heads[h] = scale_head(layout, grids, scratch.code_query + (g + h) * stride, scaled);
      spread_digits(layout, scaled, digits + h);
      if (g == 0) prefetch_record(layout, next, num_heads + h, 2 * num_heads);
    }
    multiply(layout, codes, digits, sums);
    for (int32_t h = 0; h < num_heads; ++h) {
      float* scores = scratch.tile.scores + (g + h) * kScoreStride;
      for (int32_t unit = 0; unit < kGroupUnits; ++unit) {
        const auto of_digit = [&](int digit) ART_ALWAYS_INLINE {
          return load_raw<VecI>(sums[unit][digit * kHeadsPerPass + h]);
        };
        store_scores(heads[h], of_digit(0), of_digit(1), of_digit(2), scores + unit * kUnitTokens);
      }
    }
  }
}

}  // namespace
