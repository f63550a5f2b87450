const int group_x = threadgroup_position_in_grid.x, group_y = threadgroup_position_in_grid.y,
          group_z = threadgroup_position_in_grid.z;
const int num_groups_x = threadgroups_per_grid.x, num_groups_y = threadgroups_per_grid.y,
          num_groups_z = threadgroups_per_grid.z;
const int thread_index = thread_index_in_threadgroup;
const int num_threads = threads_per_threadgroup.x;
const int lane = thread_index_in_simdgroup;
const int simdgroup = simdgroup_index_in_threadgroup;
