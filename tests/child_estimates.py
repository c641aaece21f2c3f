"""What promoted pages were estimated to get and got, token by token. Arguments: model, text."""

import json
import sys
from pathlib import Path

from monarch_llamacpp import Knobs, Llama

N_PROMPT, N_DECODED = 1400, 100
KNOBS = Knobs(mode="paged", hot_window=64, promote_tokens=128)

llm = Llama(sys.argv[1], paging=KNOBS, n_ctx=2048, n_ubatch=64, n_threads=1, n_threads_batch=1, verbose=False)
tokens = llm.tokenize(Path(sys.argv[2]).read_bytes())[: N_PROMPT + N_DECODED]
assert len(tokens) == N_PROMPT + N_DECODED

promoted: list = []
llm.eval(tokens[:N_PROMPT])
llm.set_hooks(on_promote=promoted.append)
for token in tokens[N_PROMPT:]:
    llm.eval([token])

print(json.dumps({"estimated": [e.estimated for e in promoted], "measured": [e.measured for e in promoted]}))
