"""A paged KV cache for llama.cpp, driven from Python."""

__version__ = "0.1.0"
