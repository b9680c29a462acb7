"""A made-up chip's measured operators, read into a profile, price that chip's steps: also those that no row is of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hw_profiles
from model.hf_config import load_config
from model.split import Layout
from runtime.porting import operator_kernels
from runtime.porting.kernel_fit import FitBasis, Measurement, fitted
from runtime.porting.operator_times import OperatorTime
from runtime.pricing import GLM5, Chip, MlaLayer, PriceBook, attention, open_book
from runtime.pricing.load import balanced
from runtime.serving.pricing import BatchShape
from runtime.simulation.build import PriceTables, pricer_of, spec_for
from tests.calibrate.made_up_npu import BASE, CONTEXT, EMPTY_S, TP, Call, decode_step
from tests.cli.cli import glm5, refused

LOAD = balanced(256)
MEASURED = ((4, CONTEXT), (16, CONTEXT), (64, CONTEXT), (256, CONTEXT), (16, 4 * CONTEXT), (64, 4 * CONTEXT))
HELD_OUT = ((8, CONTEXT), (32, CONTEXT), (128, CONTEXT), (8, 2 * CONTEXT), (32, 2 * CONTEXT), (32, 4 * CONTEXT))
LAUNCH, VECTOR = (BASE.number(f"overhead.{name}_launch_s") or 0.0 for name in ("kernel", "vector"))


def _json(calls: list[Call]) -> str:
    rows = [each.row() for each in calls]
    return json.dumps({"kind": "glm5-npu-measurements", "version": 1, "empty_s": EMPTY_S, "operators": rows})


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The profile, and what the command said of it."""
    folder = tmp_path_factory.mktemp("made-up")
    (folder / "m.json").write_text(_json([call for b, context in MEASURED for call in decode_step(b, LOAD, context)]))
    out = folder / "mine.toml"
    return out, glm5("calibrate", "--from", folder / "m.json", "--profile", BASE.name, "--out", out, "--json").json


def _pricer(profile: hw_profiles.Profile) -> Any:
    spec = spec_for(
        load_config("glm-5"), profile, Layout(tp=TP, ep=TP), "w8a8", "bf16", "glm5", expert_load=LOAD,
        pool_tokens=1_000_000,
    )  # fmt: skip
    return pricer_of(spec, PriceTables())


def _step_s(pricer: Any, b: int, context: int) -> float:
    """Of a device, without collectives."""
    price = pricer.price(BatchShape(decode_contexts=np.full(b, context), decode_rows=b, graphed=True))
    return sum(seconds for name, seconds in price.by_op.items() if name not in ("psum", "all_gather"))


def test_the_steps_of_a_made_up_chip_come_back(read: tuple[Path, dict[str, Any]]) -> None:
    """Steps that rows are of, and others between them; the profile that it began from is far off."""
    mine, base = _pricer(hw_profiles.load(read[0])), _pricer(BASE)
    errors, before = [], []
    for b, context in (*MEASURED, *HELD_OUT):
        truth = sum(call.seconds for call in decode_step(b, LOAD, context))
        errors.append(_step_s(mine, b, context) / truth - 1)
        before.append(_step_s(base, b, context) / truth - 1)
    assert np.abs(errors).max() < 0.03, errors
    assert np.abs(before).min() > 0.2, before


def test_every_row_is_said_to_be_used_or_not(read: tuple[Path, dict[str, Any]]) -> None:
    rows = read[1]["rows"]
    assert len(rows) == read[1]["operators"] == sum(len(decode_step(b, LOAD, context)) for b, context in MEASURED)
    assert not [row for row in rows if row["left_out"]]
    used = {row["used_for"] for row in rows} - {"products"}
    assert (
        used == set(read[1]["kernels"]) == set(json.loads(read[0].with_suffix(".prices.json").read_text())["kernels"])
    )


def _book(rows: list[OperatorTime], folder: Path) -> tuple[PriceBook, list[operator_kernels.RowUse]]:
    found = operator_kernels.sorted_rows(rows, BASE)
    tables = operator_kernels.prices(found, BASE, "rows")
    assert tables
    (folder / "rows.json").write_text(json.dumps(tables))
    return open_book(Chip.from_fields(BASE.name, BASE.number), prices=folder / "rows.json"), list(found.uses)


