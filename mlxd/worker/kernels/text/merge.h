// The parts of split rows become one (decode.h): each weighs as much as its scores exceed the others'.
//
// One simdgroup serves one row and query head. Given in front: T, NUM_HEADS, VALUE_DIM and the macro SINKS.
// Inputs: parts float32 [N, NUM_HEADS, splits, VALUE_DIM], stats float32 [N, NUM_HEADS, splits, 2]; with
// SINKS sinks T [NUM_HEADS]. Output: out T [N, NUM_HEADS, VALUE_DIM].
// Grid: x = query head, z = row; 32 threads in x.

constexpr int ELEMENTS = (VALUE_DIM + 31) / 32;

const int splits = parts_shape[2];
const long row_head = (long)group_z * NUM_HEADS + group_x;
const long first = row_head * splits;

float largest = LOWEST;
for (int s = lane; s < splits; s += 32) {
  largest = MAX(largest, stats[(first + s) * 2]);
}
#pragma unroll
for (int mask = 16; mask > 0; mask /= 2) {
  largest = MAX(largest, SHUFFLE_XOR(largest, mask));
}
float total = 0;
#if SINKS
const float sink = float(sinks[group_x]) * LOG2_E;
largest = MAX(largest, sink);
total = EXP2(sink - largest);
#endif
float element[ELEMENTS];
#pragma unroll
for (int i = 0; i < ELEMENTS; i++) {
  element[i] = 0;
}
#pragma unroll 4
for (int s = 0; s < splits; s++) {
  const float shrink = EXP2(stats[(first + s) * 2] - largest);
  total += stats[(first + s) * 2 + 1] * shrink;
  #pragma unroll
  for (int i = 0; i < ELEMENTS; i++) {
    const int d = i * 32 + lane;
    if (d < VALUE_DIM) {
      element[i] += parts[(first + s) * VALUE_DIM + d] * shrink;
    }
  }
}
#pragma unroll
for (int i = 0; i < ELEMENTS; i++) {
  const int d = i * 32 + lane;
  if (d < VALUE_DIM) {
    out[row_head * VALUE_DIM + d] = T(total > 0 ? element[i] / total : total);
  }
}
