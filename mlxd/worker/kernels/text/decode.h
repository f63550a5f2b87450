// Attention of rows with one query each over keys and values in blocks.
//
// One thread group serves one row, one key/value head (its query heads share every key that is read) and one
// part of the row's sequence. Its simdgroups take turns in spans of SPAN tokens; SETS of them work side by
// side on the same tokens for different query heads. Inside a simdgroup, LANES lanes hold one key between
// them, so 32 / LANES keys are looked at side by side, UNROLL times, all loads issued before the first use.
//
// Each of these key groups keeps its own online softmax in float32 (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018): `top`, the largest score so far, `sum`, the weights so far
// relative to `top`, and `acc`, the values weighted so. They meet by shuffles when the part is done, then
// simdgroups meet in threadgroup memory, then, if the row was split, parts meet in merge.h (Dao et al.,
// "Flash-Decoding", 2023). Scores are in units of log 2, so that weights are powers of 2.
//
// Given in front: the type T; the constants NUM_HEADS, NUM_KV_HEADS, KEY_DIM, VALUE_DIM, BLOCK_SIZE,
// WINDOW (0: none), LANES, KEY_VECTOR, VALUE_VECTOR (elements a load), UNROLL, HEADS (query heads a
// simdgroup), SETS, KEY_SIMDGROUPS, SCORE_SCALE, SOFTCAP (0: none), with NORM also EPSILON; the macros WRITE,
// FUSED, NORM, TRADITIONAL, SPLIT and SINKS, 0 or 1.
// Inputs: queries T [N, NUM_HEADS, KEY_DIM]; context_lens, table_starts int32 [N]; block_tables int32, row
// n's from table_starts[n]; key_pool, value_pool T [blocks, NUM_KV_HEADS, BLOCK_SIZE, dim]; with WRITE keys,
// values T [N, NUM_KV_HEADS, dim], the step's own; with SINKS sinks T [NUM_HEADS]; after, anything that must
// be computed before.
// With FUSED (which goes with WRITE) what the three projections gave, still without normalisation and
// position: qkv T [N, NUM_HEADS * KEY_DIM + NUM_KV_HEADS * (KEY_DIM + VALUE_DIM)] instead of queries, keys
// and values; rotation float32 [N, KEY_DIM], the cosines and then the sines of half as many angles; with NORM
// query_weight, key_weight T [KEY_DIM].
// Outputs: out T [N, NUM_HEADS, VALUE_DIM], or with SPLIT parts float32 [N, NUM_HEADS, splits, VALUE_DIM],
// not yet divided by their sums, and stats float32 [N, NUM_HEADS, splits, 2], top and sum.
// With WRITE, row n's key and value at position context_lens[n] - 1 come from the step and are written to
// the pool; no other row of the launch may look at that place.
// Grid: x = key/value head * chunks of its query heads, y = split, z = row; 32 * SETS * KEY_SIMDGROUPS
// threads in x.

const int kv_head = group_x / CHUNKS;
const int chunk = group_x % CHUNKS;
const int row = group_z;
const int set = simdgroup % SETS;
const int turn = simdgroup / SETS;
const int key_group = lane / LANES;
const int piece = lane % LANES;
// The set's first query head, counted from the first of the key/value head.
const int first_head = (chunk * SETS + set) * HEADS;

// The part: tokens start <= t < end, of which those before `visible` are outside the window. It starts at
// a multiple of SPAN, so that a span never crosses a block when LOOKUPS is 1.
const int context = context_lens[row];
const int visible = WINDOW > 0 && context > WINDOW ? context - WINDOW : 0;
const int base = visible / SPAN * SPAN;
const int strides = (context - base + STRIDE - 1) / STRIDE;
const int part = (strides + num_groups_y - 1) / num_groups_y * STRIDE;
const int start = base + group_y * part;
const int end = start + part < context ? start + part : context;
const long table = table_starts[row];
const long query_row = (long)row * NUM_HEADS + kv_head * REPEATS;
#if FUSED
const DEVICE T* projected = qkv + (long)row * (NUM_HEADS * KEY_DIM + NUM_KV_HEADS * (KEY_DIM + VALUE_DIM));
const DEVICE T* own_queries = projected + kv_head * REPEATS * KEY_DIM;
const DEVICE T* own_key_at = projected + (NUM_HEADS + kv_head) * KEY_DIM;
const DEVICE T* own_value_at = projected + (NUM_HEADS + NUM_KV_HEADS) * KEY_DIM + kv_head * VALUE_DIM;
#else
const DEVICE T* own_queries = queries + query_row * KEY_DIM;
#if WRITE
const DEVICE T* own_key_at = keys + ((long)row * NUM_KV_HEADS + kv_head) * KEY_DIM;
const DEVICE T* own_value_at = values + ((long)row * NUM_KV_HEADS + kv_head) * VALUE_DIM;
#endif
#endif

