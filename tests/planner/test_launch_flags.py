"""Every line that is launched is one that the engine of that release takes: by the record of its parser, and by the
parser itself."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from model.split import Layout
from runtime.deployment.engines import load
from runtime.deployment.engines.flags import launched, releases, table
from runtime.deployment.errors import LaunchError
from runtime.planning.launch import Command, launch
from runtime.planning.launch.compose import WRITERS
from tests.planner.launching import RELEASES, complaints, examples, made, pairs, plan_of, pool, recorded
from tools.engine_flags import NoWheelError, asked, text, unpacked
from tools.engine_parser import PARSERS

B200 = pool("glm-5-fp8", "b200-sxm", Layout(4, 2), "fp8", settings={"graph_batch_sizes": [1, 2, 64]})


@pytest.mark.parametrize(("kind", "release"), RELEASES)
def test_every_line_is_one_that_the_release_takes(kind: str, release: str) -> None:
    assert recorded(kind, release)["checked"] == list(table(kind, release).checked)
    count = 0
    for name, found in examples(kind, release):
        for command in found.commands:
            assert complaints(command, recorded(kind, release)) == [], name
            count += 1
    assert count >= 10


def test_an_engine_with_a_launch_table_has_what_writes_and_what_parses_its_lines() -> None:
    assert sorted(WRITERS) == sorted(PARSERS) == launched()


# What the parsers of older releases take is on record, and does not change.
NEWEST = [(kind, list(releases(kind))[-1]) for kind in dict(RELEASES)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "release"), NEWEST)
def test_the_engines_own_parser_takes_every_line(kind: str, release: str) -> None:
    lines = [
        command.argv[len(table(kind, release).program) :]
        for _, found in examples(kind, release)
        for command in found.commands
    ]
    try:
        with unpacked(table(kind, release).checked) as folder:
            answers = asked(folder, kind, {"parse": lines})["lines"]
            again = {"checked": list(table(kind, release).checked), **asked(folder, kind, {"record": True})}
    except NoWheelError as error:
        pytest.skip(f"the engine cannot be downloaded: {error}")
    for words, answer in zip(lines, answers, strict=True):
        assert answer == {"error": None, "warned": None}, words
    assert json.loads(text(again)) == recorded(kind, release)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--nsa-prefill-backend", "trtllm"], "--nsa-prefill-backend is unknown"),
        (["--enable-dp-attention"], "--enable-dp-attention is deprecated"),
        (["--tp-size", "eight"], "--tp-size does not take eight"),
        (["--tp-size"], "--tp-size takes 1 values, has 0"),
        (["--kv-cache-dtype", "int8"], "--kv-cache-dtype does not take int8"),
    ],
)
def test_a_record_refuses_what_the_parser_does(words: list[str], why: str) -> None:
    assert complaints(Command("", 0, {}, ("x", *words)), recorded("sglang", "0.5.23")) == [why]


def test_a_record_finds_what_nobody_reads() -> None:
    words = ("x", "--additional-config", '{"fuse_muls_add": true}', "--kv-transfer-config", '{"kv_rol": "kv_both"}')
    command = Command("", 0, {"VLLM_NO_SUCH_THING": "1", "HCCL_BUFFSIZE": "200"}, words)
    assert complaints(command, recorded("vllm-ascend", "0.23")) == [
        "--additional-config: fuse_muls_add is read by nobody",
        "--kv-transfer-config: kv_rol is read by nobody",
        "VLLM_NO_SUCH_THING is read by nobody",
    ]


# --- which release -----------------------------------------------------------------------------------------


def test_flags_follow_the_release() -> None:
    old, new = (set(pairs(made("glm-5-fp8", B200, release=each).commands[0])) for each in ("0.5.9", "0.5.23"))
    assert old - new == {
        "--dp-size", "--enable-dp-attention", "--cuda-graph-max-bs", "--nsa-prefill-backend", "--nsa-decode-backend",
        "--enable-flashinfer-allreduce-fusion",
    }  # fmt: skip
    assert new - old == {
        "--attn-dp-size", "--cuda-graph-max-bs-decode", "--dsa-prefill-backend", "--dsa-decode-backend",
        "--flashinfer-allreduce-fusion-backend",
    }  # fmt: skip


def described(tmp_path: Path, kind: str, release: str) -> str:
    """An engine's description as somebody wrote it for another release."""
    import runtime.deployment.engines as engines

    own = (Path(engines.__file__).parent / f"{kind}.toml").read_text().split("\n# What was otherwise")[0]
    was = tomllib.loads(own)["release"]
    path = tmp_path / f"{kind}-{release}.toml"
    path.write_text(own.replace(f'release = "{was}"', f'release = "{release}"', 1))
    return str(path)


def test_the_release_is_that_of_the_plans_engine(tmp_path: Path) -> None:
    assert made("glm-5-fp8", B200).releases == {"sglang": load("sglang").release}
    for release in ("0.5.23", "0.5.23.0"):
        given = pool("glm-5-fp8", "b200-sxm", Layout(8), "fp8", engine=described(tmp_path, "sglang", release))
        found = made("glm-5-fp8", given)
        assert found.releases == {"sglang": "0.5.23"} and "--dsa-prefill-backend" in found.commands[0].argv
        assert "checked with sglang==0.5.23" in found.remarks[0] and "--release 0.5.9" in found.remarks[0]
    remarks = made("glm-5-fp8", B200, release="0.5.23").commands[0].remarks
    assert any(f"planned for sglang {load('sglang').release}" in remark for remark in remarks)


@pytest.mark.parametrize(
    ("kind", "release", "profile"),
    [("sglang", "0.5.10", "h200-sxm"), ("vllm", "0.9", "h200-sxm"), ("vllm-ascend", "0.13", "ascend-910c-die")],
)
def test_a_release_without_a_table_is_refused(kind: str, release: str, profile: str, tmp_path: Path) -> None:
    scheme = "w8a8" if kind == "vllm-ascend" else "fp8"
    layout = Layout(16, ep=16)
    named = pool("glm-5-fp8", profile, layout, scheme, engine=described(tmp_path, kind, release))
    asked_for: Any = pool("glm-5-fp8", profile, layout, scheme, engine=kind)
    for given, options in ((named, {}), (asked_for, {"release": release})):
        with pytest.raises(LaunchError, match=f"no launch table for {kind} {release}") as caught:
            made("glm-5-fp8", given, model="m", **options)
        assert ", ".join(releases(kind)) in str(caught.value) and "\n" not in str(caught.value)


def test_every_description_has_a_table() -> None:
    for kind, _ in RELEASES:
        assert table(kind, load(kind).release)
    plan = plan_of("glm-5-fp8", B200)
    assert launch(plan, plan.config(), "vllm", release="0.33").releases == {"vllm": "0.33"}
