"""The page of a choice of chips: each figure with its range, power where it is known, and nothing but text."""

from __future__ import annotations

from typing import Any

from runtime.reports.choose import choices_page


def row(profile: str, power_w: float | None = 22_400.0, **more: Any) -> dict[str, Any]:
    known = power_w is not None
    return {
        "profile": profile, "engine": "sglang", "meets_targets": True, "reason": "", "meets_targets_if_slow": False,
        "devices": 32, "devices_if_slow": 64, "plan": "4 x tp8 dp1 ep8 pp1",
        "formats": {"weights": "fp8", "kv": "bf16"},
        "output_tokens_per_s_per_device": 57.0, "output_tokens_per_s_per_device_range": [37.0, 67.0],
        "ttft_ms": 1405.0, "ttft_ms_range": [634.0, 4077.0], "tpot_ms": 47.4, "tpot_ms_range": [34.1, 84.0],
        "statistic": "p90", "cost_per_million_output_tokens": None, "cost_per_million_output_tokens_range": None,
        "power_w": power_w, "power_evidence": "datasheet" if known else None,
        "joules_per_output_token": 12.3 if known else None,
        "joules_per_output_token_range": [10.4, 18.9] if known else None,
        "evidence": "assumed", "band_basis": {"tpot": "few groups"}, "assumed": [], "tried": [],
    } | more  # fmt: skip


def page(*rows: dict[str, Any]) -> str:
    return choices_page({"model": "m", "load": "l", "targets": [], "currency": "", "choices": list(rows)})


def test_a_figure_has_its_range_below_it() -> None:
    made = page(row("h200-sxm"), row("ascend-910c-die", None))
    for text in ("1,405", "634–4,077", "34.1–84.0", "up to 64", "22.4", "datasheet", "12.3", "10.4–18.9"):
        assert text in made
    assert "hosts and switches left out" in made and made.count("<td>–</td>") == 2
    without = page(row("ascend-910c-die", None))
    assert "board power" not in without and "hosts and switches" not in without


def test_names_are_shown_as_text() -> None:
    made = page(
        row("<b>x</b>", plan="<i>y</i>"), {"profile": "<u>z", "engine": "e", "meets_targets": False, "reason": "<s>"}
    )
    assert not any(tag in made for tag in ("<b>x", "<i>y", "<u>z", "<s>"))
