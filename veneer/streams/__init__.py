"""Blocks as reversible networks of two streams: backward makes their inputs again instead of keeping activations (2023, arXiv:2306.00477).

`scheme` says what is wanted, `halves` cuts a block between attention and feed-forward, `stream` is the place of an adapter that stands
alone, `step` is one block forwards and backwards, `chain` what follows one another in a pass, `wrap` puts all of it on a model.
"""
