// What the kernels ask of Metal, under the names that cuda.h gives to CUDA's own.
// It knows nothing of attention. The .h files beside it that hold kernels use these names only.

#define DEVICE device
#define THREAD thread
#define SHARED threadgroup
#define FUNCTION inline
#define BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup)
#define SHUFFLE_XOR(value, mask) simd_shuffle_xor(value, ushort(mask))
// The larger one; what becomes of NaN is not relied upon.
#define MAX(a, b) metal::max(a, b)
#define EXP2(x) metal::exp2(x)
#define RSQRT(x) metal::precise::rsqrt(x)
#define TANH(x) metal::precise::tanh(x)
#define LOG2_E 1.44269504f
#define LOWEST -1e30f

// A vector that is loaded and stored at once.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};
