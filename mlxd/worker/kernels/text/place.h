// Tokens of chunks, straight from the projections: queries to where MLX's attention wants them, keys and values
// to their places in the pool, which is written in place, and with OWN also beside the queries.
//
// LANES lanes do one head of one token, as in decode.h. Given in front: the type T; NUM_HEADS, NUM_KV_HEADS,
// KEY_DIM, VALUE_DIM, BLOCK_SIZE, LANES, KEY_VECTOR, VALUE_VECTOR, EPSILON; the macros NORM, TRADITIONAL and
// OWN, 0 or 1.
// Inputs: qkv T [N, NUM_HEADS * KEY_DIM + NUM_KV_HEADS * (KEY_DIM + VALUE_DIM)]; rotation float32 [N, KEY_DIM],
// cosines and then sines; with NORM query_weight, key_weight T [KEY_DIM]; tokens int32 [n * L], the token at each
// place of n sequences of L; slot_mapping int32 [n * L + 1], where in the pool that token belongs, block *
// BLOCK_SIZE + place, then L; key_pool, value_pool T [blocks, NUM_KV_HEADS, BLOCK_SIZE, dim]; after, anything
// that must be computed before. A token may be at several places.
// Outputs: queries T [n, NUM_HEADS, L, KEY_DIM]; with OWN keys, values T [n, NUM_KV_HEADS, L, dim]; done T [1],
// for others to come after.
// Grid: x = place * groups for the heads of a token; threads in x, a multiple of 32.

constexpr int ALL_HEADS = NUM_HEADS + 2 * NUM_KV_HEADS;

const int heads_in_group = num_threads / LANES;
const int groups = (ALL_HEADS + heads_in_group - 1) / heads_in_group;
const int place = group_x / groups;
const int number = group_x % groups * heads_in_group + thread_index / LANES;
const int piece = lane % LANES;
const bool is_query = number < NUM_HEADS;
const bool is_key = !is_query && number < NUM_HEADS + NUM_KV_HEADS;
// Lanes that have no query or key come along with the first one, for the shuffles.
const int head = is_query || is_key ? number : 0;
const int token = tokens[place];
const DEVICE T* projected = qkv + (long)token * (NUM_HEADS * KEY_DIM + NUM_KV_HEADS * (KEY_DIM + VALUE_DIM));

float x[KEY_PIECES][KEY_VECTOR];
#pragma unroll
for (int j = 0; j < KEY_PIECES; j++) {
  const Pack<T, KEY_VECTOR> loaded =
      ((const DEVICE Pack<T, KEY_VECTOR>*)(projected + head * KEY_DIM))[j * LANES + piece];
  #pragma unroll
  for (int i = 0; i < KEY_VECTOR; i++) {
    x[j][i] = float(loaded.v[i]);
  }
}
#if NORM
normalise(x, is_key ? key_weight : query_weight, piece);
#endif
rotate(x, rotation + (long)token * KEY_DIM, piece);

const int length = slot_mapping[num_groups_x / groups];
const int sequence = place / length;
const int inside = place % length;
const int slot = slot_mapping[place];
const int kv_head = is_query ? 0 : (number - NUM_HEADS) % NUM_KV_HEADS;
const long in_pool = ((long)(slot / BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE;
#if OWN
const long beside = ((long)sequence * NUM_KV_HEADS + kv_head) * length + inside;
#endif
if (is_query || is_key) {
  const long query = ((long)sequence * NUM_HEADS + head) * length + inside;
  DEVICE T* to = is_query ? queries + query * KEY_DIM : (DEVICE T*)key_pool + in_pool * KEY_DIM;
  #pragma unroll
  for (int j = 0; j < KEY_PIECES; j++) {
    Pack<T, KEY_VECTOR> made;
    #pragma unroll
    for (int i = 0; i < KEY_VECTOR; i++) {
      made.v[i] = T(x[j][i]);
    }
    ((DEVICE Pack<T, KEY_VECTOR>*)to)[j * LANES + piece] = made;
    #if OWN
    if (is_key) {
      ((DEVICE Pack<T, KEY_VECTOR>*)(keys + beside * KEY_DIM))[j * LANES + piece] = made;
    }
    #endif
  }
} else if (number < ALL_HEADS) {
  const DEVICE T* from = projected + (NUM_HEADS + NUM_KV_HEADS) * KEY_DIM + kv_head * VALUE_DIM;
  #pragma unroll
  for (int j = 0; j < VALUE_PIECES; j++) {
    const Pack<T, VALUE_VECTOR> value = ((const DEVICE Pack<T, VALUE_VECTOR>*)from)[j * LANES + piece];
    ((DEVICE Pack<T, VALUE_VECTOR>*)(value_pool + in_pool * VALUE_DIM))[j * LANES + piece] = value;
    #if OWN
    ((DEVICE Pack<T, VALUE_VECTOR>*)(values + beside * VALUE_DIM))[j * LANES + piece] = value;
    #endif
  }
}
if (group_x == 0 && thread_index == 0) {
  done[0] = T(1.0f);
}
