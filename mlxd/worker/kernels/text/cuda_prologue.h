const int group_x = blockIdx.x, group_y = blockIdx.y, group_z = blockIdx.z;
const int num_groups_x = gridDim.x, num_groups_y = gridDim.y, num_groups_z = gridDim.z;
const int thread_index = threadIdx.x;
const int num_threads = blockDim.x;
const int lane = thread_index % 32;
const int simdgroup = thread_index / 32;