#if WRITE
// The row's own token is not in the pool yet.
const int before = end == context ? end - 1 : end;
const int stop = visible < before ? before : start;
#else
const int stop = end;
#endif

// Loads run ahead of their use: while a span's scores are computed, its values and the next span's keys are on
// their way, and the block numbers of the span after that.
int blocks[LOOKUPS], next_blocks[LOOKUPS];
Pack<T, KEY_VECTOR> key[UNROLL][KEY_PIECES], next_key[UNROLL][KEY_PIECES];
const Bounds bounds = {visible, stop, key_group};
const int first_span = start + turn * SPAN;
find_blocks(blocks, block_tables + table_starts[row], first_span, bounds);
find_blocks(next_blocks, block_tables + table, first_span + STRIDE, bounds);
load_span<KEY_DIM>(key, key_pool, blocks, first_span, bounds, kv_head, piece);

float query[HEADS][KEY_PIECES][KEY_VECTOR];
float acc[HEADS][VALUE_PIECES][VALUE_VECTOR];
float top[HEADS];
float sum[HEADS];
#pragma unroll
for (int h = 0; h < HEADS; h++) {
  // Heads past the last one repeat it; their results are not written.
  const int head = first_head + h < REPEATS ? first_head + h : REPEATS - 1;
  const DEVICE Pack<T, KEY_VECTOR>* from = (const DEVICE Pack<T, KEY_VECTOR>*)(own_queries + head * KEY_DIM);
  #pragma unroll
  for (int j = 0; j < KEY_PIECES; j++) {
    const Pack<T, KEY_VECTOR> loaded = from[j * LANES + piece];
    #pragma unroll
    for (int i = 0; i < KEY_VECTOR; i++) {
      query[h][j][i] = float(loaded.v[i]);
    }
  }
  #if NORM
  normalise(query[h], query_weight, piece);
  #endif
  #if FUSED
  rotate(query[h], rotation + (long)row * KEY_DIM, piece);
  #endif
  #pragma unroll
  for (int j = 0; j < KEY_PIECES; j++) {
    #pragma unroll
    for (int i = 0; i < KEY_VECTOR; i++) {
      query[h][j][i] *= SCORE_SCALE;
    }
  }
  #pragma unroll
  for (int j = 0; j < VALUE_PIECES; j++) {
    #pragma unroll
    for (int i = 0; i < VALUE_VECTOR; i++) {
      acc[h][j][i] = 0;
    }
  }
  top[h] = LOWEST;
  sum[h] = 0;
}

