"""Another version of a model's weights: the same shape and tokenizer, other answers."""

import json
import shutil
import struct


def make(source, target):
    """Copies a checkpoint and gives every element of one attention weight the other sign."""
    shutil.copytree(source, target)
    path = target / "model.safetensors"
    data = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    tensor = json.loads(data[8 : 8 + size])["model.layers.0.self_attn.o_proj.weight"]
    assert tensor["dtype"] == "BF16", tensor
    begin, end = (8 + size + offset for offset in tensor["data_offsets"])
    # Little-endian: the sign is in the second byte.
    for at in range(begin + 1, end, 2):
        data[at] ^= 0x80
    path.write_bytes(data)
    return target
