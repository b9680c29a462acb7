"""What whoever runs a server decides about it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """keys: any of them opens every route; none, and all are open. open_health: /health needs no key.

    origins: whose web pages may ask; "*" for all. max_queue: requests that may wait. max_body_bytes: of a request.
    header_s, body_s: seconds a client may take for them. idle_s: seconds a connection is kept without a request.
    ping_s: between signs of life in a silent stream. send_s: seconds a client may take to read what is there. drain_s:
    seconds that answers go on after SIGTERM.
    """

    keys: tuple[str, ...] = ()
    open_health: bool = True
    origins: tuple[str, ...] = ()
    max_queue: int = 256
    max_body_bytes: int = 16_000_000
    header_s: float = 10.0
    body_s: float = 60.0
    idle_s: float = 75.0
    ping_s: float = 10.0
    send_s: float = 60.0
    drain_s: float = 30.0


@dataclasses.dataclass(frozen=True)
class Emulated:
    """What an emulated endpoint says of its pace: which chips and plan, how far to trust the figures.

    tokens: `model` or `synthetic`. time_scale: wall-clock seconds that stand for one of the chips'. kv_share: of the
    plan's KV pages, those that this host has room for; below 1 requests may be admitted later than the plan would.
    """

    profile: str
    devices: int
    plan: str
    evidence: str
    band: str
    tokens: str = "model"
    time_scale: float = 1.0
    kv_share: float = 1.0

    def header(self) -> str:
        """One line for `x-glm5-emulated`; ASCII, as headers are."""
        said = (
            f"profile={self.profile}; devices={self.devices}; plan={self.plan}; evidence={self.evidence}; "
            f"band={self.band}; tokens={self.tokens}; time-scale={self.time_scale:g}; "
            f"kv-share={self.kv_share:.3g}"
        )
        return said.encode("ascii", "replace").decode().replace("\n", " ").replace("\r", " ")