#if WRITE
// The row's own token is the pool's from the next step on. In this one it is where a softmax begins: the first
// key group's, in the part that the token belongs to. All lanes come along, for the shuffles.
if (start < context && end == context) {
  float own_key[KEY_PIECES][KEY_VECTOR];
  #pragma unroll
  for (int j = 0; j < KEY_PIECES; j++) {
    const Pack<T, KEY_VECTOR> loaded = ((const DEVICE Pack<T, KEY_VECTOR>*)own_key_at)[j * LANES + piece];
    #pragma unroll
    for (int i = 0; i < KEY_VECTOR; i++) {
      own_key[j][i] = float(loaded.v[i]);
    }
  }
  #if NORM
  normalise(own_key, key_weight, piece);
  #endif
  #if FUSED
  rotate(own_key, rotation + (long)row * KEY_DIM, piece);
  #endif
  const bool first = turn == 0 && key_group == 0;
  #pragma unroll
  for (int h = 0; h < HEADS; h++) {
    float score = 0;
    #pragma unroll
    for (int j = 0; j < KEY_PIECES; j++) {
      #pragma unroll
      for (int i = 0; i < KEY_VECTOR; i++) {
        score += query[h][j][i] * own_key[j][i];
      }
    }
    #pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) {
      score += SHUFFLE_XOR(score, mask);
    }
    if (SOFTCAP > 0) {
      score = TANH(score) * (SOFTCAP * LOG2_E);
    }
    top[h] = first ? score : LOWEST;
    sum[h] = first ? EXP2(score - score) : 0;  // 1, or NaN
  }
  if (first) {
    const int place = context - 1;
    const int block = block_tables[table + unsigned(place) / BLOCK_SIZE];
    const long token = ((long)block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + unsigned(place) % BLOCK_SIZE;
    #pragma unroll
    for (int j = 0; j < VALUE_PIECES; j++) {
      const Pack<T, VALUE_VECTOR> value =
          ((const DEVICE Pack<T, VALUE_VECTOR>*)own_value_at)[j * LANES + piece];
      #pragma unroll
      for (int i = 0; i < VALUE_VECTOR; i++) {
        #pragma unroll
        for (int h = 0; h < HEADS; h++) {
          acc[h][j][i] = sum[h] * float(value.v[i]);
        }
      }
      if (chunk == 0 && set == 0) {
        ((DEVICE Pack<T, VALUE_VECTOR>*)(value_pool + token * VALUE_DIM))[j * LANES + piece] = value;
      }
    }
    if (chunk == 0 && set == 0) {
      #pragma unroll
      for (int j = 0; j < KEY_PIECES; j++) {
        Pack<T, KEY_VECTOR> key;
        #pragma unroll
        for (int i = 0; i < KEY_VECTOR; i++) {
          key.v[i] = T(own_key[j][i]);
        }
        ((DEVICE Pack<T, KEY_VECTOR>*)(key_pool + token * KEY_DIM))[j * LANES + piece] = key;
      }
    }
  }
}
#endif

#pragma unroll 1
for (int span = first_span; span < stop; span += STRIDE) {
  Pack<T, VALUE_VECTOR> value[UNROLL][VALUE_PIECES];
  load_span<VALUE_DIM>(value, value_pool, blocks, span, bounds, kv_head, piece);
  load_span<KEY_DIM>(next_key, key_pool, next_blocks, span + STRIDE, bounds, kv_head, piece);
  #pragma unroll
  for (int u = 0; u < LOOKUPS; u++) {
    blocks[u] = next_blocks[u];
  }
  find_blocks(next_blocks, block_tables + table, span + 2 * STRIDE, bounds);
  bool inside[UNROLL];
  #pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const int t = span + u * KEY_GROUPS + key_group;
    inside[u] = t >= visible && t < stop;
  }

  float weight[HEADS][UNROLL];
  #pragma unroll
  for (int h = 0; h < HEADS; h++) {
    #pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      weight[h][u] = 0;
    }
  }
  #pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    #pragma unroll
    for (int j = 0; j < KEY_PIECES; j++) {
      #pragma unroll
      for (int i = 0; i < KEY_VECTOR; i++) {
        const float k = float(key[u][j].v[i]);
        #pragma unroll
        for (int h = 0; h < HEADS; h++) {
          weight[h][u] += query[h][j][i] * k;
        }
      }
    }
  }
  #pragma unroll
  for (int h = 0; h < HEADS; h++) {
    float largest = top[h];
    #pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      float score = weight[h][u];
      #pragma unroll
      for (int mask = LANES / 2; mask > 0; mask /= 2) {
        score += SHUFFLE_XOR(score, mask);
      }
      if (SOFTCAP > 0) {
        score = TANH(score) * (SOFTCAP * LOG2_E);
      }
      weight[h][u] = inside[u] ? score : LOWEST;
      largest = MAX(largest, weight[h][u]);
    }
    const float shrink = EXP2(top[h] - largest);
    top[h] = largest;
    sum[h] *= shrink;
    #pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      weight[h][u] = inside[u] ? EXP2(weight[h][u] - largest) : 0;
      sum[h] += weight[h][u];
    }
    #pragma unroll
    for (int j = 0; j < VALUE_PIECES; j++) {
      #pragma unroll
      for (int i = 0; i < VALUE_VECTOR; i++) {
        acc[h][j][i] *= shrink;
      }
    }
  }
  #pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    #pragma unroll
    for (int j = 0; j < VALUE_PIECES; j++) {
      #pragma unroll
      for (int i = 0; i < VALUE_VECTOR; i++) {
        const float v = float(value[u][j].v[i]);
        #pragma unroll
        for (int h = 0; h < HEADS; h++) {
          acc[h][j][i] += weight[h][u] * v;
        }
      }
    }
  }
  #pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    #pragma unroll
    for (int j = 0; j < KEY_PIECES; j++) {
      key[u][j] = next_key[u][j];
    }
  }
}

