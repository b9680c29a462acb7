"""`glm5 compare`: its figures against torch's, its two anchors (float32 is float32; more bits are better), its page."""

from __future__ import annotations

import importlib
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from model.checkpoint import Checkpoint
from model.tokenizer import Tokenizer
from runtime.execution.local.load import embedded_checkpoint
from runtime.porting import compare
from runtime.reports.compare import page, worst_layer
from runtime.training.config import DEFAULT as OWN_TRAINING
from runtime.training.config import read as read_config
from runtime.training.data import TASKS
from tests.cli.cli import glm5, make_checkpoint, refused
from tests.reports.browser import check, needs_browser
from tests.reports.hostile import hostile, shown

command = importlib.import_module("runtime.cli.compare")  # whose name in the package is the verb's function
LOGITS = arrays(np.float32, (3, 7), elements=st.floats(-30, 30, width=32))


# --- figures ---------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(LOGITS, LOGITS)
def test_divergence_is_torchs(p: np.ndarray, q: np.ndarray) -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    log_p, log_q = (torch.from_numpy(x).double().log_softmax(-1) for x in (p, q))
    wanted = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(compare.divergence(p, q), wanted.numpy(), atol=1e-9)
    assert (compare.divergence(p, p) == 0).all()


@settings(deadline=None)
@given(LOGITS, st.floats(-5, 5, width=32))
def test_divergence_ignores_a_shift(p: np.ndarray, shift: float) -> None:
    np.testing.assert_allclose(compare.divergence(p, p.astype(np.float64) + shift), 0, atol=1e-6)


def test_overlap_counts_what_is_shared() -> None:
    found = compare.overlap(np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), np.array([[4, 3, 2, 1], [8, 9, 10, 11]]))
    assert found.tolist() == [1.0, 0.25]


def test_relative_error() -> None:
    assert compare.relative_error(np.array([3.0, 4.0]), np.array([3.0, 4.0])) == 0
    assert compare.relative_error(np.array([3.0, 4.0]), np.array([3.3, 4.4])) == pytest.approx(0.1)


def test_worst_layer_is_the_one_that_adds_most() -> None:
    row = {"layers": [{"hidden_error": e} for e in (0.01, 0.02, 0.05, 0.06)]}
    assert worst_layer(row) == (2, pytest.approx(0.03))


# --- a whole comparison ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "<tiny & model>"
    make_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """One comparison of the two-layer checkpoint, and its page."""
    html = tmp_path_factory.mktemp("page") / "page.html"
    prompts = html.with_name("prompts.txt")
    prompts.write_text("Hello <b>\n\nA mixture of experts\n")
    result = glm5(
        "compare", "--checkpoint", checkpoint, "--profile", "cpu-host:f32,ascend-910c:w8a8,ascend-910c:w4a8:int8",
        "--window", 48, "--max-tokens", 8, "--prompts", prompts, "--html", html, "--json",
    ).json  # fmt: skip
    return result, html.read_text(encoding="utf-8")


def test_float32_against_itself_is_exact(made: tuple[dict[str, Any], str]) -> None:
    row = made[0]["profiles"][1]
    assert (row["label"], row["logit_error"], row["top1_agreement"]) == ("cpu-host:f32", 0.0, 1.0)
    assert row["kl_nats"] == {"mean": 0.0, "p99": 0.0, "max": 0.0}
    assert row["perplexity"] == made[0]["reference"]["perplexity"]
    assert all(first["at"] is None for first in row["first_difference"])
    assert all(layer["hidden_error"] == 0 and layer["routing"] in (None, 1.0) for layer in row["layers"])


def test_fewer_bits_cost_more(made: tuple[dict[str, Any], str]) -> None:
    rows = {row["label"]: row for row in made[0]["profiles"]}
    wide, int8, int4 = (rows[name] for name in ("bf16", "ascend-910c:w8a8", "ascend-910c:w4a8:int8"))
    for key in ("logit_error",):
        assert 0 < wide[key] < int8[key] < int4[key]
    assert wide["kl_nats"]["mean"] < int4["kl_nats"]["mean"]
    assert [layer["selection"] is not None for layer in int4["layers"]] == [True, False]
    assert [layer["routing"] is not None for layer in int4["layers"]] == [False, True]
    assert (int4["cache"], int4["index_cache"], int8["cache"]) == ("int8", "int8", "bf16")
    assert made[0]["text_tokens"] % 48 == 0 and made[0]["prompts"] == 2


@pytest.mark.slow
def test_the_engine_computes_the_same(made: tuple[dict[str, Any], str], checkpoint: Path) -> None:
    """A prompt through the serving engine, paged and chunked, in the chip's formats: the logits of the one pass that
    the comparison makes, but for what another order of 16-bit roundings does."""
    from backends.emulation.fidelity import Observer, load
    from backends.emulation.number_formats import NumberFormats
    from model.checkpoint import Checkpoint
    from runtime.deployment.choice import chip_formats
    from runtime.execution.local.engine import EngineConfig
    from runtime.execution.local.request import Prompt

    opened, target = Checkpoint(checkpoint), compare.Compared.parse("ascend-910c:w8a8")
    held = NumberFormats(opened.config, chip_formats(opened.config, target.profile, target.formats, target.kv))
    ids = tuple(range(300, 314))
    engine = compare._engine(opened, held, EngineConfig(pool_tokens=64, max_running=1, least_context=16))
    served = engine.generate([Prompt(ids, 1, keep_logits=True)])[0].logits
    observed = Observer(opened.config, load(opened, held), held).run(np.array(ids)).logits
    assert served is not None
    noise = made[0]["profiles"][0]["logit_error"]
    assert compare.relative_error(observed, served[: len(ids)]) < 2 * noise


