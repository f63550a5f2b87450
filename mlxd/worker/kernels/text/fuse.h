// What a model does to a head's query or key between projection and attention, for decode.h's FUSED.
//
// `x` is one lane's share of a head: element i of piece j is number (j * LANES + piece) * KEY_VECTOR + i. Results
// are rounded to T where the model's own operations would write them to memory.

// x / sqrt(mean(x^2) + EPSILON) * weight
FUNCTION void normalise(THREAD float (&x)[KEY_PIECES][KEY_VECTOR], const DEVICE T* weight, int piece) {
  float squares = 0;
  #pragma unroll
  for (int j = 0; j < KEY_PIECES; j++) {
    #pragma unroll
    for (int i = 0; i < KEY_VECTOR; i++) {
      squares += x[j][i] * x[j][i];
    }
  }
  #pragma unroll
  for (int mask = LANES / 2; mask > 0; mask /= 2) {
    squares += SHUFFLE_XOR(squares, mask);
  }
  const float factor = RSQRT(squares / KEY_DIM + EPSILON);
  #pragma unroll
  for (int j = 0; j < KEY_PIECES; j++) {
    const Pack<T, KEY_VECTOR> loaded = ((const DEVICE Pack<T, KEY_VECTOR>*)weight)[j * LANES + piece];
    #pragma unroll
    for (int i = 0; i < KEY_VECTOR; i++) {
      x[j][i] = float(T(x[j][i] * factor * float(loaded.v[i])));
    }
  }
}

// Rotary position embedding over all elements. `rotation` holds the cosines, then the sines. A pair is elements
// 2k and 2k + 1 if TRADITIONAL, else k and k + half: a lane has both as long as KEY_PIECES is even.
FUNCTION void rotate(THREAD float (&x)[KEY_PIECES][KEY_VECTOR], const DEVICE float* rotation, int piece) {
  const DEVICE float* sines = rotation + KEY_DIM / 2;
  #if TRADITIONAL
  #pragma unroll
  for (int j = 0; j < KEY_PIECES; j++) {
    #pragma unroll
    for (int i = 0; i < KEY_VECTOR; i += 2) {
      const int k = ((j * LANES + piece) * KEY_VECTOR + i) / 2;
      const float first = x[j][i], second = x[j][i + 1];
      x[j][i] = float(T(first * rotation[k] - second * sines[k]));
      x[j][i + 1] = float(T(second * rotation[k] + first * sines[k]));
    }
  }
  #else
  #pragma unroll
  for (int j = 0; j < KEY_PIECES / 2; j++) {
    #pragma unroll
    for (int i = 0; i < KEY_VECTOR; i++) {
      const int k = (j * LANES + piece) * KEY_VECTOR + i;
      const float first = x[j][i], second = x[j + KEY_PIECES / 2][i];
      x[j][i] = float(T(first * rotation[k] - second * sines[k]));
      x[j + KEY_PIECES / 2][i] = float(T(second * rotation[k] + first * sines[k]));
    }
  }
  #endif
}
