// Keys and values of a step go to their places in the pool, which is written in place.
//
// One thread moves one vector of a key and one of a value. Given in front: T, NUM_KV_HEADS, KEY_DIM, VALUE_DIM,
// BLOCK_SIZE, VECTOR (elements a load, of both dims).
// Inputs: keys, values T [N, NUM_KV_HEADS, dim]; slot_mapping int32 [N], block * BLOCK_SIZE + place; key_pool,
// value_pool T [blocks, NUM_KV_HEADS, BLOCK_SIZE, dim]; after, anything that must be computed before.
// Output: done T [1], for others to come after.
// Grid: x = vector of a token's larger dim times heads, z = token.

constexpr int KEY_PIECES = KEY_DIM / VECTOR, VALUE_PIECES = VALUE_DIM / VECTOR;
constexpr int PIECES = KEY_PIECES > VALUE_PIECES ? KEY_PIECES : VALUE_PIECES;

const int index = group_x * num_threads + thread_index;
const int token = group_z;
const int head = index / PIECES;
const int piece = index % PIECES;
if (head < NUM_KV_HEADS) {
  const int slot = slot_mapping[token];
  const long from = (long)token * NUM_KV_HEADS + head;
  const long to = ((long)(slot / BLOCK_SIZE) * NUM_KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE;
  if (piece < KEY_PIECES) {
    ((DEVICE Pack<T, VECTOR>*)(key_pool + to * KEY_DIM))[piece] =
        ((const DEVICE Pack<T, VECTOR>*)(keys + from * KEY_DIM))[piece];
  }
  if (piece < VALUE_PIECES) {
    ((DEVICE Pack<T, VECTOR>*)(value_pool + to * VALUE_DIM))[piece] =
        ((const DEVICE Pack<T, VECTOR>*)(values + from * VALUE_DIM))[piece];
  }
}
if (index == 0 && token == 0) {
  done[0] = T(1.0f);
}
