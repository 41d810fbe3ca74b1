#include "table.h"

namespace checks {
namespace {

void add_sizes(std::vector<Case>& cases) {
  cases.push_back({.name = "lengths", .lens = {0, 1, 15, 16, 17, 63, 64, 65, 129, 200}});
  for (const int32_t group : {1, 2, 3, 4, 5, 7, 8}) {
    cases.push_back({.name = "group of " + std::to_string(group),
                     .lens = {70, 331},
                     .num_kv_heads = 1,
                     .group_size = group});
  }
  constexpr int32_t kDims[][2] = {{32, 32},   {40, 72},   {72, 40},  {80, 80},
                                  {128, 128}, {136, 128}, {256, 32}, {32, 256}};
  for (const auto& dims : kDims) {
    cases.push_back({.name = "dims " + std::to_string(dims[0]) + " and " + std::to_string(dims[1]),
                     .lens = {3, 300},
                     .num_kv_heads = 1,
                     .group_size = 3,
                     .head_dim = dims[0],
                     .value_dim = dims[1]});
  }
}

void add_layouts(std::vector<Case>& cases) {
  const std::vector<int32_t> lens = {90, 250};
  cases.push_back({.name = "heads first", .lens = lens, .layout = Layout::kHeadsFirst});
  cases.push_back({.name = "padded rows", .lens = lens, .layout = Layout::kPaddedRows});
  cases.push_back({.name = "tokens last",
                   .lens = lens,
                   .head_dim = 40,
                   .page_size = 32,
                   .layout = Layout::kTokensLast});
  cases.push_back({.name = "page tables", .lens = lens, .layout = Layout::kPageTables});
  cases.push_back({.name = "one page", .lens = lens, .page_size = 250});
  // The units of a single page may have any size.
  cases.push_back({.name = "odd units",
                   .lens = lens,
                   .page_size = 250,
                   .order = WalkOrder::kRecentFirst,
                   .num_pinned = 3,
                   .unit_size = 7,
                   .block_size = 21});
}

void add_walks(std::vector<Case>& cases) {
  const std::vector<int32_t> lens = {500, 60};
  cases.push_back(
      {.name = "oldest first", .lens = lens, .order = WalkOrder::kOldestFirst, .num_pinned = 0});
  cases.push_back(
      {.name = "recent first", .lens = lens, .order = WalkOrder::kRecentFirst, .num_pinned = 1});
  cases.push_back(
      {.name = "explicit", .lens = lens, .order = WalkOrder::kExplicit, .num_pinned = 2});
  cases.push_back({.name = "explicit, visible from the middle",
                   .lens = lens,
                   .order = WalkOrder::kExplicit,
                   .num_pinned = 0,
                   .starts = true});
  cases.push_back({.name = "large blocks", .lens = lens, .block_size = 160});
  cases.push_back({.name = "small blocks", .lens = lens, .unit_size = 8, .block_size = 16});
}

void add_rules(std::vector<Case>& cases) {
  const std::vector<int32_t> lens = {900, 80};
  cases.push_back({.name = "no rule", .lens = lens, .stability = false});
  cases.push_back({.name = "patience 1", .lens = lens, .patience = 1});
  cases.push_back({.name = "patience 4", .lens = lens, .patience = 4});
  cases.push_back({.name = "thresholds of each head",
                   .lens = lens,
                   .d_scale = 0.08f,
                   .d_direction = 3e-3f,
                   .thresholds = true});
  cases.push_back({.name = "soft cap", .lens = lens, .softcap = 2.0f});
  cases.push_back({.name = "alibi", .lens = lens, .alibi = true});
  cases.push_back({.name = "sinks", .lens = lens, .sinks = true});
  cases.push_back({.name = "window", .lens = lens, .num_pinned = 4, .window = 230});
  cases.push_back({.name = "starts", .lens = lens, .starts = true});
}

void add_guided(std::vector<Case>& cases) {
  for (const int32_t group : {1, 2, 3, 4, 6}) {
    cases.push_back({.name = "guided, group of " + std::to_string(group),
                     .lens = {700, 64, 63, 0},
                     .num_kv_heads = 1,
                     .group_size = group,
                     .guided = true});
  }
  for (const int32_t dim : {32, 40, 128, 136, 256}) {
    cases.push_back({.name = "guided, dim " + std::to_string(dim),
                     .lens = {450},
                     .head_dim = dim,
                     .guided = true});
  }
  Case plain = {.name = "guided, ", .lens = {390, 520}, .guided = true};
  const auto add = [&](const char* name, const auto& change) {
    Case& changed = cases.emplace_back(plain);
    changed.name += name;
    change(changed);
  };
  add("residual mass", [](Case& c) { c.stability = false, c.residual = 0.5f; });
  add("either rule", [](Case& c) { c.residual = 0.3f; });
  add("both rules", [](Case& c) { c.residual = 0.7f, c.all_agree = true; });
  add("sinks", [](Case& c) { c.sinks = true, c.residual = 0.4f; });
  add("alibi and soft cap", [](Case& c) { c.alibi = true, c.softcap = 3.0f; });
  add("window", [](Case& c) { c.window = 301; });
  add("starts", [](Case& c) { c.starts = true; });
  add("tokens last", [](Case& c) { c.layout = Layout::kTokensLast, c.page_size = 32; });
}

}  // namespace

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  add_sizes(cases);
  add_layouts(cases);
  add_walks(cases);
  add_rules(cases);
  add_guided(cases);
  return cases;
}

}  // namespace checks