class Tags(HTMLParser):
    """Open tags, and the text outside style and pre."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "line", "circle", "polyline", "polygon"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle", "polyline", "polygon"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and "pre" not in self.open:
            self.text += data + " "


def test_the_page_says_what_was_measured(made: tuple[dict[str, Any], str]) -> None:
    result, html = made
    tags = Tags()
    tags.feed(html)
    assert tags.open == [] and "<tiny & model>" in tags.text and "Hello <b>" in tags.text
    for row in result["profiles"][1:]:
        assert f"{row['profile']}, {row['formats']}" in tags.text
        assert f"{row['top1_agreement']:.2%}" in tags.text and f"{row['logit_error']:.2%}" in tags.text
    assert "16 bits alone" in tags.text and "INT4, a scale an output channel" in tags.text
    assert "http" not in html.replace("http://www.w3.org", ""), "the page must need nothing from elsewhere"
    assert page(json.loads(json.dumps(result))) == html


def test_every_text_of_a_comparison_is_shown_as_text(made: tuple[dict[str, Any], str]) -> None:
    result = dict(made[0])
    result["reference"] = {**result["reference"], "perplexity": 1e9, "tasks": {"a task": 0.5}}
    result["profiles"] = [{**row, "tasks": {"a task": 0.5}} for row in result["profiles"]]
    assert shown(page(hostile(result, (), ("tasks",)))) > 100


@pytest.mark.slow
@needs_browser
def test_the_page_fits_a_phone_and_paper(made: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    check(made[1], tmp_path)


def test_the_summary(made: tuple[dict[str, Any], str], capsys: pytest.CaptureFixture[str]) -> None:
    command._print(made[0])
    out = capsys.readouterr().out
    assert "perplexity in float32" in out and "\ncpu-host" in out and "\nbf16 " in out


@pytest.mark.slow
def test_the_summary_of_a_command(checkpoint: Path) -> None:
    out = glm5("compare", "--checkpoint", checkpoint, "--profile", "cpu-host", "--window", 48, "--max-tokens", 8).out
    assert "perplexity in float32" in out and "\ncpu-host " in out and "\nbf16 " in out


# --- what is read, and what is said of it ----------------------------------------------------------------


def test_the_embedded_checkpoint_reads_what_it_knows(checkpoint: Path, tmp_path: Path) -> None:
    own = Checkpoint(embedded_checkpoint())
    tokenizer = Tokenizer.load(own.path)
    texts = compare.read_texts(own, tokenizer, None, None, 512, 32)
    said = [tokenizer.decode(window.tolist()) for window in texts.windows]
    longest = max(stage.length for stage in read_config(OWN_TRAINING).stages)
    assert {len(window) for window in texts.windows} == {longest} and "trained on" in texts.source
    assert sum(len(window) for window in texts.windows) >= 512 * len(TASKS)
    assert any("Remember:" in text for text in said) and any("Repeat:" in text for text in said)
    assert any("=" in prompt for prompt, _ in texts.prompts)
    given = tmp_path / "text.txt"
    given.write_text("What somebody wrote. " * 9)
    assert compare.read_texts(own, tokenizer, given, given, 64, 8).source == str(given)
    other = compare.read_texts(Checkpoint(checkpoint), tokenizer, None, None, 48, 8)
    assert "lighthouse" in tokenizer.decode(other.windows[0].tolist()) and "prose" in other.source


def test_a_text_that_is_foreign_to_the_model_is_said_so(
    made: tuple[dict[str, Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    result, _ = made
    for perplexity, expected in ((17.6, False), (332_956_285.0, True)):
        one = {**result, "reference": {**result["reference"], "perplexity": perplexity}}
        command._print(one)
        assert ("does not predict this text" in " ".join(capsys.readouterr().out.split())) is expected
        assert ("does not predict this text" in page(one)) is expected


def test_a_pipe_is_told_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    command._progress(False)("2 of 3: bf16")
    command._progress(True)("3 of 3: w4a8")
    assert capsys.readouterr() == ("", "running 2 of 3: bf16\n")


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "mentions"),
    [
        (("--profile", "no-such"), ("no-such",)),
        (("--profile", ","), ("--profile",)),
        (("--profile", "h200-sxm:"), ("h200-sxm:", "PROFILE[:FORMATS[:CACHE]]")),
        (("--profile", "h200-sxm:fp8:fp8:x"), ("PROFILE",)),
        (("--profile", "ascend-910c:fp8"), ("ascend-910c", "fp8-block", "w4a8")),
        (("--profile", "h200-sxm", "--formats", "nvfp4"), ("h200-sxm", "nvfp4")),
        (("--profile", "h200-sxm:fp8,ascend-910c:w8a8:int8", "--formats", "bf16"), ("--formats bf16", "leave out one")),
        (("--profile", "h200-sxm", "--text", "/nowhere"), ("--text", "/nowhere")),
        (("--profile", "h200-sxm", "--prompts", "/nowhere"), ("--prompts", "/nowhere")),
        (("--profile", "h200-sxm", "--max-tokens", "9999"), ("9999", "positions")),
        (("--profile", "h200-sxm", "--html", "/nowhere/page.html"), ("cannot be written", "/nowhere")),
        (("--profile", "h200-sxm", "--checkpoint", "/nowhere"), ("/nowhere",)),
    ],
)
def test_one_line_each(checkpoint: Path, options: tuple[str, ...], mentions: tuple[str, ...]) -> None:
    words = options if "--checkpoint" in options else ("--checkpoint", str(checkpoint), *options)
    line = refused("compare", *words)
    assert all(word in line for word in mentions), line
