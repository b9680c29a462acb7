"""A chip emulated on the host CPU: its number formats, its devices and their memory.

`model.formats` has the facts: `Formats` are a scheme (which role of weight is held in which format), a cache format and
the wide type of all else. A quantised weight carries its format in its own types: it is `Quantized(values, scale)`, and
`values` are int8, e4m3, or what holds int4 and e2m1 (`model.quantised.CARRIER`). So no op and no graph changes: ops are
replaced by name (`model.ops.substitute`), and the lowering of a product looks at the operands it is given.

    Formats -> `NumberFormats`   number_formats.py  weights as they are loaded, and lowerings of ops that round
      activations                rounding.py        to narrow types: the scales and the casts
      products                   products.py        in each format, scales applied where the chip applies them
    -> devices of a plan         backend.py         `SimBackend.cluster`: an adapter (`EmulatedDevices`) that exports
                                                    with these lowerings, for a `backends.spmd` cluster
    -> the serving engine        host.py            `EmulatedCpu`, an adapter with these lowerings over the CPU's
                                                    kernels; `Converted`, a checkpoint for it
    -> what two runs differ in   fidelity.py        `Observer`: logits, hidden states, expert choices and selections
    Formats -> a table           table.py           which op and weight runs in which format
    Formats, Grid -> bytes       memory.py          of each device against its limit; going over names the tensor

`table` and `memory` are plain data, free of JAX. What is rounded where, with sources, is docs/number_formats.md.
Imports `model`, `backends.cpu` and `backends.spmd`, which import nothing of this.
"""
