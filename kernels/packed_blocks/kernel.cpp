// Packed blocks on CPU: sealing, unpacking, and attention. Attention unpacks a split of keys and values of one kv head
// into the thread's own memory, where paged attention reads them as a block of a float cache. So a query's result is bit
// for bit that of paged attention over the unpacked tokens, alone or among others.
#include <algorithm>

#include "arena.h"
#include "attention.h"
#include "dispatch.h"
#include "team.h"

namespace {

using namespace kvasir;
using attention::kSplitKeys;
using packed::Packed;
using packed::Pool;
using packed::Side;

thread_local Arena arena;

constexpr int64_t kElementsPerThread = 32768;  // that are worth waking a thread

// unit: which one of the blocks at `from`, of that element type.
void seal_unit(const Pool& pool, const void* from, int64_t dtype, int64_t unit, uint8_t* group) {
  const int64_t n = pool.side.block_size * pool.side.dim;
  float* x = arena.reserve(2 * n);
  with_dtype(dtype, [&](auto type) {
    const auto* elements = (const decltype(type)*)from + unit * n;
    for (int64_t i = 0; i < n; ++i) x[i] = to_float(elements[i]);
  });
  packed::pack(pool.side, x, group, (uint8_t*)(x + n));
}

// ---- attention ----

// Tokens [begin, end) of a row's kv head to floats.
void unpack_range(const Pool& pool, const int32_t* table, int64_t places, int64_t layer, int64_t head, int64_t begin,
                  int64_t end, float* to) {
  const Side& side = pool.side;
  for (int64_t token = begin; token < end;) {
    const int64_t group = token / side.block_size, first = token % side.block_size;
    const int64_t count = std::min(end - token, side.block_size - first);
    const uint8_t* unit = pool.unit(table[group / places], layer, head);
    packed::unpack(side, unit + group % places * side.group_bytes, first, count, to);
    to += count * side.dim;
    token += count;
  }
}

}  // namespace

namespace kvasir::packed {

// An item has one split; each of its queries writes a partial as if it were alone.
void run_item(const attention::Params& p, const Packed& packed, int64_t i, int64_t kv_head) {
  attention::Item item = ((const attention::Item*)p.items)[i];
  const int64_t begin = int64_t(item.first_split) * kSplitKeys;
  const int64_t end = std::min<int64_t>(begin + kSplitKeys, p.seq_lens[item.row]);
  float* k = arena.reserve(kSplitKeys * (p.head_dim + p.head_dim_v));
  float* v = k + kSplitKeys * p.head_dim;
  const int32_t* table = p.block_table + item.row * p.table_stride_row;
  unpack_range(packed.keys, table, packed.places, packed.layer, kv_head, begin, end, k);
  unpack_range(packed.values, table, packed.places, packed.layer, kv_head, begin, end, v);

  const int32_t only_block = 0;
  const int64_t num_queries = p.cu_seqlens_q[item.row + 1] - p.cu_seqlens_q[item.row];
  int32_t seq_len = 0;
  attention::Params one = p;
  one.k_cache = k;
  one.v_cache = v;
  one.block_table = &only_block;
  one.seq_lens = &seq_len;
  one.items = (const int32_t*)&item;
  one.block_size = kSplitKeys;
  one.cache_dtype = kFloat32;
  one.table_stride_row = 0;
  const int32_t first_query = item.first_query, count = item.num_queries, partial = item.partial;
  for (int32_t query = 0; query < count; ++query) {
    item = {item.row, first_query + query, 1, 0, 1, partial + query};
    seq_len = int32_t(end - begin + num_queries - 1 - item.first_query);  // so that it sees all keys of the split
    attention::run_item(one, 0, kv_head);
  }
}

}  // namespace kvasir::packed

// Unit-wise over n blocks: ids are [n] each. origin: blocks of the same shape as the pool's, of type origin_dtype.
KVASIR_EXPORT void kvasir_seal_blocks(const Pool* pool, const void* origin, int64_t origin_dtype, const int64_t* source,
                                      const int64_t* destination, const int64_t* places, int64_t n,
                                      int64_t num_threads) {
  const int64_t units = pool->num_layers * pool->num_heads, elements = pool->side.block_size * pool->side.dim;
  parallel_for_runs(n * units, elements, kElementsPerThread, num_threads, [&](int64_t i) {
    const int64_t layer = i % units / pool->num_heads, head = i % pool->num_heads, block = i / units;
    seal_unit(*pool, origin, origin_dtype, source[block] * units + layer * pool->num_heads + head,
              pool->unit(destination[block], layer, head) + places[block] * pool->side.group_bytes);
  });
}

// out: [n, L, H_kv, BS, dim]
KVASIR_EXPORT void kvasir_unpack_blocks(const Pool* pool, const int64_t* blocks, const int64_t* places, float* out,
                                        int64_t n, int64_t num_threads) {
  const int64_t units = pool->num_layers * pool->num_heads, elements = pool->side.block_size * pool->side.dim;
  parallel_for_runs(n * units, elements, kElementsPerThread, num_threads, [&](int64_t i) {
    const int64_t layer = i % units / pool->num_heads, head = i % pool->num_heads, block = i / units;
    const uint8_t* group = pool->unit(blocks[block], layer, head) + places[block] * pool->side.group_bytes;
    packed::unpack(pool->side, group, 0, pool->side.block_size, out + i * elements);
  });
}

// p: as for paged attention, with block_table and seq_lens those of packed tokens and no caches.
KVASIR_EXPORT void kvasir_packed_attention(const attention::Params* p, const Packed* tokens) {
  parallel_for(p->num_items * p->num_kv_heads, p->num_threads,
               [&](int64_t i) { packed::run_item(*p, *tokens, i / p->num_kv_heads, i % p->num_kv_heads); });
  parallel_for(p->num_merges * p->num_kv_heads, p->num_threads,
               [&](int64_t i) { attention::run_merge(*p, i / p->num_kv_heads, i % p->num_kv_heads); });
}
