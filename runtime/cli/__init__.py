"""The `glm5` command: one file a verb, `app` puts them together, `main` calls it.

A command reads its options, calls what does the work, and prints. It imports what is slow (JAX above all)
inside the function, so that `glm5 --help` and the verbs that need no JAX start at once.
"""
