"""The one model graph, hardware-free.

Owns: what a model is (`config`, `weights`, `cache`), the op contract (`ops`), the graph (`graph`,
`parallel`), its Flax face (`module`, which needs the `train` extra), and what a checkpoint directory holds
(`checkpoint`, `tokenizer`). Imports nothing of ours but `foundation`. `config`, `weights`, `cache`,
`checkpoint` and `tokenizer` do not import JAX, so that planning can use them; import submodules by name.
"""
