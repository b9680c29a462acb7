"""What a training step costs on chips that nobody has measured it on: seconds, memory, and weights sent to rollouts.

    TrainLayout      how a step is spread over devices (`layout.py`)
    Sequences        what it learns from (`sequences.py`)
    training_step    seconds by part (`step.py`), from micro-batches (`passes.py`) of ops (`ops.py`), whose gradients
                     follow from the traced forward list (`backward.py`)
    training_memory  bytes by part (`memory.py`)
    training_band    how far to trust its seconds (`band.py`, `residuals.json`)
    weight_sync      new weights to the devices that generate (`sync.py`)
    train_layouts    what fits so many devices, and `best_layouts` the fastest of it (`layouts.py`)

Free of JAX but for the tracer, which is imported when a layout is first priced.
"""

from runtime.pricing.training.band import training_band
from runtime.pricing.training.layout import RECOMPUTES, Recompute, TrainLayout
from runtime.pricing.training.layouts import best_layouts, train_layouts
from runtime.pricing.training.memory import TrainingMemory, training_memory
from runtime.pricing.training.sequences import Sequences
from runtime.pricing.training.step import TrainingPricer, TrainingStep, training_formats, training_step
from runtime.pricing.training.sync import SyncSchedule, WeightSync, weight_sync

__all__ = [
    "RECOMPUTES",
    "Recompute",
    "SyncSchedule",
    "Sequences",
    "TrainLayout",
    "TrainingMemory",
    "TrainingPricer",
    "TrainingStep",
    "WeightSync",
    "best_layouts",
    "train_layouts",
    "training_band",
    "training_formats",
    "training_memory",
    "training_step",
    "weight_sync",
]
