#!/bin/sh
# unit.sh KERNELS.cu: the translation unit that the emulator compiles, on stdout.
set -eu
echo '#include "emulator.h"'
echo "#line 1 \"$1\""
cat "$1"
# A kernel's name and the blocks of its clusters; whatever else it says of clusters does not compile.
tr '\n' ' ' < "$1" | grep -o 'extern "C" __global__ [^;{]*' | sed -n -E \
    -e 's/.*__cluster_dims__\(1, ([0-9]+), 1\).* (tr_[a-z0-9_]*)\(.*/TR_EMULATOR_REGISTER(\2, \1)/p; t' \
    -e 's/.*__cluster_dims__.*/#error "a cluster that is not __cluster_dims__(1, NUMBER, 1)"/p; t' \
    -e 's/.* (tr_[a-z0-9_]*)\(.*/TR_EMULATOR_REGISTER(\1, 1)/p'
