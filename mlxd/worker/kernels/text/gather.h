// Sequences out of the pool, each one's tokens one after another.
//
// One thread moves one vector of a key and one of a value. Given in front: T, NUM_KV_HEADS, KEY_DIM, VALUE_DIM,
// BLOCK_SIZE, VECTOR (elements a load, of both dims).
// Inputs: key_pool, value_pool T [blocks, NUM_KV_HEADS, BLOCK_SIZE, dim]; block_tables int32 [n, W]; lengths
// int32 [n + 2], the tokens of each sequence, then S and W; after, anything that must be computed before.
// Outputs: keys, values T [n, NUM_KV_HEADS, S, dim], 0 where no token is.
// Grid: x = token * groups for the vectors of its larger dim, y = head, z = sequence.

constexpr int KEY_PIECES = KEY_DIM / VECTOR, VALUE_PIECES = VALUE_DIM / VECTOR;
constexpr int PIECES = KEY_PIECES > VALUE_PIECES ? KEY_PIECES : VALUE_PIECES;

const int groups = (PIECES + num_threads - 1) / num_threads;
const int token = group_x / groups;
const int piece = group_x % groups * num_threads + thread_index;
const int head = group_y;
const int count = num_groups_z;
const int size = lengths[count];
const bool inside = token < lengths[group_z];
const long block = inside ? block_tables[(long)group_z * lengths[count + 1] + token / BLOCK_SIZE] : 0;
const long from = (block * NUM_KV_HEADS + head) * BLOCK_SIZE + token % BLOCK_SIZE;
const long to = ((long)group_z * NUM_KV_HEADS + head) * size + token;
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