def _times(*calls: tuple[str, str, list[tuple[tuple[int, ...], str]], list[tuple[tuple[int, ...], str]], float]) -> Any:
    return [OperatorTime(name, tuple(given), tuple(made), s, phase=phase) for name, phase, given, made, s in calls]


def test_caches_in_int8_have_kernels_of_their_own(tmp_path: Path) -> None:
    """16 sequences of 8,192 tokens, as `--kv int8` keeps them: 656 bytes a latent, 130 an index key."""
    pages, table = (16 * 64, 128, 1), ((16, 64), "int32")
    chosen = ((16, 1, 1, 2048), "int32")
    kept = ((*pages, 656), "int8")
    attended, indexed = 3e-4, 2e-4
    book, uses = _book(
        _times(
            ("npu.npu_kv_quant_sparse_flash_attention", "decode",
             [((16, 1, 4, 576), "bfloat16"), kept, kept, chosen, table], [((16, 1, 4, 512), "bfloat16")], attended),
            ("npu.npu_quant_lightning_indexer", "decode",
             [((16, 1, 32, 128), "int8"), ((*pages, 128), "int8"), ((16, 1, 32), "float16"), table], [chosen], indexed),
        ),
        tmp_path,
    )  # fmt: skip
    assert [use.used_for for use in uses] == ["mla_decode/int8/any", "indexer_decode/int8/any"]
    layer = MlaLayer(GLM5, 4, "index", "int8_packed", "w8a8-int8", "int8_scaled")
    parts = attention._decode_parts(book, layer, 16, 8192)
    assert parts["attention"].seconds == pytest.approx(attended + LAUNCH, rel=0.01)
    assert parts["indexer"].seconds == pytest.approx(indexed + LAUNCH, rel=0.01)
    assert "select_topk" not in parts and parts["indexer"].relative_error >= 0.5  # said by one size


def test_a_chunks_attention_and_indexer_are_not_those_of_tokens(tmp_path: Path) -> None:
    """512 tokens at the end of 8,192, of one sequence."""
    pages, table, chosen = (64, 128, 1), ((1, 64), "int32"), ((1, 512, 1, 2048), "int32")
    latents = ((*pages, 512), "bfloat16")
    book, uses = _book(
        _times(
            ("npu.npu_sparse_flash_attention", "prefill",
             [((1, 512, 4, 512), "bfloat16"), latents, latents, chosen, table, ((1, 512, 4, 64), "bfloat16"),
              ((*pages, 64), "bfloat16")], [((1, 512, 4, 512), "bfloat16")], 2e-3),
            ("npu.npu_lightning_indexer", "prefill",
             [((1, 512, 32, 128), "bfloat16"), ((*pages, 128), "bfloat16"), ((1, 512, 32), "bfloat16"), table],
             [chosen], 1e-3),
        ),
        tmp_path,
    )  # fmt: skip
    assert [use.used_for for use in uses] == ["sparse_prefill/bf16/any", "indexer_prefill/bf16/any"]
    parts = attention._prefill_parts(
        book, MlaLayer(GLM5, 4, "index", "bf16", "bf16", "bf16"), 512, 8192 - 256, 1, absorbed=True
    )
    assert parts["attention"].seconds == pytest.approx(2e-3 + LAUNCH, rel=0.01)
    assert parts["indexer"].seconds == pytest.approx(1e-3 + LAUNCH, rel=0.02)


