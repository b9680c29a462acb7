"""The one model graph, hardware-free.

Owns: what a model is (`config`, `weights`, `cache`), its number formats (`formats`, `quantised`, `spelling`), how it is
split over devices (`split`), the op contract (`ops`), the graph (`graph`, `parallel`), its Flax face (`module`, which
needs the `train` extra), and what a checkpoint directory holds (`checkpoint`, `tokenizer`). Imports nothing of ours but
`foundation`. All but `ops`, `graph`, `parallel`, `abstract` and `module` are free of JAX, so that planning can use
them; import submodules by name.
"""
