// One sequence out of the pool, its tokens one after another.
//
// One thread moves one vector of a key and one of a value. Given in front: T, NUM_KV_HEADS, KEY_DIM, VALUE_DIM,
// BLOCK_SIZE, VECTOR (elements a load, of both dims).
// Inputs: key_pool, value_pool T [blocks, NUM_KV_HEADS, BLOCK_SIZE, dim]; block_tables int32 [S / BLOCK_SIZE,
// rounded up]; lengths int32 [2], the tokens to copy and S; after, anything that must be computed before.
// Outputs: keys, values T [NUM_KV_HEADS, S, dim], 0 where no token is.
// Grid: x = vector of a token's larger dim, y = head, z = token.

constexpr int KEY_PIECES = KEY_DIM / VECTOR, VALUE_PIECES = VALUE_DIM / VECTOR;

const int piece = group_x * num_threads + thread_index;
const int head = group_y;
const int token = group_z;
const bool inside = token < lengths[0];
const long block = inside ? block_tables[token / BLOCK_SIZE] : 0;
const long from = (block * NUM_KV_HEADS + head) * BLOCK_SIZE + token % BLOCK_SIZE;
const long to = (long)head * lengths[1] + token;
if (piece < KEY_PIECES) {
  Pack<T, VECTOR> key;
  #pragma unroll
  for (int i = 0; i < VECTOR; i++) {
    key.v[i] = T(0.0f);
  }
  if (inside) {
    key = ((const DEVICE Pack<T, VECTOR>*)(key_pool + from * KEY_DIM))[piece];
  }
  ((DEVICE Pack<T, VECTOR>*)(keys + to * KEY_DIM))[piece] = key;
}
if (piece < VALUE_PIECES) {
  Pack<T, VECTOR> value;
  #pragma unroll
  for (int i = 0; i < VECTOR; i++) {
    value.v[i] = T(0.0f);
  }
  if (inside) {
    value = ((const DEVICE Pack<T, VECTOR>*)(value_pool + from * VALUE_DIM))[piece];
  }
  ((DEVICE Pack<T, VECTOR>*)(values + to * VALUE_DIM))[piece] = value;
}
