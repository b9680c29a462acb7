"""One program on many devices: a plan's servers, emulated on one machine or on devices of several processes.

A `Grid` (`model.split`) says which devices there are: `tp` x `dp` of them hold one pipeline stage, `pp` stages hold the
model. Each device runs the graph of `model.graph` on local shapes with explicit collectives (`model.parallel`), the
program that `runtime.pricing.trace` hands to the cost model.

    weights, whole, on the host     cluster.py    `Cluster`: cut by their logical axes, once, into shares
      -> shares                     shard.py      whose block scales can be cut with them,
      -> placed                     stages.py     on the devices of each `Stage`
    one device's `Program`          cluster.py    `graph.stage` of a stage's layers, a program for each shape
      -> that of all devices        stages.py     `Hosts`: an XLA device each, by `shard_map`; `Mapped`: axes of `vmap`
      -> what runs                  a backend     exports it with its own kernels, and loads it on the devices
    a batch -> logits               cluster.py    `Server`: caches, and steps through all stages
    several processes               processes.py  `Processes`: joined by JAX; `Spread`: `Hosts`, some of others

Who makes a `Cluster` brings the backend, the stages' devices, and `Numerics`, what weights and activations are held in:
`Processes` brings a backend that runs on devices of its own, in one type but for what is kept in FP8; `SimBackend`
(`backends.emulation`) brings emulated devices that compute in a chip's number formats. Nothing here asks which it is.

From the ground up: shard, stages, cluster, processes. Imports `backends.interface`, `backends.errors`, `model`
and `foundation`; no adapter, and not the runtime, which makes grids of plans.
"""
