// What a model does to a head's query or key between projection and attention, for decode.h's FUSED.
//
// `x` is one lane's share of a head: element i of piece j is number (j * LANES + piece) * VECTOR + i. Results are
// rounded to T where the model's own operations would write them to memory.

// x / sqrt(mean(x^2) + epsilon) * weight
template <typename T, int PIECES, int VECTOR, int LANES>
FUNCTION void normalise(THREAD float (&x)[PIECES][VECTOR], const DEVICE T* weight, float epsilon, int piece) {
  float squares = 0;
  #pragma unroll
  for (int j = 0; j < PIECES; j++) {
    #pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      squares += x[j][i] * x[j][i];
    }
  }
  #pragma unroll
  for (int mask = LANES / 2; mask > 0; mask /= 2) {
    squares += SHUFFLE_XOR(squares, mask);
  }
  const float factor = RSQRT(squares / (PIECES * VECTOR * LANES) + epsilon);
  #pragma unroll
  for (int j = 0; j < PIECES; j++) {
    const Pack<T, VECTOR> loaded = ((const DEVICE Pack<T, VECTOR>*)weight)[j * LANES + piece];
    #pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      x[j][i] = float(T(x[j][i] * factor * float(loaded.v[i])));
    }
  }
}

// Rotary position embedding over all elements. `rotation` holds the cosines, then the sines. A pair is elements
// 2k and 2k + 1 if TRADITIONAL, else k and k + half: a lane has both as long as PIECES is even.
template <typename T, int PIECES, int VECTOR, int LANES>
FUNCTION void rotate(THREAD float (&x)[PIECES][VECTOR], const DEVICE float* rotation, int piece) {
  constexpr int HALF = PIECES * VECTOR * LANES / 2;
  #if TRADITIONAL
  #pragma unroll
  for (int j = 0; j < PIECES; j++) {
    #pragma unroll
    for (int i = 0; i < VECTOR; i += 2) {
      const int k = ((j * LANES + piece) * VECTOR + i) / 2;
      const float first = x[j][i], second = x[j][i + 1];
      x[j][i] = float(T(first * rotation[k] - second * rotation[HALF + k]));
      x[j][i + 1] = float(T(second * rotation[k] + first * rotation[HALF + k]));
    }
  }
  #else
  #pragma unroll
  for (int j = 0; j < PIECES / 2; j++) {
    #pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      const int k = (j * LANES + piece) * VECTOR + i;
      const float first = x[j][i], second = x[j + PIECES / 2][i];
      x[j][i] = float(T(first * rotation[k] - second * rotation[HALF + k]));
      x[j + PIECES / 2][i] = float(T(second * rotation[k] + first * rotation[HALF + k]));
    }
  }
  #endif
}
