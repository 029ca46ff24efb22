#!/usr/bin/env python3
"""Greedy texts of models/smol by transformers in f32. usage: make_golden.py MODEL_DIR OUT.json  (needs torch, transformers)"""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 64
CHAT = ["What is the capital of France? Answer in one sentence.", "Write two sentences about the sea.", "Count from 1 to 10."]
PLAIN = ["Once upon a time,", "def fibonacci(n):"]

folder, out = sys.argv[1], sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
cases = []
for chat, prompt in [(True, p) for p in CHAT] + [(False, p) for p in PLAIN]:
    if chat:
        messages = [dict(role="user", content=prompt)]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    seq, margin = list(ids), 1e9
    with torch.no_grad():
        state = None
        fresh = torch.tensor([ids])
        for _ in range(NEW_TOKENS):
            o = model(fresh, past_key_values=state, use_cache=True)
            state = o.past_key_values
            best = o.logits[0, -1].topk(2)
            margin = min(margin, (best.values[0] - best.values[1]).item())
            seq.append(int(best.indices[0]))
            fresh = torch.tensor([[seq[-1]]])
    new = seq[len(ids):]
    text = tokenizer.decode(new, skip_special_tokens=True)
    cases.append(dict(chat=chat, prompt=prompt, prompt_ids=ids, new_ids=new, text=text, min_margin=round(margin, 5)))
    print(repr(prompt), "->", repr(text[:90]), f"margin {margin:.4f}", flush=True)
versions = dict(transformers=transformers.__version__, torch=torch.__version__)
json.dump(dict(**versions, cases=cases), open(out, "w"), ensure_ascii=False, indent=1)
