"""The serving engine: prompts in, tokens out, on any backend.

Owns: the page pool, sampling, compiled programs by shape, continuous batching and speculative decoding.
Imports JAX through `programs` only; reads the model through `model` and devices through `backends`.
"""
