"""A plan as the command lines of a serving engine.

    launch         plan, engine -> Launch: commands, a router, files      (compose.py)

One `Command` a server process (words.py), grouped by node. `LaunchTable` (deployment/engines/flags.py) is what a TOML
file of `deployment/engines/launch` says about an engine: every flag it may be given, with the document it was read in,
and what it cannot express. server.py is one replica as an engine sees it; sglang.py and vllm.py turn it into words;
experts.py writes the files of expert placements. Nothing here runs an engine. Must not import JAX.
"""

from runtime.planning.launch.compose import LAUNCHED_ENGINES, Launch, launch
from runtime.planning.launch.words import Command, Shell

__all__ = ["LAUNCHED_ENGINES", "Command", "Launch", "Shell", "launch"]
