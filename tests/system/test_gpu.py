"""GPUs, on machines without one: what is missing is said, kernels are compiled ahead, and nothing crashes."""

import json
import os
import pathlib
import subprocess
import sysconfig

import pytest
from conftest import BINARY

NVRTC = pathlib.Path(sysconfig.get_path("purelib")) / "nvidia/cu13/lib"


def run(*args, **env):
    return subprocess.run(
        [BINARY, *args], capture_output=True, text=True, timeout=600, env={**os.environ, **env}
    )


def has_driver():
    return "libcuda.so.1" in subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout


@pytest.mark.skipif(has_driver(), reason="this machine has a driver")
@pytest.mark.parametrize("command", [("serve", "--http-port", "0", "--grpc-port", "0", "--admin-port", "0"), ("worker", "--id", "w")])
def test_a_gpu_that_is_not_there_is_named_and_the_way_on_too(command):
    done = run(*command, "--device", "cuda:0")
    assert done.returncode == 2, done.stderr
    assert "worker.device" in done.stderr and "cuda:0" in done.stderr
    assert "libcuda.so.1 was not found" in done.stderr
    assert "device cpu computes without" in done.stderr
    assert "panicked" not in done.stderr


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:x", ""])
def test_a_device_that_is_no_device_is_a_configuration_error(device):
    done = run("serve", "--device", device)
    assert done.returncode == 2, done.stderr
    assert "auto, cpu or cuda:N" in done.stderr


def test_the_benchmark_of_a_model_wants_a_gpu():
    done = run("bench", "model", "--random", "mixtral-8x7b", "--device", "cpu")
    assert done.returncode == 2 and "must be cuda:N" in done.stderr


def test_kernels_are_compiled_ahead_and_found_again(tmp_path):
    cache = tmp_path / "kernels"
    args = ["kernels", "build", "--target", "sm_80", "--cache", cache, "--libraries", NVRTC, "-o", "json"]
    first = run(*args)
    assert first.returncode == 0, first.stderr
    lines = json.loads(first.stdout)
    names = {line["kernel"] for line in lines}
    assert {"tr_embed_bf16", "tr_route", "tr_linear_bf16_n8"} <= names
    assert all(line["target"] == "sm_80" and line["registers"] > 0 for line in lines)
    # Wide tiles of attention keep sums of earlier chunks in a thread's own memory, on purpose.
    assert all(line["kernel"].startswith("tr_attend_wide_") for line in lines if line["stack_bytes"] > 0)
    again = run(*args)
    assert again.returncode == 0 and "0 modules compiled" in again.stderr
    assert json.loads(again.stdout) == lines
    # Half a file is no module: it is noticed, said and made again.
    victim = sorted(cache.iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:100])
    repaired = run(*args)
    assert repaired.returncode == 0 and "1 modules compiled" in repaired.stderr
    assert json.loads(repaired.stdout) == lines


def test_a_target_that_nothing_is_compiled_for_is_refused():
    done = run("kernels", "build", "--target", "sm_75")
    assert done.returncode == 2 and "sm_90a" in done.stderr
