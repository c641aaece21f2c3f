"""Runs in a child process: prints the tokens of a text file as JSON. Arguments: model, text, most characters."""

import json
import sys

import llama_cpp


def main() -> None:
    model_path, text_path, n_chars = sys.argv[1], sys.argv[2], int(sys.argv[3])
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), params)
    vocab = llama_cpp.llama_model_get_vocab(model)
    with open(text_path, "rb") as file:
        text = file.read(n_chars)
    tokens = (llama_cpp.llama_token * (len(text) + 8))()
    n = llama_cpp.llama_tokenize(vocab, text, len(text), tokens, len(tokens), False, False)
    print(json.dumps({"bos": llama_cpp.llama_vocab_bos(vocab), "tokens": list(tokens[:n])}))


if __name__ == "__main__":
    main()
