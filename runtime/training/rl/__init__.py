"""Reinforcement learning from rollouts, with generation apart from training.

    config       a run as a TOML file: stages, objective, schedule
    episodes     questions, what answers are worth, and what an environment says in between
    rollouts     the project's own engine as a generator: log-probabilities and a policy version on every token
    replay       choices of experts and positions that the engine made, recorded and made again in training
    generators   who generates: this process, or one of its own, whose weights come through a versioned file
    objective    group baselines, importance ratios and their corrections
    learner      one training step on a batch of rollouts
    trainer      the loop, what it leaves, and how it goes on after a kill

Data flow: `trainer` asks `runtime.serving.pacing` which groups may begin, hands their numbers to a generator, takes
what it finished, trains on it and publishes the next version of the policy. Token ids go through as they were drawn;
nothing is decoded and encoded again. `config`, `episodes` and `rollouts`' records are free of JAX.
"""
