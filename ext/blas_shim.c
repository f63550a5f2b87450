/* Gives MLX's CPU library a fast BLAS.
 *
 * mlx-cpu's wheel links the reference BLAS, by the plain names below. The dynamic linker looks these up in the
 * global scope first, so a library that exports them, opened with RTLD_GLOBAL before libmlx.so, takes their
 * place. PyPI's scipy-openblas32 has them under a prefix; this file only joins the two. It knows nothing of
 * Python: mlxd/worker/platform.py opens it, calls mlxd_blas_init, and only on success makes it global, so a
 * failure leaves MLX with what it shipped. MLX's other BLAS and LAPACK symbols are not ours to replace.
 */
#include <dlfcn.h>
#include <stddef.h>

/* enums are ints and blasint is 32 bits wide in both libraries (scipy-openblas64 would not fit here) */
typedef void (*sgemm_fn)(int, int, int, int, int, int, float, const float *, int, const float *, int, float,
                         float *, int);
typedef void (*dgemm_fn)(int, int, int, int, int, int, double, const double *, int, const double *, int, double,
                         double *, int);
typedef void (*cgemm_fn)(int, int, int, int, int, int, const void *, const void *, int, const void *, int,
                         const void *, void *, int);

static sgemm_fn sgemm;
static dgemm_fn dgemm;
static cgemm_fn cgemm;
static void (*set_num_threads)(int);
static char *(*get_config)(void);

/* Loads OpenBLAS from `path`. 0 on success, 1 if it cannot be loaded, 2 if a symbol is missing. */
int mlxd_blas_init(const char *path)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        return 1;
    dgemm = (dgemm_fn)dlsym(library, "scipy_cblas_dgemm");
    cgemm = (cgemm_fn)dlsym(library, "scipy_cblas_cgemm");
    set_num_threads = (void (*)(int))dlsym(library, "scipy_openblas_set_num_threads");
    get_config = (char *(*)(void))dlsym(library, "scipy_openblas_get_config");
    sgemm = (sgemm_fn)dlsym(library, "scipy_cblas_sgemm");
    return sgemm && dgemm && cgemm && set_num_threads && get_config ? 0 : 2;
}

void mlxd_blas_set_num_threads(int count) { set_num_threads(count); }

const char *mlxd_blas_config(void) { return get_config(); }

void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc)
{
    sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void cblas_dgemm(int order, int trans_a, int trans_b, int m, int n, int k, double alpha, const double *a, int lda,
                 const double *b, int ldb, double beta, double *c, int ldc)
{
    dgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void cblas_cgemm(int order, int trans_a, int trans_b, int m, int n, int k, const void *alpha, const void *a, int lda,
                 const void *b, int ldb, const void *beta, void *c, int ldc)
{
    cgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
