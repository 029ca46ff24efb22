// The products of walk_wgmma.cuh with q4 weights: sm_90a only. Arguments and sizes: README.md.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(TR_EMULATOR)

extern "C" __global__ void __launch_bounds__(160) tr_gate_up_q4_wg_n8(const GateUp call) { gate_up_group<Q4Step, 8, 1, 6, 32>(call); }
extern "C" __global__ void __launch_bounds__(160) tr_gate_up_q4_wg_n16(const GateUp call) { gate_up_group<Q4Step, 16, 1, 5, 32>(call); }
extern "C" __global__ void __launch_bounds__(320) tr_gate_up_q4_wg_n32(const GateUp call) { gate_up_group<Q4Step, 32, 2, 4, 64>(call); }
extern "C" __global__ void __launch_bounds__(640) tr_gate_up_q4_wg_n64(const GateUp call) { gate_up_group<Q4Step, 64, 4, 4, 128>(call); }
extern "C" __global__ void __launch_bounds__(384) tr_gate_up_q4_wg_n128(const GateUp call) { gate_up_group<Q4Step, 128, 2, 6, 128>(call); }
extern "C" __global__ void __launch_bounds__(384) tr_gate_up_q4_wg_n256(const GateUp call) { gate_up_group<Q4Step, 256, 2, 4, 128>(call); }

extern "C" __global__ void __launch_bounds__(640) tr_down_q4_wg_n8(const Down call) { down_group<Q4Step, 8>(call); }
extern "C" __global__ void __launch_bounds__(640) tr_down_q4_wg_n16(const Down call) { down_group<Q4Step, 16>(call); }
extern "C" __global__ void __launch_bounds__(640) tr_down_q4_wg_n32(const Down call) { down_group<Q4Step, 32>(call); }
extern "C" __global__ void __launch_bounds__(384) tr_down_q4_wg_n64(const Down call) { down_group<Q4Step, 64>(call); }
extern "C" __global__ void __launch_bounds__(384) tr_down_q4_wg_n128(const Down call) { down_group<Q4Step, 128>(call); }

#endif
