// Whole blocks of a pool, copied in place: the first step of a sequence that shares a block and then goes on.
//
// One thread moves one vector of a key and one of a value. Given in front: T, NUM_KV_HEADS, KEY_DIM, VALUE_DIM,
// BLOCK_SIZE, VECTOR (elements a load, of both dims).
// Inputs: pairs int32 [P, 2], source and destination; key_pool, value_pool T [blocks, NUM_KV_HEADS, BLOCK_SIZE,
// dim]; after, anything that must be computed before. Output: done T [1], for others to come after.
// No block may be both a source and a destination.
// Grid: x = vector of a block's larger dim, z = pair.

constexpr int KEY_PIECES = NUM_KV_HEADS * BLOCK_SIZE * KEY_DIM / VECTOR;
constexpr int VALUE_PIECES = NUM_KV_HEADS * BLOCK_SIZE * VALUE_DIM / VECTOR;

const int piece = group_x * num_threads + thread_index;
const long from = pairs[group_z * 2];
const long to = pairs[group_z * 2 + 1];
if (piece < KEY_PIECES) {
  ((DEVICE Pack<T, VECTOR>*)key_pool)[to * KEY_PIECES + piece] =
      ((const DEVICE Pack<T, VECTOR>*)key_pool)[from * KEY_PIECES + piece];
}
if (piece < VALUE_PIECES) {
  ((DEVICE Pack<T, VECTOR>*)value_pool)[to * VALUE_PIECES + piece] =
      ((const DEVICE Pack<T, VECTOR>*)value_pool)[from * VALUE_PIECES + piece];
}
if (piece == 0 && group_z == 0) {
  done[0] = T(1.0f);
}
