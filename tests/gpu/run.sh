#!/bin/sh
# Everything that only a GPU can show: kernel and backend tests under compute-sanitizer, then the benchmark beside PyTorch.
# Runs unattended on a machine that has only an NVIDIA driver, NVRTC, NCCL and Python; needs no Rust and no network there.
#
# Before, where the repository is built:
#   tests/gpu/run.sh pack DIR      builds the binaries and puts what is needed into DIR (about 60 MB)
# Carry DIR to the machine (it needs nothing else), and there:
#   DIR/run.sh [OUT]               writes OUT/tests.log, OUT/sanitizer.log, OUT/bench-*.json, OUT/torch.json (OUT: ./gpu-results)
#
# NVRTC and NCCL are looked for in TRAMONTANE_TEST_CUDA_LIBRARIES, then where Python packages put it, then where the loader looks.
# Two ranks of an island on this one GPU are among the tests; by themselves, with the variables of before and TRAMONTANE_TEST_REQUIRE_GPU=1:
#   test-exact --exact island::processes::two_processes_have_the_bits_of_one --nocapture
# Exit status: 0 all passed; 1 something failed (the logs say what); 2 there is no GPU, or NVRTC is missing.
set -u

here=$(cd "$(dirname "$0")" && pwd)

pack() {
    dir=$1
    mkdir -p "$dir"
    cd "$here/../.." || exit 1
    cargo build --release --locked -p tramontane --bin tramontane || exit 1
    cargo test --workspace --locked --no-run --message-format=json --test exact --test kernels 2>/dev/null |
        python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("reason") == "compiler-artifact" and message.get("executable") and "compute-cuda" in message["package_id"]:
        print(message["target"]["name"], message["executable"])' |
        while read -r name path; do cp "$path" "$dir/test-$name" && strip --strip-debug "$dir/test-$name"; done
    [ -x "$dir/test-exact" ] && [ -x "$dir/test-kernels" ] || { echo "the test binaries were not built" >&2; exit 1; }
    cp "${CARGO_TARGET_DIR:-target}/release/tramontane" "$dir/"
    cp tests/gpu/run.sh tests/gpu/torch_decode.py "$dir/"
    echo "carry $dir, then run $dir/run.sh there"
}

if [ "${1:-}" = pack ]; then
    [ $# = 2 ] || { echo "usage: run.sh pack DIR" >&2; exit 2; }
    pack "$2"
    exit
fi

out=${1:-gpu-results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$here" || exit 1

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L >"$out/device.txt" 2>&1; then
    echo "no GPU: nvidia-smi does not answer" >&2
    exit 2
fi
cat "$out/device.txt"
nvidia-smi --query-gpu=driver_version,clocks.max.sm,clocks.max.mem,memory.total --format=csv >>"$out/device.txt"

if [ -z "${TRAMONTANE_TEST_CUDA_LIBRARIES:-}" ]; then
    found=$(python3 -c '
import glob, sys, sysconfig
paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}
for path in paths:
    for lib in glob.glob(f"{path}/nvidia/*/lib"):
        if glob.glob(f"{lib}/libnvrtc.so.1[23]"):
            print(lib); raise SystemExit')
    [ -n "$found" ] && export TRAMONTANE_TEST_CUDA_LIBRARIES="$found"
fi
export TRAMONTANE_WORKER__CUDA_LIBRARIES="${TRAMONTANE_TEST_CUDA_LIBRARIES:-}"
[ -n "$TRAMONTANE_WORKER__CUDA_LIBRARIES" ] || unset TRAMONTANE_WORKER__CUDA_LIBRARIES
export TRAMONTANE_WORKER__KERNEL_CACHE="$out/kernels"
# The tests keep theirs beside it, and leave the emulator out.
export TRAMONTANE_TEST_DIR="$out/tests"
export TRAMONTANE_TEST_REQUIRE_GPU=1
failed=0

target=$(python3 - <<'PY'
import subprocess
capability = subprocess.run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True).stdout.split()[0]
print({"8.9": "sm_89", "9.0": "sm_90a", "10.0": "sm_100a"}.get(capability, "sm_80" if capability.startswith("8") else "sm_120"))
PY
)
if ! ./tramontane kernels build --target "$target" >"$out/kernels.txt" 2>"$out/kernels.log"; then
    cat "$out/kernels.log" >&2
    exit 2
fi

# One after the other: they share the device.
./test-exact --test-threads 1 --nocapture >"$out/tests.log" 2>&1 || { echo "tests failed, see $out/tests.log"; failed=1; }

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
if [ -n "$sanitizer" ]; then
    : >"$out/sanitizer.log"
    for tool in memcheck racecheck synccheck initcheck; do
        echo "== $tool" >>"$out/sanitizer.log"
        # Uninitialised reads of rows behind the last one of a bucket are meant: initcheck only reports.
        code=1; [ "$tool" = initcheck ] && code=0
        timeout 1200 "$sanitizer" --tool "$tool" --error-exitcode "$code" ./test-exact --test-threads 1 \
            logits_are_those a_whole_step >>"$out/sanitizer.log" 2>&1 || { echo "$tool failed, see $out/sanitizer.log"; failed=1; }
    done
else
    echo "skipped: compute-sanitizer is not installed" | tee "$out/sanitizer.log"
fi

# What fits: all layers of Mixtral 8x7B in bf16 want 95 GB.
gib=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -1 | awk '{print int($1 / 1024)}')
layers=32
[ "$gib" -lt 110 ] && layers=$(((gib - 8) * 10 / 30))
[ "$layers" -lt 1 ] && layers=1
for weights in bf16 e4m3 q4; do
    # Before sm_89 there is no e4m3.
    [ "$weights $target" = "e4m3 sm_80" ] && continue
    ./tramontane bench model --random mixtral-8x7b --weights "$weights" --layers "$layers" --output json >"$out/bench-$weights.json" \
        2>"$out/bench.log" || { echo "the benchmark of $weights failed, see $out/bench.log"; failed=1; }
    cat "$out/bench-$weights.json"
done
# What it costs to bring logits to the host instead of tokens, and to draw them: on the device, then on the host.
weights=e4m3; [ "$target" = sm_80 ] && weights=bf16
for sampling in drawn host; do
    ./tramontane bench model --random mixtral-8x7b --weights "$weights" --layers "$layers" --sampling "$sampling" --batch 1,128,256 --prefill 512 \
        --output json >"$out/bench-$sampling.json" 2>"$out/bench.log" || { echo "the benchmark of $sampling failed, see $out/bench.log"; failed=1; }
    cat "$out/bench-$sampling.json"
done
python3 torch_decode.py --layers "$layers" >"$out/torch.json" 2>"$out/torch.log" || echo "no figures of PyTorch, see $out/torch.log"
[ -s "$out/torch.json" ] && cat "$out/torch.json"
exit $failed
