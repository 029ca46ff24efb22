// The products of walk_mma.cuh with bf16 weights. Arguments and sizes: README.md.

extern "C" __global__ void __launch_bounds__(256, 1) tr_linear_bf16_n8(const Linear call) { linear<Bf16Step, 8>(call); }
extern "C" __global__ void __launch_bounds__(256, 1) tr_linear_bf16_n16(const Linear call) { linear<Bf16Step, 16>(call); }
extern "C" __global__ void __launch_bounds__(128, 1) tr_linear_bf16_n32(const Linear call) { linear<Bf16Step, 32>(call); }
extern "C" __global__ void __launch_bounds__(128, 1) tr_linear_bf16_n64(const Linear call) { linear<Bf16Step, 64>(call); }

extern "C" __global__ void __launch_bounds__(128) tr_gate_up_bf16_n8(const GateUp call) { gate_up<Bf16Step, 8, 4, 2>(call); }
extern "C" __global__ void __launch_bounds__(128) tr_gate_up_bf16_n16(const GateUp call) { gate_up<Bf16Step, 16, 4, 2>(call); }
extern "C" __global__ void __launch_bounds__(128) tr_gate_up_bf16_n32(const GateUp call) { gate_up<Bf16Step, 32, 4, 2>(call); }
extern "C" __global__ void __launch_bounds__(128) tr_gate_up_bf16_n64(const GateUp call) { gate_up<Bf16Step, 64, 4, 1>(call); }
extern "C" __global__ void __launch_bounds__(128) tr_gate_up_bf16_n128(const GateUp call) { gate_up<Bf16Step, 128, 3, 1>(call); }

extern "C" __global__ void __launch_bounds__(256, 1) tr_down_bf16_n8(const Down call) { down<Bf16Step, 8>(call); }
extern "C" __global__ void __launch_bounds__(256, 1) tr_down_bf16_n16(const Down call) { down<Bf16Step, 16>(call); }
extern "C" __global__ void __launch_bounds__(128, 1) tr_down_bf16_n32(const Down call) { down<Bf16Step, 32>(call); }
extern "C" __global__ void __launch_bounds__(128, 1) tr_down_bf16_n64(const Down call) { down<Bf16Step, 64>(call); }
