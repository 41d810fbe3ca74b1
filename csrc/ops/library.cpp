// The schemas of torch.ops.art, and nothing else. Arguments are only ever appended.
#include <torch/csrc/stable/library.h>

// `walk` with walk_order "guided" is one that guided_walk made for the same lengths and window: on
// a GPU its units are read as they are listed, without a look at whether they have visible tokens.
#define ART_DECODE_ARGUMENTS                                                                     \
  "Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, *, " \
  "float? scale=None, int criterion=0, float d_scale=0, float d_direction=0, int patience=1, "   \
  "Tensor? thresholds=None, str walk_order=\"sink_recent\", Tensor? walk=None, "                 \
  "Tensor? walk_lens=None, int? num_pinned=None, Tensor? num_pinned_per_head=None, "             \
  "int block_size=64, int unit_size=16, float softcap=0, Tensor? attn_sinks=None, "              \
  "int sliding_window=0, Tensor? alibi_slopes=None, Tensor? seq_starts=None, "                   \
  "bool batch_invariant=False, bool? checked=None, Tensor? log_rest=None, "                      \
  "float residual_mass=0, Tensor? key_scale=None, Tensor? value_scale=None"

#define ART_GUIDED_ARGUMENTS                                                     \
  "Tensor query, Tensor key_cache, Tensor block_table, Tensor seq_lens, "        \
  "Tensor key_codes, Tensor code_table, *, float? scale=None, float softcap=0, " \
  "Tensor? attn_sinks=None, int sliding_window=0, Tensor? alibi_slopes=None, "   \
  "Tensor? seq_starts=None, bool? checked=None, bool rest=False, "               \
  "Tensor? key_scale=None"
#define ART_GUIDED_RESULTS \
  "(Tensor walk, Tensor walk_lens, Tensor num_pinned, Tensor log_mass, Tensor log_rest)"

STABLE_TORCH_LIBRARY(art, m) {
  m.def("decode_attention(" ART_DECODE_ARGUMENTS ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("decode_attention.out(" ART_DECODE_ARGUMENTS
        ", Tensor(a!) out, Tensor(b!) lse, Tensor(c!) tokens_read, Tensor(d!) stop_block) -> ()");
  // For tests: stops must not depend on the number of splits, nor, where there are several, bits.
  m.def("_decode_attention_split(" ART_DECODE_ARGUMENTS
        ", int num_splits) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "append_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor slot_mapping, *, Tensor(c!)? key_scale=None, Tensor(d!)? value_scale=None) -> ()");
  m.def(
      "encode_keys(Tensor key_cache, Tensor block_table, Tensor seq_lens, Tensor(a!) key_codes, "
      "Tensor code_table, *, Tensor? coded_lens=None, bool? checked=None, "
      "Tensor? key_scale=None) -> ()");
  m.def("guided_walk(" ART_GUIDED_ARGUMENTS ") -> " ART_GUIDED_RESULTS);
  // For tests: nothing may depend on the number of thread blocks that order the units of a walk.
  m.def("_guided_walk_split(" ART_GUIDED_ARGUMENTS ", int num_splits) -> " ART_GUIDED_RESULTS);
}
