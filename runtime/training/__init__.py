"""Training of a small GLM-5 on the runtime's own graph.

From a config to a checkpoint: `config.py` reads a TOML of stages; `data.py` makes text from a seed and
`vocabulary.py` the tokenizer; what learns is a `model.module.Model`. `forward.py` puts losses and gauges around its
graph; `optimizer.py` is Muon Split beside AdamW; `steps.py` says which of its variables a stage trains, by their types;
`trainer.py` runs the stages, keeps what a resumed run needs (`state.py`) and says how it goes (`metrics.py`).
`evaluate.py` asks a checkpoint the held-out questions through the engine.

`config.py`, `data.py`, `vocabulary.py` and `metrics.py` are free of JAX.
"""
