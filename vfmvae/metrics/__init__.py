"""Measures of what a tokenizer or a generator produces."""