def test_what_is_sent_to_experts_is_a_curve_by_bytes(tmp_path: Path) -> None:
    """Of 16 devices with 16 experts each; a single size makes none."""

    def sent(tokens: int, seconds: float) -> Any:
        given = ((tokens, 6144), "bfloat16"), ((tokens, 8), "int32")
        rows = ((tokens * 16 * 8, 6144), "int8")
        made = [rows, (rows[0][:1], "float32"), ((rows[0][0] * 128,), "int32"), ((16,), "int64"), ((256,), "int32")]
        back = [((rows[0][0], 6144), "bfloat16"), given[1], made[2], made[4]]
        return _times(
            ("npu.npu_moe_distribute_dispatch_v2", "decode", [*given], made, seconds),
            ("npu.npu_moe_distribute_combine_v2", "decode", back, [given[0]], 2 * seconds),
        )

    book, uses = _book([*sent(4, 40e-6), *sent(16, 55e-6), *sent(64, 90e-6)], tmp_path)
    assert {use.used_for for use in uses} == {"deepep_ll_dispatch/16/any", "deepep_ll_combine/16/any"}
    for tokens, seconds in ((4, 40e-6), (64, 90e-6)):
        price = book.network.deepep("combine", "ll", tokens, 6144, 8, 16)
        assert price.seconds == pytest.approx(2 * seconds + LAUNCH, rel=0.01)
    assert 45e-6 < book.network.deepep("dispatch", "ll", 8, 6144, 8, 16).seconds < 60e-6
    alone = operator_kernels.sorted_rows(sent(4, 40e-6), BASE)
    assert {use.left_out for use in alone.uses} == {"one size of it, where two make a curve"}
    assert operator_kernels.prices(alone, BASE, "rows") is None


def test_a_table_of_few_kernels_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    norm = ("npu.npu_rms_norm", "decode", [((32, 6144), "bfloat16"), ((6144,), "bfloat16")],
            [((32, 6144), "bfloat16"), ((32, 1), "float32")], 8e-6)  # fmt: skip
    book, _ = _book(_times(norm), tmp_path)
    before = open_book(Chip.from_fields(BASE.name, BASE.number))
    moved = 2.0 * (2 * 32 * 6144 + 6144)
    assert book.memory(moved, "rms_norm").seconds == pytest.approx(8e-6 + VECTOR, rel=0.01)
    assert book.memory(moved, "swiglu") == before.memory(moved)
    for fmt in ("bf16", "w8a8-int8"):
        assert book.gemm(64, 6144, 6144, fmt) == before.gemm(64, 6144, 6144, fmt)


def test_the_operator_of_the_projections_has_the_work_of_its_products() -> None:
    """A sixteenth of GLM-5, one matrix in FRACTAL_NZ's four dims; the cache that it writes to is no operand."""
    shapes = [(32, 6144), (128, 192, 16, 32), (2048, 1024), (4, 192, 512), (6144, 576), (129, 128, 1, 512)]
    kinds = ["int8", "int8", "int8", "bfloat16", "int8", "bfloat16"]
    call = ("npu.npu_mla_prolog_v3", "decode", [*zip(shapes, kinds, strict=True)], [((32, 4, 512), "bfloat16")], 1e-4)
    ((key, (point,)),) = operator_kernels.sorted_rows(_times(call), BASE).kernels.items()
    assert key == "mla_prolog/w8a8-int8/any" and point.seconds == pytest.approx(1e-4 + LAUNCH)
    sizes = {"tokens": 32, "hidden": 6144, "q_lora": 2048, "kv_lora": 512, "rope": 64, "nope": 192, "heads": 4}
    assert sizes.items() <= dict(point.features).items()


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("aten.where", [((4, 4), "bool")], "no kernel of its own"),
        ("aten.add", [((4, 4), "bfloat16"), ((4,), "bfloat16")], "not of two whole activations"),
        ("npu.npu_lightning_indexer", [((4, 32, 128), "bfloat16"), ((8, 128, 1, 128), "bfloat16")], "whose they are"),
        ("npu.npu_rms_norm", [((4, 4), "bfloat16")], "not those of the operator"),
    ],
)
def test_a_row_that_is_not_used_says_why(name: str, given: list[Any], says: str) -> None:
    (use,) = operator_kernels.sorted_rows(_times((name, "decode", given, [((4, 4), "bfloat16")], 1e-5)), BASE).uses
    assert says in use.left_out and not use.used_for


