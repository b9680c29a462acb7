"""What is wrong with a finished package, as far as it can be told where it is: a line for each thing.

Every package: files as the manifest has them, weight files with the tensors that it names, graphs that open without
trust. Of an Ascend package besides: each call of torch_npu's operators is held to what their documentation says of
types, ranks and enumerations, and, where torch_npu imports, to its own Meta kernels. What was not looked at is said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backends.errors import ArtifactError, BackendUnavailable
from foundation.errors import first_line
from runtime.deployment.manifest import FILE, Manifest, wrong_files
from runtime.deployment.tensors import TensorReader
from runtime.execution.package.executor import executor, executor_of, graphs


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What is refused: in which file of the package, what, and why."""

    file: str
    what: str
    why: str

    def line(self) -> str:
        return f"refused  {self.file}: {self.what}: {self.why}"


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """refusals: in order of file. graphs: how many there are. calls: of torch_npu's operators. checked, unchecked: what
    was looked at, and what was not and why."""

    refusals: tuple[Refusal, ...]
    graphs: int
    calls: int
    checked: tuple[str, ...]
    unchecked: tuple[str, ...]


def check(folder: str | Path) -> CheckReport:
    """Checks a package. Raises `ArtifactError` where the folder is none."""
    folder = Path(folder)
    manifest = Manifest.read(folder)
    files = sorted({path for platform in ("any", "cpu") for path in _graphs(folder, manifest, platform)})
    refusals = [Refusal(name, "file", why) for name, why in wrong_files(folder, manifest)]
    checked, unchecked, calls = ["files"], [], 0
    weights = [device for device in manifest.devices if device.weights is not None]
    damaged = {refusal.file for refusal in refusals}
    for device in weights:
        if device.weights not in damaged:
            refusals += _weights(folder, manifest, device)
    (checked if weights else unchecked).append("weights" if weights else "weights (the package has none)")
    if damaged:
        unchecked.append("graphs (files are damaged)")
    elif manifest.format == "ascend":
        from runtime.porting.export.check_npu import check_calls

        found = check_calls(folder, [path for path in files])
        calls = found.calls
        refusals += [Refusal(str(path.relative_to(folder)), what, why) for path, what, why in found.refused]
        checked += found.checked
        unchecked += found.unchecked
    else:
        refusals += _opened(folder, manifest, checked, unchecked)
    order = sorted(refusals, key=lambda refusal: refusal.file)
    return CheckReport(tuple(order), len(files), calls, tuple(checked), tuple(unchecked))


def _graphs(folder: Path, manifest: Manifest, platform: str) -> Iterator[Path]:
    chains = (chain for program in manifest.programs for chain in program.units.values())
    return (folder / step.files[platform] for chain in chains for step in chain if platform in step.files)


def _weights(folder: Path, manifest: Manifest, device: Any) -> Iterator[Refusal]:
    try:
        held = TensorReader(folder / device.weights)
    except ArtifactError as error:
        yield Refusal(device.weights, "file", first_line(error))
        return
    for owner in manifest.owners(device):
        for ref in manifest.weights[manifest.owner_units[owner]]:
            name = f"{owner}.{ref.name.partition('.')[2]}"
            if name not in held.names:
                yield Refusal(device.weights, name, "is not there")
                continue
            array = held.array(name)
            if tuple(array.shape) != ref.shape or array.dtype.name != ref.dtype:
                found = f"{array.dtype.name}{list(array.shape)}"
                yield Refusal(device.weights, name, f"is {found}, {FILE} says {ref.dtype}{list(ref.shape)}")


def _opened(folder: Path, manifest: Manifest, checked: list[str], unchecked: list[str]) -> Iterator[Refusal]:
    """What the runtime of a format says of a package before it loads the first graph."""
    name = executor_of(manifest.format)
    assert name is not None
    try:
        runtime = executor(name, manifest.format)
        runtime.admit(folder, manifest)
    except BackendUnavailable as error:
        unchecked.append(f"graphs ({first_line(error)})")
        return
    except ArtifactError as error:
        yield Refusal(next(iter(graphs(folder, manifest, runtime.platform))).parent.name, "graphs", first_line(error))
    checked.append(f"graphs (that {name} opens them without trust)")
