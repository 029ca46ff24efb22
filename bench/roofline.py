"""What this machine could do at most: bytes over read bandwidth or operations over peak rate, whichever takes longer.

Counted are the weights that a step must read once (attention, the experts that the rows are routed to, LM head), the keys
and values at long context, and two operations a weight and row. Not counted: attention scores, activations, the wire.
"""

import json
import pathlib

# Bytes a weight; q8 and q4 are blocks of 32 with a 16-bit scale.
WEIGHT_BYTES = {"bf16": 2.0, "q8": 34 / 32, "q4": 18 / 32}
# Units that multiply each format without loss of its precision; the fastest that the machine has counts.
UNITS = {"bf16": ("amx_bf16", "bf16", "f32"), "q8": ("amx_int8", "int8"), "q4": ("amx_int8", "int8")}
KV_BYTES = 2


class Roofline:
    """Limits of one model on a machine whose measured rates are `machine` (the JSON of limits.c), all threads."""

    def __init__(self, model, machine):
        c = json.loads((pathlib.Path(model) / "config.json").read_text())
        hidden, self.layers = c["hidden_size"], c["num_hidden_layers"]
        queries = c["num_attention_heads"] * c["head_dim"]
        self.kv = c["num_key_value_heads"] * c["head_dim"]
        self.attention = self.layers * hidden * 2 * (queries + self.kv)
        self.expert = self.layers * 3 * hidden * c["intermediate_size"]
        self.experts, self.topk = c["num_local_experts"], c["num_experts_per_tok"]
        self.head = hidden * c["vocab_size"]
        self.machine = machine

    def step(self, weights, rows, heads, context=0):
        """Seconds of one step of `rows` rows of which `heads` need logits, each over `context` keys and values."""
        # Uniform routing: the experts that at least one row goes to.
        touched = self.experts * (1 - (1 - self.topk / self.experts) ** rows)
        read = (self.attention + touched * self.expert + self.head) * WEIGHT_BYTES[weights]
        read += rows * context * self.layers * 2 * self.kv * KV_BYTES
        operations = 2 * (rows * (self.attention + self.topk * self.expert) + heads * self.head)
        peak = max(self.machine.get(unit, [0, 0])[1] for unit in UNITS[weights])
        return max(read / self.machine["read"][1], operations / peak) / 1e9

    def decode(self, weights, batch, context=0):
        """Tokens per second."""
        return batch / self.step(weights, batch, batch, context)

    def prefill(self, weights, prompt):
        """Tokens per second."""
        return prompt / self.step(weights, prompt, 1)

    def served(self, weights, batch, prompt, tokens):
        """Output tokens per second of `batch` streams: all prompts, then all answers."""
        seconds = self.step(weights, batch * prompt, batch) + tokens * self.step(weights, batch, batch)
        return batch * tokens / seconds

    def first_token(self, weights, batch, prompt):
        """Milliseconds until `batch` prompts that come together are read."""
        return 1000 * self.step(weights, batch * prompt, batch)