def test_rows_of_other_tensors_are_used_or_say_why() -> None:
    """Each operator of a step with fewer tensors, fewer dims, or dims of 0: no traceback, no point without sizes."""
    odd = []
    for call in decode_step(4, LOAD):
        given, made = ([(tuple(shape), kind) for shape, kind in each] for each in (call.inputs, call.outputs))
        for i, (shape, kind) in enumerate(given):
            for tensors in (given[:i], *([*given[:i], (s, kind), *given[i + 1 :]] for s in ((), (0,) * len(shape)))):
                row = OperatorTime(call.name, tuple(tensors), tuple(made), 1e-5, "", call.rows, call.groups, "decode")
                odd += [row, dataclasses.replace(row, inputs=tuple(given), outputs=())]
    found = operator_kernels.sorted_rows(odd, BASE)
    assert len(found.uses) == len(odd) and all(bool(use.used_for) != bool(use.left_out) for use in found.uses)
    points = [point for each in found.kernels.values() for point in each]
    assert points and all(min(point.seconds, *point.features.values()) > 0 for point in points)


@pytest.mark.parametrize(
    ("key", "value"), [("median_s", "inf"), ("rows", -1), ("inputs", [{"shape": [-1], "dtype": "a"}])]
)
def test_measurements_that_are_none_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(_json(decode_step(4, LOAD)[:1]))
    text = json.loads((tmp_path / "m.json").read_text())
    text["operators"][0][key] = value
    (tmp_path / "m.json").write_text(json.dumps(text))
    words = ("--profile", BASE.name, "--out", tmp_path / "mine.toml")
    assert "measure again" in refused("calibrate", "--from", tmp_path / "m.json", *words)
    assert not (tmp_path / "mine.toml").exists()


def test_as_many_points_as_a_grid_has_need_be_none() -> None:
    """Four of two by two, two of them in one place: what is left of the fit goes by tokens."""
    sizes = [(1.0, 100.0, 4.0), (1.0, 200.0, 4.0), (2.0, 100.0, 4.0), (2.0, 100.0, 8.0)]
    points = [
        Measurement({"sequences": b, "tokens": b, "context": c, "heads": h, "kv_bytes": 80.0, "qk": 40.0, "v": 32.0},
                    1e-5 * b + 1e-8 * c * h)
        for b, c, h in sizes
    ]  # fmt: skip
    body = fitted("attention", points, FitBasis(1e14, 1e12), "made up")
    assert list(body["axes"]) == ["tokens"] and max(map(abs, body["ratio"])) < 5_000


def test_experts_without_the_sorting_of_their_tokens_are_products() -> None:
    rows = [each for each in decode_step(64, LOAD) if each.name == "npu.npu_grouped_matmul"]
    times = [
        dataclasses.replace(each, rows=call.rows, groups=call.groups)
        for call in rows
        for each in _times((call.name, "decode", [*((tuple(s), k) for s, k in call.inputs)],
                            [*((tuple(s), k) for s, k in call.outputs)], call.beyond_s))
    ]  # fmt: skip
    found = operator_kernels.sorted_rows(times, BASE)
    assert not found.kernels and [each.flops for each in found.products] == [call.flops for call in rows]


def test_a_table_of_many_thousand_rows_is_a_kernel_of_few_knots() -> None:
    """As large as msmodeling's: read in seconds, and the law comes back where no row is."""
    rng = np.random.default_rng(3)
    sizes = np.exp(rng.uniform(np.log(1e3), np.log(1e9), 12_000)).astype(int)
    times = _times(
        *(("npu.npu_rms_norm", "", [((1, int(n)), "bfloat16"), ((1,), "bfloat16")], [((1, int(n)), "bfloat16")],
           3e-6 + 4.0 * n / 0.6e12 * float(rng.uniform(0.97, 1.03))) for n in sizes)
    )  # fmt: skip
    tables = operator_kernels.prices(operator_kernels.sorted_rows(times, BASE), BASE, "rows")
    assert tables
    body = tables["kernels"]["memory/rms_norm/any"]
    assert len(body["ratio"]) < 100 and body["error"]["held_out_shapes"][1] < 0.2
    low, high = body["range"]["bytes"]
    assert low < 1e4 and high > 3e9
