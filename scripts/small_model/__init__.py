"""The parts of train_small_model.py: tokenizer, data, network, export."""
