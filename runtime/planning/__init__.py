"""Decides what goes where: layout, expert placement, KV pages, under each device's memory.

Consumes plain op lists, arrays and profiles; must not import JAX, Flax or anything that does.
"""
