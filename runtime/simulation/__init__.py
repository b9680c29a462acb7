"""From words to a deployment that can be simulated, and how right the simulation is.

    model, profile, layout, formats, engine by name -> Spec -> Built       build.py
    a Plan -> Deployed: its pools priced, sized and joined                 planned.py
    rows of measurements -> predictions beside them                        validation.py

Imports `deployment`, `serving` and `pricing`. JAX comes in where the tracer is called, inside `build`.
"""
