"""Engine descriptions: complete, sourced, overridable, and refused when absurd."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import hw_profiles
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment import engines
from runtime.deployment.choice import chosen_scheme
from runtime.deployment.engines import Circumstances, engine_for, formats_for, load, names
from runtime.deployment.errors import EngineError
from runtime.execution.batches import gear
from runtime.execution.local.engine import EngineConfig
from runtime.execution.local.load import MEMORY_FRACTION
from runtime.execution.serve_all import without_times
from tests.cli.cli import glm5

GIB = 2**30


def test_the_engines_are_those_promised() -> None:
    assert names() == ["glm5", "sglang", "trtllm", "vllm", "vllm-ascend"]


@pytest.mark.parametrize("name", names())
def test_every_setting_has_a_source_a_date_and_a_grade(name: str) -> None:
    engine = load(name)
    assert engine.name == name and engine.description
    for setting, evidence in engine.evidence.items():
        assert evidence.source and evidence.date[:4].isdigit() and evidence.grade in "ABC", setting
        if evidence.source.startswith("assumed"):
            assert evidence.grade == "C", setting


def test_defaults_follow_the_devices_memory() -> None:
    chunks = [
        load("sglang", at=Circumstances(memory_bytes=gib * GIB)).chunked_prefill_tokens
        for gib in (16, 40, 80, 141, 180)
    ]
    assert chunks == [2048, 4096, 8192, 8192, 16384]
    assert load("vllm-ascend", at=Circumstances(memory_bytes=64 * GIB)).max_step_tokens == 2048
    assert load("vllm", at=Circumstances(memory_bytes=141 * GIB)).max_running_requests == 1024


@pytest.mark.parametrize("engine", names())
def test_a_copy_of_a_description_is_the_engine(engine: str, tmp_path: Path) -> None:
    """Defaults that are formulas go by the file's `kind`, whatever it is called."""
    copy = tmp_path / "mine.toml"
    copy.write_bytes((Path(engines.__file__).parent / f"{engine}.toml").read_bytes())
    for model in ("deepseek-v3", "glm-5-fp8", "glm-4.5"):
        cfg = load_config(model)
        for chip in ("h200-sxm", "b200-sxm", "ascend-910c-die"):
            profile, layout = hw_profiles.load(chip), Layout(tp=8)
            own, copied = (engine_for(name, cfg, profile, layout) for name in (engine, str(copy)))
            assert own == copied
            scheme = chosen_scheme(profile)
            assert formats_for(own, cfg, profile, scheme) == formats_for(copied, cfg, profile, scheme)


def test_the_copy_of_a_description_simulates_as_the_engine(tmp_path: Path) -> None:
    copy = tmp_path / "mine.toml"
    copy.write_bytes((Path(engines.__file__).parent / "sglang.toml").read_bytes())
    words = ("simulate", "--model", "deepseek-v3", "--tp", 8, "--requests", 8, "--json", "--engine")
    own, copied = (glm5(*words, name).json for name in ("sglang", copy))
    assert own == copied


def test_our_own_engine_is_described_as_it_is() -> None:
    """What glm5.toml says is what serves, and its batch sizes are those that steps are padded to."""
    engine, config = load("glm5"), EngineConfig()
    assert config.described == without_times(engine)
    assert EngineConfig(prefill_chunk=64).described.max_step_tokens == 64
    assert engine.memory_fraction == MEMORY_FRACTION
    padded = {gear(n, config.least_batch) for n in range(1, engine.max_running_requests + 1)}
    assert engine.graph_batch_sizes == tuple(sorted(padded))


def test_overrides_win_and_are_recorded() -> None:
    engine = load(
        "sglang",
        {"chunked_prefill_tokens": 32768, "graph_batch_sizes": [1, "4:8:4"]},
        at=Circumstances(memory_bytes=8 * GIB),
    )
    assert engine.chunked_prefill_tokens == 32768 and engine.graph_batch_sizes == (1, 4, 8)
    assert engine.evidence["chunked_prefill_tokens"].source == "override"


