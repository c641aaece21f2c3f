"""Loads a model, tokenises a text and goes on greedily; prints one JSON object. Arguments: model, text."""

import json
import sys

import llama_cpp

model = llama_cpp.Llama(sys.argv[1], n_ctx=256, verbose=False)
tokens = model.tokenize(sys.argv[2].encode(), add_bos=False, special=False)
model.reset()
model.eval(tokens)
greedy = []
for _ in range(16):
    greedy.append(int(model.sample(temp=0.0)))
    model.eval(greedy[-1:])
text = model.detokenize(tokens).decode().strip()
print(json.dumps({"tokens": tokens, "text": text, "greedy": greedy, "n_vocab": model.n_vocab()}))
