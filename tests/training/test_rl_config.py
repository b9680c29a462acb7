"""What a config cannot mean is one line; what decides what is learnt is in its hash."""

from __future__ import annotations

from pathlib import Path

import pytest

from foundation.errors import UsageError
from runtime.training.rl import config

TEXT = """seed = 1
[schedule]
mode = "async"
staleness = 2
[generation]
formats = "float32"
[delay]
mean_s = 0.1
[[stage]]
steps = 3
groups = 2
group_size = 4
tasks = { thinking = 1.0, copy = 2 }
objective = { correction = "icepop" }
"""


def read(folder: Path, *replacements: tuple[str, str]) -> config.RlConfig:
    text = TEXT
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    (folder / "rl.toml").write_text(text)
    return config.read(folder / "rl.toml")


def test_what_it_says(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert found.steps == 3 and found.schedule.behind == 2 and found.running == 24
    assert found.stages[0].objective.correction == "icepop"
    assert found.at(2) == (0, 2) and found.at(3) == (1, 0)


def test_the_default_reads() -> None:
    assert config.read(config.DEFAULT).steps == 300


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seed = 1", "sede = 1", "unknown key `sede`"),
        ("seed = 1", "seed = -1", "`seed` must be a whole number"),
        ('"async"', '"later"', "`mode` must be 'sync' or 'ahead' or 'async'"),
        ("staleness = 2", "staleness = -1", "`staleness` must lie between 0"),
        ("staleness = 2", "lag = 1", '`lag` is for mode = "sync"'),
        ("staleness = 2", 'admission = "never"', "`admission` must be"),
        ('mode = "async"\nstaleness = 2', 'admission = "discard"', '`admission` is for mode = "async"'),
        ('"float32"', '"int3"', "`formats` must be float32, bfloat16"),
        ("mean_s = 0.1", "tail = 1.0", "`tail` must lie above 1"),
        ("group_size = 4", "group_size = 1", "a group is its own baseline"),
        ("groups = 2", "groups = 100000", "at most 65,536 answers"),
        ("steps = 3", "steps = 0", "`steps` must lie between 1"),
        ("steps = 3", "steps = 3\nbeta2 = 1.0", "`beta2` must be 0 or more and below 1"),
        ("steps = 3", "steps = 3\ndecay = 1.5", "`decay`, a share of the steps, must lie between 0 and 1"),
        ("thinking = 1.0", "swimming = 1.0", "`tasks` has no 'swimming'"),
        ("thinking = 1.0, copy = 2", "copy = 0", "one above 0"),
        ('"icepop"', '"magic"', "must be 'none' or 'ppo-clip'"),
        ('correction = "icepop"', "clip_low = 2.0", "`clip_low`"),
        ("[[stage]]", "[[stages]]", "unknown key `stages`"),
    ],
)
def test_what_cannot_be_meant(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        read(tmp_path, (old, new))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_the_hash_is_of_what_is_learnt(tmp_path: Path) -> None:
    plain = read(tmp_path).hash
    assert read(tmp_path, ("seed = 1", "seed = 1\nsave_every = 3")).hash == plain
    assert read(tmp_path, ("seed = 1", "seed = 2")).hash != plain
    assert read(tmp_path, ('"icepop"', '"tis"')).hash != plain
