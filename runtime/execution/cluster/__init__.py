"""Running a plan on emulated devices: real tokens, virtual time.

    plan -> grid, limits, servers     deploy.py     what backends.spmd needs, from a `Plan`
         -> every device's memory     deploy.py     counted before anything is loaded
    requests -> simulation            live.py       the serving simulator decides each step and what it costs
         -> servers                   executor.py   a step's rows, ragged batch and all, on the server's devices
         -> timeline                  timeline.py   a row a device: ops and collectives at their prices

One scheduler, one clock: the steps that `glm5 simulate` prices are the steps that run here, so that the virtual TTFT
and TPOT of a run are those of the simulation of the same requests. What the simulation cannot know, that an
answer stops early, the tokens tell it.
"""
