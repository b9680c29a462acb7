"""The simulator backend: one process runs every device of a deployment, each with its own share.

A `Grid` says which devices there are: `tp` x `dp` of them hold one pipeline stage, `pp` stages hold the model.
Each device runs the graph of `model.graph` on local shapes with explicit collectives (`model.parallel`), the
program that `runtime.pricing.trace` hands to the cost model. Two ways to run it, chosen by size:

    hosts    up to 64 devices: XLA host devices, one a device of the grid, under `shard_map`
    mapped   beyond: the same body under `vmap` with named axes, all devices on one

What it stands on is plain data (`grid.py`): backends do not import the runtime, which builds it from a plan.

    grid.py      Grid, Slots: devices, stages, who holds which expert
    shard.py     weights and caches, split by their logical axes
    stages.py    the program of each stage: hosts or mapped
    memory.py    Memory: bytes of each device against its limit; going over names the tensor
    cluster.py   Cluster: weights, caches and programs of one server, stepped by the runtime
    backend.py   SimBackend, the adapter

Number formats
--------------
An emulated chip's formats are one object, made by `backends.emulation` and used here at three places only.
Nothing in this folder looks at what a format does:

    class NumberFormats(Protocol):
        dtype: str
            What activations and unquantised weights are held in: "float32" or "bfloat16".

        def weight(self, weight: model.weights.Weight, value: np.ndarray | Quantized) -> np.ndarray | Quantized:
            One *whole* weight on the host, before it is split over devices: as `Checkpoint.load("float32",
            keep_fp8=True)` has it (float32, or `Quantized` where the checkpoint stores FP8 blocks) to what the
            graph is given. An unquantised one is then cast to `dtype`. A quantised one is `Quantized(values,
            scale)`: values have the weight's shape, and each dim of scale is the weight's dim, 1, or the number of
            128-blocks of it (ceil). The sharder splits the scale along with the values; blocks that a split would
            cut are repeated to full first, so that a lowering may see a full dim where it gave blocks.

        def lowerings(self) -> Mapping[str, Callable[..., Any]]:
            By op name ("glm.linear", ..): what one device computes instead of the op's decomposition, given local
            shapes, positional arrays and the attributes as keywords, as `model.ops.substitute` calls it. A
            quantised weight arrives as two operands, an unquantised one as one, so that is how a lowering tells
            which products the chip does in the narrow format (the dtype of the values says which format).
            `glm.cache_write` gets `cache="latent" | "index" | "key" | "value"` as an attribute: rows may be
            rounded to the cache's format before they are written (the pages stay in `dtype`).

`None` instead of an object is float32 throughout.
"""
