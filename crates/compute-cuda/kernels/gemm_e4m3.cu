// The products of walk_mma.cuh with e4m3 weights. Arguments and sizes: README.md. The instruction needs sm_89.
#if __CUDA_ARCH__ >= 890 || defined(TR_EMULATOR)

extern "C" __global__ void __launch_bounds__(256, 1) tr_linear_e4m3_n8(const Linear call) { linear<Fp8Step, 8>(call); }
extern "C" __global__ void __launch_bounds__(256, 1) tr_linear_e4m3_n16(const Linear call) { linear<Fp8Step, 16>(call); }
extern "C" __global__ void __launch_bounds__(128, 1) tr_linear_e4m3_n32(const Linear call) { linear<Fp8Step, 32>(call); }
extern "C" __global__ void __launch_bounds__(128, 1) tr_linear_e4m3_n64(const Linear call) { linear<Fp8Step, 64>(call); }

extern "C" __global__ void __launch_bounds__(128) tr_gate_up_e4m3_n8(const GateUp call) { gate_up<Fp8Step, 8, 4, 2>(call); }
extern "C" __global__ void __launch_bounds__(128) tr_gate_up_e4m3_n16(const GateUp call) { gate_up<Fp8Step, 16, 4, 2>(call); }
extern "C" __global__ void __launch_bounds__(128) tr_gate_up_e4m3_n32(const GateUp call) { gate_up<Fp8Step, 32, 4, 2>(call); }
extern "C" __global__ void __launch_bounds__(128) tr_gate_up_e4m3_n64(const GateUp call) { gate_up<Fp8Step, 64, 4, 1>(call); }
extern "C" __global__ void __launch_bounds__(128) tr_gate_up_e4m3_n128(const GateUp call) { gate_up<Fp8Step, 128, 3, 1>(call); }

extern "C" __global__ void __launch_bounds__(256, 1) tr_down_e4m3_n8(const Down call) { down<Fp8Step, 8>(call); }
extern "C" __global__ void __launch_bounds__(256, 1) tr_down_e4m3_n16(const Down call) { down<Fp8Step, 16>(call); }
extern "C" __global__ void __launch_bounds__(128, 1) tr_down_e4m3_n32(const Down call) { down<Fp8Step, 32>(call); }
extern "C" __global__ void __launch_bounds__(128, 1) tr_down_e4m3_n64(const Down call) { down<Fp8Step, 64>(call); }

#endif
