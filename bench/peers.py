"""What the comparison needs beside ours: llama.cpp built from the registry, the models, their GGUF forms, the limits."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import synth_mixtral
import to_gguf

HERE = pathlib.Path(__file__).resolve().parent
TOOLS = ("llama-bench", "llama-batched-bench", "llama-server", "llama-quantize")


def llama_cpp(folder):
    """Builds the llama.cpp that the source distribution of llama-cpp-python carries; returns its folder of binaries."""
    binaries = folder / "llama.cpp" / "bin"
    if all((binaries / tool).exists() for tool in TOOLS):
        return binaries
    source = folder / "llama.cpp-source"
    if not source.exists():
        unpack_llama_cpp(folder, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", folder / "cmake", "cmake", "ninja"], check=True)
    environment = {
        **os.environ,
        "PATH": f"{folder / 'cmake' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder / "cmake"),
    }
    flags = ("CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "BUILD_SHARED_LIBS=OFF", "LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF")
    build = folder / "llama.cpp"
    subprocess.run(
        ["cmake", "-S", source, "-B", build, "-G", "Ninja", *(f"-D{f}" for f in flags)], check=True, env=environment
    )
    subprocess.run(["cmake", "--build", build, "--target", *TOOLS], check=True, env=environment)
    return binaries


def unpack_llama_cpp(folder, source):
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
         "--no-binary", "llama-cpp-python", "--dest", folder, "llama-cpp-python"], check=True,
    )
    (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (found,) = (folder / "unpacked").glob("*/vendor/llama.cpp")
    found.rename(source)
    order_tile_configuration(source)
    shutil.rmtree(folder / "unpacked")


def order_tile_configuration(source):
    """Keeps gcc from moving stores behind the instruction that reads them: before release 14 its `_tile_loadconfig` says
    that it reads 8 bytes of 64, and llama.cpp built with it ends with a fault on machines that have AMX."""
    file = source / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp"
    text, load = file.read_text(), "_tile_loadconfig(&tc);"
    assert load in text, f"{file} has no {load}"
    file.write_text(text.replace(load, f'__asm__ volatile("" : : "r"(&tc) : "memory"); {load}'))


def model(folder, preset):
    """The synthetic checkpoint of a preset."""
    out = folder / preset
    if not (out / "config.json").exists():
        from mistral_common import __file__ as package

        tokenizer = pathlib.Path(package).parent / "data" / "tokenizer.model.v1"
        synth_mixtral.write(preset, out, tokenizer)
    return out


def gguf(folder, preset, kind, quantize):
    """A GGUF form of that checkpoint, made with a peer's llama-quantize."""
    whole, out = folder / f"{preset}-BF16.gguf", folder / f"{preset}-{kind}.gguf"
    if not whole.exists():
        to_gguf.write(model(folder, preset), whole)
    if not out.exists():
        part = f"{out}.part"
        subprocess.run([quantize, whole, part, kind], check=True, capture_output=True)
        os.rename(part, out)
    return out


def limits(folder):
    """The machine's measured rates, from limits.c."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "limits"
    subprocess.run(["cc", "-O3", "-march=native", "-pthread", HERE / "limits.c", "-o", program], check=True)
    return json.loads(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
