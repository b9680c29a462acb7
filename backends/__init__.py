"""What a chip does with the graph: an adapter a chip, and what adapters share.

Owns the device contract (`interface`), the lazy `registry`, the adapters (`cpu`, `cuda` on `xla`; `ascend/`; `sim` in
`emulation/`), one program on many devices (`spmd/`), a chip's number formats and memory limit (`emulation/`), and the
graph in other toolchains' languages (`toolchains/`). Imports `model`, `hw_profiles` and `foundation`; must not import
`runtime`.
"""
