"""Options of a pool that prefills beside the one that decodes, and what they make: of `simulate`, and of `plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation.errors import UsageError
from foundation.limits import within
from model.formats import SCHEMES_HELP
from model.split import MOST_DEVICES
from runtime.cli import completion

if TYPE_CHECKING:
    from runtime.deployment.plan import Transfer
    from runtime.serving import Deployment, Disaggregated
    from runtime.simulation.build import Built, PriceTables, Spec

PrefillDevices = Annotated[int, typer.Option(min=0, help="Disaggregate: this many further devices prefill.")]
PrefillTp = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_DEVICES, help="Of those: tensor parallelism [default: the layout of the others]."),
]
PrefillDp = Annotated[int | None, typer.Option(min=1, max=MOST_DEVICES, help="Of those: attention data parallelism.")]
PrefillEp = Annotated[int | None, typer.Option(min=1, max=MOST_DEVICES, help="Of those: expert parallelism.")]
PrefillPp = Annotated[int | None, typer.Option(min=1, max=MOST_DEVICES, help="Of those: pipeline stages.")]
PrefillProfile = Annotated[
    str | None, typer.Option(autocompletion=completion.chips, help="Of those: the chip [default: --profile].")
]
PrefillFormats = Annotated[
    str | None,
    typer.Option(autocompletion=completion.schemes, help=f"Of those: {SCHEMES_HELP} [default: --formats]."),
]
HeldPrefillTp = Annotated[
    int | None,
    typer.Option(
        min=1, max=MOST_DEVICES, help="Plan prefill and decode apart, and hold the prefill pool's tp to this."
    ),
]
HeldPrefillDp = Annotated[int | None, typer.Option(min=1, max=MOST_DEVICES, help="The same of its dp.")]
HeldPrefillEp = Annotated[int | None, typer.Option(min=1, max=MOST_DEVICES, help="The same of its ep.")]
HeldPrefillPp = Annotated[int | None, typer.Option(min=1, max=MOST_DEVICES, help="The same of its stages.")]

_DEGREES = ("tp", "dp", "ep", "pp")
_OF_POOL = (*(f"prefill_{degree}" for degree in _DEGREES), "prefill_profile", "prefill_formats")


def prefill_held(params: Mapping[str, Any]) -> dict[str, int]:
    """What a prefill pool that is planned is held to."""
    return {degree: params[f"prefill_{degree}"] for degree in _DEGREES if params[f"prefill_{degree}"] is not None}


def refuse_without_pool(params: Mapping[str, Any], said: Mapping[str, str]) -> None:
    """Raises `UsageError` for an option of a pool that is not asked for."""
    for name in _OF_POOL:
        if name in said and not params["prefill_devices"]:
            raise UsageError(f"{said[name]} is of a pool that prefills apart: add --prefill-devices")


def prefill_pool(
    params: Mapping[str, Any], decode: Spec, chip_settings: Mapping[str, Any], engine: str, asked: Mapping[str, Any]
) -> Spec:
    """The pool that prefills, by the options; what they do not say is as in the pool that decodes. engine: as it was
    asked for. asked: settings of the engine, and further fields of a `Spec`. Raises `UsageError` where it is not whole
    replicas, or where the engine does not join the two.
    """
    from runtime.simulation.apart import apart_refused
    from runtime.simulation.build import chip_with, spec_for

    devices = params["prefill_devices"]
    within("--prefill-devices", devices, MOST_DEVICES)
    layout = decode.layout
    given = {degree: params[f"prefill_{degree}"] for degree in _DEGREES}
    if any(given.values()):
        held = {degree: value or 1 for degree, value in given.items()}
        held["tp"] = given["tp"] or max(1, devices // (held["dp"] * held["pp"]))
        layout = dataclasses.replace(layout, **held)
    if devices % layout.devices:
        raise UsageError(f"--prefill-devices {devices} is not a multiple of its layout's {layout.devices}")
    profile = decode.profile
    if params["prefill_profile"]:
        profile = chip_with(params["prefill_profile"], chip_settings)
    scheme = params["prefill_formats"] or params["formats"] or decode.cfg.stored_scheme
    more = {**asked, "replicas": devices // layout.devices}
    found = spec_for(decode.cfg, profile, layout, scheme, params["kv"], engine, **more)
    if why := apart_refused(found, decode):
        raise UsageError(f"prefill {layout.name} and decode {decode.layout.name} with {engine}: {why}")
    return found


def disaggregated(
    prefill: Spec, decode: Built, servers: Deployment, tables: PriceTables
) -> tuple[Disaggregated, Built, Transfer]:
    """Both pools together, the one that prefills, and what passes between them: of a token. servers: those that decode.

    Raises as `build` does.
    """
    from runtime.simulation.apart import apart
    from runtime.simulation.build import build
    from runtime.simulation.transfer import transfer_of

    built = build(prefill, tables)
    first = dataclasses.replace(
        built.deployment, replicas=prefill.replicas, devices=prefill.replicas * prefill.layout.devices
    )
    moved = transfer_of(prefill, decode.spec, 1)
    # prompts are computed, and kept, where they are prefilled
    servers = dataclasses.replace(servers, tiers=(), router="round-robin")
    return apart(first, servers, moved, (prefill, decode.spec)), built, moved
