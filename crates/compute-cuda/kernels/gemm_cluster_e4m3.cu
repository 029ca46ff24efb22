// The products of walk_wgmma.cuh for long batches with e4m3 weights: blocks of a cluster share their tokens. sm_90a only. Arguments
// and sizes: README.md.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(TR_EMULATOR)

extern "C" __global__ void __cluster_dims__(1, 2, 1) __launch_bounds__(384) tr_linear_e4m3_cl_n128(const Linear call) { linear_group<Fp8Step, 128, 2>(call); }
extern "C" __global__ void __cluster_dims__(1, 2, 1) __launch_bounds__(384) tr_gate_up_e4m3_cl_n256(const GateUp call) { gate_up_cluster<Fp8Step, 2>(call); }
extern "C" __global__ void __cluster_dims__(1, 2, 1) __launch_bounds__(384) tr_down_e4m3_cl_n128(const Down call) { down_cluster<Fp8Step, 2>(call); }

#endif