// The key groups of a simdgroup, then its first key group writes for all.
SHARED float shared_acc[KEY_SIMDGROUPS][HEADS_IN_GROUP][VALUE_DIM];
SHARED float shared_top[KEY_SIMDGROUPS][HEADS_IN_GROUP];
SHARED float shared_sum[KEY_SIMDGROUPS][HEADS_IN_GROUP];
#pragma unroll
for (int h = 0; h < HEADS; h++) {
  float largest = top[h];
  #pragma unroll
  for (int mask = LANES; mask < 32; mask *= 2) {
    largest = MAX(largest, SHUFFLE_XOR(largest, mask));
  }
  const float shrink = EXP2(top[h] - largest);
  float total = sum[h] * shrink;
  #pragma unroll
  for (int mask = LANES; mask < 32; mask *= 2) {
    total += SHUFFLE_XOR(total, mask);
  }
  #pragma unroll
  for (int j = 0; j < VALUE_PIECES; j++) {
    #pragma unroll
    for (int i = 0; i < VALUE_VECTOR; i++) {
      float element = acc[h][j][i] * shrink;
      #pragma unroll
      for (int mask = LANES; mask < 32; mask *= 2) {
        element += SHUFFLE_XOR(element, mask);
      }
      if (key_group == 0) {
        shared_acc[turn][set * HEADS + h][(j * LANES + piece) * VALUE_VECTOR + i] = element;
      }
    }
  }
  if (lane == 0) {
    shared_top[turn][set * HEADS + h] = largest;
    shared_sum[turn][set * HEADS + h] = total;
  }
}
BARRIER();

// The simdgroups that took turns: each thread sums up some of the group's HEADS_IN_GROUP * VALUE_DIM numbers.
for (int index = thread_index; index < HEADS_IN_GROUP * VALUE_DIM; index += num_threads) {
  const int h = index / VALUE_DIM;
  const int d = index % VALUE_DIM;
  const int head = chunk * HEADS_IN_GROUP + h;
  if (head >= REPEATS) {
    break;
  }
  float largest = shared_top[0][h];
  #pragma unroll
  for (int s = 1; s < KEY_SIMDGROUPS; s++) {
    largest = MAX(largest, shared_top[s][h]);
  }
  float total = 0;
  #if SINKS && !SPLIT
  const float sink = float(sinks[kv_head * REPEATS + head]) * LOG2_E;
  largest = MAX(largest, sink);
  total = EXP2(sink - largest);
  #endif
  float element = 0;
  #pragma unroll
  for (int s = 0; s < KEY_SIMDGROUPS; s++) {
    const float shrink = EXP2(shared_top[s][h] - largest);
    total += shared_sum[s][h] * shrink;
    element += shared_acc[s][h][d] * shrink;
  }
  #if SPLIT
  const long to = (query_row + head) * num_groups_y + group_y;
  parts[to * VALUE_DIM + d] = element;
  if (d == 0) {
    stats[to * 2] = largest;
    stats[to * 2 + 1] = total;
  }
  #else
  // A row without any token gets 0, and NaN stays NaN.
  out[(query_row + head) * VALUE_DIM + d] = T(total > 0 ? element / total : total);
  #endif
}
