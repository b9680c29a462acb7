"""Exported packages: what is cut, what a package holds, writing it whole, and checking it against the graph.

Owns `manifest.py` (what a package says of itself; free of JAX), `cut.py` (which graphs a model under a layout has),
`package.py` (writing and reading a folder) and `verify.py`. Running a package is `runtime/artifact`.
"""
