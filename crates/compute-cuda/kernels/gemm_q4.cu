// The products of walk_mma.cuh with q4 weights. Arguments and sizes: README.md.

extern "C" __global__ void __launch_bounds__(128) tr_gate_up_q4_n8(const GateUp call) { gate_up<Q4Step, 8, 4, 2>(call); }
extern "C" __global__ void __launch_bounds__(128) tr_gate_up_q4_n16(const GateUp call) { gate_up<Q4Step, 16, 4, 2>(call); }
extern "C" __global__ void __launch_bounds__(128) tr_gate_up_q4_n32(const GateUp call) { gate_up<Q4Step, 32, 4, 2>(call); }
extern "C" __global__ void __launch_bounds__(128) tr_gate_up_q4_n64(const GateUp call) { gate_up<Q4Step, 64, 4, 1>(call); }
extern "C" __global__ void __launch_bounds__(128) tr_gate_up_q4_n128(const GateUp call) { gate_up<Q4Step, 128, 3, 1>(call); }

extern "C" __global__ void __launch_bounds__(256, 1) tr_down_q4_n8(const Down call) { down<Q4Step, 8>(call); }
extern "C" __global__ void __launch_bounds__(256, 1) tr_down_q4_n16(const Down call) { down<Q4Step, 16>(call); }
extern "C" __global__ void __launch_bounds__(128, 1) tr_down_q4_n32(const Down call) { down<Q4Step, 32>(call); }
extern "C" __global__ void __launch_bounds__(128, 1) tr_down_q4_n64(const Down call) { down<Q4Step, 64>(call); }
