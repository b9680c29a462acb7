"""What a person asks for, in floors: deployment, serving, pricing, simulation, planning, execution, reports, training,
porting, cli. A folder imports only those before it, and itself (`tests/test_layering.py`).

May import `backends`, `model`, `hw_profiles` and `foundation`; nothing imports `runtime` from below.
"""
