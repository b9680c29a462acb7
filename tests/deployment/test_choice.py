"""What number formats a chip can be asked for, and what then runs in which."""

from __future__ import annotations

import pytest

import hw_profiles
from backends.emulation.table import DECIDES, format_table
from foundation.errors import UsageError
from model.formats import SCHEMES
from model.hf_config import load_config
from model.ops import OPS
from model.weights import layer_weights
from runtime.deployment.choice import chip_formats, chosen_scheme, offered_schemes
from tests.plans import formats

GLM5 = load_config("glm-5")


def test_every_profile_has_formats_of_its_own() -> None:
    for name in hw_profiles.names():
        profile = hw_profiles.load(name)
        own = chosen_scheme(profile)
        assert set(own.formats) <= {*profile.formats.weights, "f32"}
        for each in offered_schemes(profile):
            assert chip_formats(GLM5, profile, each.name).scheme == each


@pytest.mark.parametrize(
    ("profile", "own"),
    [
        ("h200-sxm", "fp8"),
        ("ascend-910c", "w8a8"),
        ("ascend-950dt", "mxfp8"),
        ("b200-sxm", "fp8"),
        ("cpu-host", "bf16"),
    ],
)
def test_a_profiles_own_formats(profile: str, own: str) -> None:
    assert chosen_scheme(hw_profiles.load(profile)).name == own


@pytest.mark.parametrize(
    ("profile", "formats", "kv", "mentions"),
    [
        ("ascend-910c", "fp8", None, ("ascend-910c", "fp8-block", "w4a8")),
        ("h200-sxm", "nvfp4", None, ("h200-sxm", "nvfp4", "w4a16")),
        ("h200-sxm", "int3", None, ("int3", "fp8")),
        ("h200-sxm", None, "int8", ("h200-sxm", "int8", "fp8")),
        ("ascend-910c", "w4a8", "fp8", ("fp8", "int8")),
        ("ascend-910c", "f32", "int8", ("f32", "int8")),
        ("ascend-910c", "w4a8", "int3", ("int3",)),
    ],
)
def test_units_a_chip_does_not_have(
    profile: str, formats: str | None, kv: str | None, mentions: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as caught:
        chip_formats(GLM5, hw_profiles.load(profile), formats, kv)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in mentions)


def test_the_index_cache_goes_with_the_chip() -> None:
    found = {
        (profile, kv): (formats.kv, formats.cache.of("index").kind)
        for profile, kv in (("h200-sxm", None), ("h200-sxm", "fp8"), ("ascend-910c", None), ("ascend-910c", "int8"))
        for formats in [chip_formats(GLM5, hw_profiles.load(profile), None, kv)]
    }
    assert found == {
        ("h200-sxm", None): ("bf16", "fp8"),
        ("h200-sxm", "fp8"): ("fp8", "fp8"),
        ("ascend-910c", None): ("bf16", "bf16"),
        ("ascend-910c", "int8"): ("int8", "int8"),
    }


def test_every_op_has_a_rule() -> None:
    assert DECIDES.keys() == OPS.keys()


@pytest.mark.parametrize("model", ["glm-5", "glm-4.7", "glm-4.7-flash"])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_the_table_holds_every_matrix_once(model: str, scheme: str) -> None:
    cfg = load_config(model)
    rows = format_table(cfg, formats(scheme))
    named = [name for row in rows for name in row.weights]
    matrices = {
        w.name for kind in cfg.layer_counts if not kind.mtp for w in layer_weights(cfg, kind) if len(w.shape) > 1
    }
    assert sorted(named) == sorted({*matrices, "head"})
    assert {row.op for row in rows} <= DECIDES.keys()
    assert any(row.op == "glm.index_scores" for row in rows) == (cfg.indexer is not None)
