// Whole rows of an array, by number: what MLX's own gather does element by element.
//
// One thread moves one vector. Given in front: T, ROW (elements of a row), VECTOR (elements a load).
// Inputs: rows T [N, ROW], places int32 [M]. Output: taken T [M, ROW].
// Grid: x = vector of a row, z = row of the output.

constexpr int PIECES = ROW / VECTOR;

const int piece = group_x * num_threads + thread_index;
if (piece < PIECES) {
  ((DEVICE Pack<T, VECTOR>*)taken)[(long)group_z * PIECES + piece] =
      ((const DEVICE Pack<T, VECTOR>*)rows)[(long)places[group_z] * PIECES + piece];
}
