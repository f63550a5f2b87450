// What the kernels ask of CUDA, under the names that metal.h gives to Metal's own.
// It knows nothing of attention. The .h files beside it that hold kernels use these names only.

#define DEVICE
#define THREAD
#define SHARED __shared__
#define FUNCTION __device__ inline
#define BARRIER() __syncthreads()
#define SHUFFLE_XOR(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
// The larger one; what becomes of NaN is not relied upon.
#define MAX(a, b) fmaxf(a, b)
#define EXP2(x) exp2f(x)
#define RSQRT(x) rsqrtf(x)
#define TANH(x) tanhf(x)
#define LOG2_E 1.44269504f
#define LOWEST -1e30f

// A vector that is loaded and stored at once.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};
