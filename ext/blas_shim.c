/* replaced in the next commit */ int mlxd_blas_shim = 1;
