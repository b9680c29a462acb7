"""Kernels of our own for NVIDIA GPUs, where XLA's form of an op's decomposition is slow.

Nouns. A *kernel* is a function in Triton (`source/`). A *variant* (`variants.py`) is one compiled form of it: its
constants, and what its parameters are. *PTX* (`ptx/`) is what `python -m tools.kernels` makes of a variant for an
architecture; an index beside it has the hashes. The *library* (`library.py`) finds the PTX for a compute capability. A
*launch* (`launch.py`) is an equation in a JAX graph: a custom call that the launcher in JAX's CUDA plugin carries out.
A *lowering* (`lowering.py`, `table.py`) makes launches of an op of the contract, or says why not; then a *form*
(`forms.py`) of its decomposition runs that XLA compiles better for GPUs, or the decomposition itself.

Data flow: `source/` -> tools.kernels -> `ptx/` -> library -> launch <- table <- `backends.cuda`. The product
imports neither Triton nor `source/`: nobody needs a compiler but the driver's, which turns PTX into a program when an
artifact is loaded. See docs/kernels.md.
"""
