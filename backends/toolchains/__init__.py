"""The graph in other toolchains' languages: one walker over a traced graph, one table per target.

Life of an export: `runtime.porting.export` traces a layer type (`model.abstract`), `cut.py` splits the trace at its
collectives into `Graph`s with named inputs and outputs, and a writer turns each graph into a file's bytes:
`stablehlo.py` through `jax.export`, `onnx.py` and `torch.py` through `walker.py`, which evaluates the equations one
by one with the target's table of rules. An op of the contract (`glm.*`) reaches the target by name, with its
attributes and its body, so that the target may keep it, replace it or decompose it; `forms_table.py` says which.
"""
