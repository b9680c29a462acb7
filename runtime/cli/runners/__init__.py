"""`glm5 run`, a module a mode: a backend of this host, emulated devices, several processes, an exported package.

Owns which options a mode reads (the fields of its `RunMode`) and what it does with them; `runtime/cli/run.py` has the
table of all options, decides the mode and refuses what the mode does not read. Imports what is slow inside functions.
"""
