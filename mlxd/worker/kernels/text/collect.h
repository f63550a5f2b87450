// What the parts of a step's attention gave, in the order of the step's tokens.
//
// One thread moves one vector. Given in front: T, NUM_HEADS, VALUE_DIM, VECTOR (elements a load); SOURCE(n), the
// n-th source.
// Inputs: source0, source1, … T [n, NUM_HEADS, L, VALUE_DIM], each of its own n and L; places int32 [N, 4], where
// each token is: the source, the sequence in it, the place in that, and L.
// Output: out T [N, NUM_HEADS, VALUE_DIM].
// Grid: x = token * groups for the vectors of a token.

constexpr int PIECES = VALUE_DIM / VECTOR;

const int groups = (NUM_HEADS * PIECES + num_threads - 1) / num_threads;
const int token = group_x / groups;
const int index = group_x % groups * num_threads + thread_index;
if (index < NUM_HEADS * PIECES) {
  const DEVICE T* from = SOURCE(places[4 * token]);
  const int sequence = places[4 * token + 1], place = places[4 * token + 2], length = places[4 * token + 3];
  const long row = ((long)sequence * NUM_HEADS + index / PIECES) * length + place;
  ((DEVICE Pack<T, VECTOR>*)out)[(long)token * NUM_HEADS * PIECES + index] =
      ((const DEVICE Pack<T, VECTOR>*)(from + row * VALUE_DIM))[index % PIECES];
}
