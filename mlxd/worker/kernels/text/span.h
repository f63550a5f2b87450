// How decode.h gets at the tokens of a span, and the numbers that follow from its constants.

#define REPEATS (NUM_HEADS / NUM_KV_HEADS)
#define HEADS_IN_GROUP (HEADS * SETS)
#define CHUNKS ((REPEATS + HEADS_IN_GROUP - 1) / HEADS_IN_GROUP)
#define KEY_GROUPS (32 / LANES)
#define SPAN (KEY_GROUPS * UNROLL)
#define STRIDE (SPAN * KEY_SIMDGROUPS)
// Block numbers that a lane needs for a span: its tokens are in one block where blocks are multiples of spans.
#define LOOKUPS (BLOCK_SIZE % SPAN == 0 ? 1 : UNROLL)

// Tokens visible <= t < stop count; key_group says which of a span's are this lane's.
struct Bounds {
  int visible, stop, key_group;
};

// Places that count for nothing may hold anything, NaN too: one that counts is looked at instead.
FUNCTION unsigned int allowed(int t, Bounds bounds) {
  return t >= bounds.stop ? bounds.stop - 1 : t < bounds.visible ? bounds.visible : t;
}

// The blocks of a span's tokens, from a row's table.
template <typename Table>
FUNCTION void find_blocks(THREAD int (&blocks)[LOOKUPS], Table table, int span, Bounds bounds) {
  #pragma unroll
  for (int u = 0; u < LOOKUPS; u++) {
    const int t = span + u * KEY_GROUPS + (LOOKUPS > 1 ? bounds.key_group : 0);
    blocks[u] = span < bounds.stop ? table[allowed(t, bounds) / BLOCK_SIZE] : 0;
  }
}

// This lane's share of a span's keys or values. Spans behind the part's end stay as they are.
template <int DIM, int PIECES, int VECTOR>
FUNCTION void load_span(
    THREAD Pack<T, VECTOR> (&to)[UNROLL][PIECES], const DEVICE T* pool,
    const THREAD int (&blocks)[LOOKUPS], int span, Bounds bounds, int kv_head, int piece) {
  if (span >= bounds.stop) {
    return;
  }
  #pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const unsigned int place = allowed(span + u * KEY_GROUPS + bounds.key_group, bounds);
    const long block = blocks[LOOKUPS > 1 ? u : 0];
    const long token = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + place % BLOCK_SIZE;
    const DEVICE Pack<T, VECTOR>* from = (const DEVICE Pack<T, VECTOR>*)(pool + token * DIM);
    #pragma unroll
    for (int j = 0; j < PIECES; j++) {
      to[u][j] = from[j * LANES + piece];
    }
  }
}
