"""Engines' own argument parsers, run here: what a release takes, and whether it takes our lines.

    python -m tools.engine_flags                         every release that there is a launch table of
    python -m tools.engine_flags vllm 0.33               one of them

Each writes `tests/planner/flags/KIND-RELEASE.json`: every flag with how many values it takes, of what kind and out of
what, the keys of the JSON ones, the environment variables that the code names. The wheels that the launch table lists
are downloaded to a temporary folder (`pip download --no-deps`, some 0.5 GB a vLLM) and unpacked without their
libraries. A child process (tools/engine_parser.py) imports the argument module, with a stand-in for what is not
installed here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.deployment.engines.flags import launched, releases, table

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "tests" / "planner" / "flags"
HELPERS = ("msgspec",)
"""Small packages that the argument modules define types with: stand-ins would not do."""
_TEXT = (".py", ".json", ".txt", "METADATA", ".jinja")


class NoWheelError(Exception):
    """pip could not download a package."""


@contextmanager
def unpacked(packages: Sequence[str]) -> Iterator[Path]:
    """A folder with these packages and `HELPERS`, importable from it. Raises `NoWheelError`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, wheels = Path(scratch) / "site", Path(scratch) / "wheels"
        for package in (*packages, *HELPERS):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            ended = subprocess.run([*command, "--dest", str(wheels), package], capture_output=True, text=True)
            if ended.returncode:
                lines = ended.stderr.strip().splitlines() or ["pip said nothing"]
                raise NoWheelError(f"{package}: {lines[-1]}")
            for wheel in wheels.glob("*.whl"):
                with zipfile.ZipFile(wheel) as archive:
                    names = archive.namelist()
                    wanted = names if package in HELPERS else [name for name in names if name.endswith(_TEXT)]
                    archive.extractall(folder, wanted)
                wheel.unlink()
        yield folder


def asked(folder: Path, kind: str, question: dict[str, Any]) -> dict[str, Any]:
    """What the child answers. question: `{"record": true}`, or `{"parse": [words of a line, ...]}`."""
    command = [sys.executable, str(ROOT / "tools" / "engine_parser.py"), str(folder), kind]
    ended = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, cwd=folder)
    if ended.returncode:
        raise RuntimeError(f"{kind}: its argument module does not import here:\n{ended.stderr}")
    return json.loads(ended.stdout)


def text(record: dict[str, Any]) -> str:
    """The record as its file has it: a flag a line."""
    flags = ",\n".join(f"  {json.dumps(name)}: {json.dumps(each)}" for name, each in sorted(record["flags"].items()))
    rest = ",\n".join(f" {json.dumps(key)}: {json.dumps(record[key])}" for key in sorted(record) if key != "flags")
    return f'{{\n{rest},\n "flags": {{\n{flags}\n }}\n}}\n'


def main(words: Sequence[str]) -> None:
    wanted = [(words[0], words[1])] if words else [(kind, each) for kind in launched() for each in releases(kind)]
    RECORDS.mkdir(exist_ok=True)
    for kind, release in wanted:
        read = table(kind, release)
        with unpacked(read.checked) as folder:
            record = {"checked": list(read.checked), **asked(folder, kind, {"record": True})}
        path = RECORDS / f"{kind}-{read.release}.json"
        path.write_text(text(record), encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {len(record['flags'])} flags")


if __name__ == "__main__":
    main(sys.argv[1:])
