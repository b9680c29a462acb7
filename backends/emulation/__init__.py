"""A chip's number formats, emulated: what it rounds, and where.

A *scheme* says in which format each role of weight is kept (`schemes.py`, plain data). A quantised weight then
carries its format in its own types: it is `Quantized(values, scale)`, and `values` are int8, int4, e4m3 or e2m1.
So no op and no graph changes: the emulation replaces the contract's ops by name (`model.ops.substitute`), and the
lowering of a product looks at the operands it is given.

    schemes.py     which weight gets which format under each scheme; which schemes a profile has units for
    rounding.py    activations to narrow types: the scales and the casts
    products.py    matrix products in each format, with the scales applied where the chip applies them
    emulation.py   NumberFormats: weights and op lowerings of one scheme, the object that an executor is given
    fidelity.py    runs the graph in a scheme and keeps logits, hidden states, expert choices and selections

Formats of matrices, and how checkpoints spell them, are `model.quantised`. What is rounded where, with sources, is
docs/number_formats.md. Imports `model` and `hw_profiles`; `schemes` is free of JAX.
"""
