"""On the PYTHONPATH of an arm that a test breaks: its positions are a tenth too small."""

import llama_cpp

_create = llama_cpp.Llama.__init__


def _create_wrong(self, *args, **kwargs):
    _create(self, *args, rope_freq_scale=0.9, **kwargs)


llama_cpp.Llama.__init__ = _create_wrong
