"""Decides what goes where: layout, expert placement, KV pages, under each device's memory.

    Question -> Options: what fits                     options.py
             -> steady states, alone and in pairs      estimate.py, pairs.py
             -> Contenders, the best simulated         contender.py, predict.py
             -> a Plan, device by device               assign.py

`search.py` puts these in order, `smallest.py` repeats them. `experts/` places experts, `kv_tiers.py` caches, `launch/`
prints engines' command lines, `check.py` recomputes a plan's bytes. Consumes plain op lists, arrays and profiles; must
not import JAX, Flax or anything that does.
"""
