#!/bin/sh
# unit.sh KERNELS.cu: the translation unit that the emulator compiles, on stdout.
set -eu
echo '#include "emulator.h"'
echo "#line 1 \"$1\""
cat "$1"
tr '\n' ' ' < "$1" | grep -o 'extern "C" __global__ [^;{]*' | grep -o 'tr_[a-z0-9_]*(' | tr -d '(' |
    sed 's/.*/TR_EMULATOR_REGISTER(&)/'