def test_sglang_captures_the_sizes_its_source_lists() -> None:
    sizes = load("sglang").graph_batch_sizes
    assert sizes[:7] == (1, 2, 4, 8, 12, 16, 24) and sizes[-1] == 512 and 256 in sizes and 272 in sizes


def test_each_memory_fraction_is_of_something_else() -> None:
    """100 GB device, 50 GB weights, 10 GB activations, 2 GB runtime, fraction 0.8."""
    sizes = dict(device_bytes=100e9, weight_bytes=50e9, activation_bytes=10e9, runtime_bytes=2e9)
    pools = {name: load(name, {"memory_fraction": 0.8}).kv_bytes(**sizes) for name in ("sglang", "vllm", "trtllm")}
    assert pools == {
        "sglang": pytest.approx(0.8 * 98e9 - 50e9),
        "vllm": pytest.approx(80e9 - 62e9),
        "trtllm": pytest.approx(0.8 * 38e9),
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"chunked_prefil_tokens": 1}, "did you mean chunked_prefill_tokens"),
        ({"policy": "random"}, "policy = 'random' must be one of prefill-first, mixed"),
        ({"page_tokens": 0}, "page_tokens = 0 must be a whole number, one or more"),
        ({"memory_fraction": 1.5}, "memory_fraction = 1.5 must be a fraction"),
        ({"memory_fraction": 0}, "leaves no memory"),
        ({"request_seconds": -1.0}, "must be a number, zero or more"),
        ({"max_step_tokens": "many"}, "must be a number"),
        ({"prefix_cache": 1}, "must be true or false"),
        ({"graph_batch_sizes": [0]}, "sizes of one or more"),
        ({"graph_batch_sizes": 3}, "graph_batch_sizes = 3 must hold sizes and ranges"),
        ({"graph_batch_sizes": ["1:8"]}, "must hold sizes and ranges"),
        ({"chunked_prefill_tokens": 2.5}, "chunked_prefill_tokens = 2.5 must be a number without a fraction"),
        ({"memory_fraction": float("nan")}, "memory_fraction = nan must be a finite number"),
        ({"page_tokens": True}, "page_tokens = True must be a number"),
    ],
)
def test_absurd_settings_are_refused(overrides: dict, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        load("sglang", overrides)


def test_a_whole_number_may_be_written_with_a_point() -> None:
    engine = load("sglang", {"max_step_tokens": 1e4, "memory_fraction": 1})
    assert (engine.max_step_tokens, type(engine.max_step_tokens)) == (10_000, int) and engine.memory_fraction == 1.0


def refusal(path: Path, text: str) -> str:
    """The one line with which a description is refused."""
    path.write_text(text)
    with pytest.raises(EngineError) as caught:
        load(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


SETTING = "policy = { value = 'mixed', source = 's', date = 2026-01-01, grade = 'C' }"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (SETTING, "policy = 3", "mine.toml: scheduling.policy = 3 must be an object"),
        ("policy", "polcy", "unknown engine setting 'polcy': did you mean policy"),
        ("value = 'mixed',", "", "mine.toml: policy lacks value"),
        ("grade = 'C'", "grade = 'C', why = ''", "mine.toml: policy does not take why; it takes value, source, date"),
        ("'s'", "3", "mine.toml: scheduling.policy.source = 3 must be text"),
        ("'C'", "'C', by_memory_gib = [[1]]", "scheduling.policy.by_memory_gib[0] = [1] must hold 2 values"),
        ("'mixed'", "'random'", "mine.toml: policy = 'random' must be one of prefill-first, mixed"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SETTING
    described = (Path(engines.__file__).parent / "vllm.toml").read_text()
    kept = "\n".join(line for line in described.splitlines() if not line.startswith("policy"))
    text = kept.replace("[scheduling]", f"[scheduling]\n{SETTING.replace(old, new)}", 1)
    assert message in refusal(tmp_path / "mine.toml", text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "sglang"', 'kind = "sgl"', "mine.toml: kind = 'sgl' must be one of glm5, sglang"),
        ('kind = "sglang"', "", "mine.toml: kind = None must be one of"),
        ('prices = "sglang"', 'prices = "mine"', "mine.toml: prices = 'mine' must be one of sglang, trtllm, vllm"),
        ('heads = {value = "bf16"', "heads = {value = [1]", "mine.toml: cache.heads [1] is unknown; known: f32"),
        ("[cache]", "cache = 3\n[kept]", "mine.toml: "),
    ],
)
def test_what_an_engine_is_of_is_known(tmp_path: Path, old: str, new: str, message: str) -> None:
    described = (Path(engines.__file__).parent / "sglang.toml").read_text()
    assert old in described
    assert message in refusal(tmp_path / "mine.toml", described.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('{family = "ampere"}', "{family = 5}", "chunked_prefill_tokens: when.family = 5 must be text"),
        ("{fp8 = true}", "{fp8 = 1}", "cache.index: when.fp8 = 1 must be true or false"),
        ("{fp8 = true}", '{fp8 = ["true"]}', "cache.index: when.fp8 = 'true' must be true or false"),
        ('{kv = "int8"}', '{kv = "int9"}', "cache.latent has a case of kv = 'int9'; known: bf16, fp8, int8"),
        ('{kv = "int8"}', "{kv = []}", "cache.latent has a case of kv = [], which never holds"),
        ('{family = "ampere"}', '{memory_bytes = "64"}', "when.memory_bytes = '64' must be a number"),
        ('{family = "ampere"}', "{sparse = {}}", "when.sparse = {} must be true or false"),
        ('"ampere"}, value = 2048', '"ampere"}, value = "x"', "chunked_prefill_tokens = 'x' must be a number without"),
        ('"ampere"}, value = 2048', '"ampere"}, value = -1', "chunked_prefill_tokens = -1 must be a number, zero or"),
        ("[[70, 2048]", "[[70, true]", "chunked_prefill_tokens = True must be a number without"),
        ("[[70, 2048]", "[[700, 2048]", "by_memory_gib = [700.0, 160.0, 1000000000.0] must rise,"),
    ],
)
def test_what_holds_elsewhere_is_checked_too(tmp_path: Path, old: str, new: str, message: str) -> None:
    """On no chip that is loaded here does the case hold."""
    text = (Path(engines.__file__).parent / "vllm.toml").read_text()
    assert old in text
    (tmp_path / "e.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(EngineError, match=re.escape(message)):
        load(str(tmp_path / "e.toml"))


@pytest.mark.parametrize("key", ["name", "description", "release"])
def test_what_is_printed_of_an_engine_is_one_line(tmp_path: Path, key: str) -> None:
    described = (Path(engines.__file__).parent / "sglang.toml").read_text()
    text = re.sub(rf'^{key} = ".*"$', rf'{key} = "x\\nrm #"', described, count=1, flags=re.MULTILINE)
    assert f"mine.toml: {key} = 'x\\nrm #' must be one line" in refusal(tmp_path / "mine.toml", text)
    older = described.replace('description = "SGLang 0.5.9,', 'description = "SGLang\\u001b[31m 0.5.9,')
    assert 'mine.toml: releases."0.5.9": description' in refusal(tmp_path / "mine.toml", older)


def test_a_name_is_no_path(tmp_path: Path) -> None:
    shutil.copy(Path(engines.__file__).parent / "vllm.toml", tmp_path / "mine.toml")
    for name in (str(tmp_path / "mine"), "../engines/vllm", ""):
        with pytest.raises(EngineError, match="unknown engine"):
            load(name)


def test_unknown_engines_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="unknown engine 'sgl': choose one of glm5, sglang"):
        load("sgl")
    path = tmp_path / "mine.toml"
    path.write_text("name = 'mine'\n[scheduling]\npolicy = {value = 'mixed', source = 's', date = 'd', grade = 'C'}\n")
    with pytest.raises(EngineError, match="mine.toml lacks chunked_prefill_tokens"):
        load(str(path))
    path.write_text("[scheduling]\npolicy = {value = 'mixed'}\n")
    with pytest.raises(EngineError, match="policy lacks source, date, grade"):
        load(str(path))
    path.write_text("=\n")
    with pytest.raises(EngineError, match="not valid TOML"):
        load(str(path))
