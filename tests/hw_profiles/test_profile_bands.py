"""The shipped headline numbers against bands written down here from the sources, not from the TOML files.

A band is (low, high); `None` says that nobody publishes the figure, so the profile must not have it.
Columns: bf16 TFLOP/s, fp8 TFLOP/s, int8 TOP/s (dense, matmul unit), memory GB (1e9), TB/s, scale-up GB/s
in one direction.
"""

import pytest

from hw_profiles import check, load, names

Band = tuple[float, float] | None


def about(value: float, within: float = 0.01) -> Band:
    return (value * (1 - within), value * (1 + within))


# Datasheets: H100/H200 989 and 1979 dense; A100 312/624; B200 2250/4500; GB200 2500/5000;
# B300 int8 307 sparse.
# Memory: nvidia-smi MiB to the nominal GiB, in 1e9 bytes. NVLink 600, 900, 1800 GB/s and H800's 400, halved.
NVIDIA = {
    "a100-sxm-80gb": (about(312), None, about(624), (85.0, 86.0), about(2.039), about(300)),
    "h100-sxm": (about(989), about(1979), about(1979), (85.5, 86.0), about(3.35), about(450)),
    "h200-sxm": (about(989), about(1979), about(1979), (150.7, 151.5), about(4.8), about(450)),
    "h800-sxm": (about(989), about(1979), about(1979), (85.5, 86.0), (3.35, 3.43), about(200)),
    "h20-96gb": (about(148), about(296), about(296), (102.6, 103.1), (4.0, 4.1), about(450)),
    "h20-141gb": (about(148), about(296), about(296), (150.7, 151.5), about(4.8), about(450)),
    "b200-sxm": (about(2250), about(4500), about(4500), (192.0, 194.0), (7.7, 8.0), about(900)),
    "b300-sxm": (about(2250), about(4500), (150, 157), (287.0, 290.0), (7.7, 8.0), about(900)),
    "gb200-nvl72": (about(2500), about(5000), about(5000), (198.0, 200.0), about(8.0), about(900)),
    "gb300-nvl72": (about(2500), about(5000), (160, 170), (297.0, 299.0), about(8.0), about(900)),
}

# 910: msmodeling and light-llm-simulator, cube unit only (not 376/313/280), 64 or 32 GiB, HCCS 196 over
# 7 links, UB 392 a package (arXiv 2506.12708). 950: Huawei white paper 2026-06, cube only; UB disputed.
ASCEND = {
    "ascend-910b2": (about(353.9), None, (707, 752), (68.0, 69.0), (1.6, 1.76), about(196)),
    "ascend-910b3": (about(294.9), None, (589, 626), (68.0, 69.0), (1.6, 1.76), about(196)),
    "ascend-910b4": (about(245.8), None, (491, 560), (34.0, 35.0), (0.8, 0.88), (32, 64)),
    "ascend-910c": (about(707.8), None, (1415, 1504), (137.0, 138.0), (3.2, 3.52), about(392)),
    "ascend-910c-die": (about(353.9), None, (707, 752), (68.0, 69.0), (1.6, 1.76), about(196)),
    "ascend-910c-die-560t": (about(245.8), None, (491, 560), (68.0, 69.0), (1.6, 1.76), about(196)),
    "ascend-950pr": (about(432), about(865), about(865), (128, 137.5), (1.6, 1.76), (224, 1008)),
    "ascend-950pr-pcie": (about(378), about(756), about(756), (112, 120.3), (1.4, 1.54), about(159)),
    "ascend-950dt": ((378, 486), (757, 973), (757, 973), (144, 154.7), (4.0, 4.4), (224, 1008)),
}

# Vendor pages, press and community comparisons; wide where they disagree.
OTHERS = {
    "mtt-s4000": ((98, 100), None, (196, 200), about(48), about(0.768), about(120)),
    "mtt-s5000": ((450, 520), (920, 1024), None, (79, 86), about(1.6), about(392)),
    "hygon-k100-ai": ((192, 196), None, about(392), (64, 69), about(0.896), None),
    "hygon-bw1000": (about(480), None, about(960), (64, 69), about(1.6), None),
    "cambricon-mlu370-x8": (about(96), None, about(256), (48, 52), about(0.614), (100, 200)),
    "cambricon-mlu590": ((256, 390), None, None, (64, 86), (1.23, 2.0), about(186)),
    "kunlunxin-p800": ((340, 350), None, (680, 700), (96, 104), (1.5, 2.5), None),
    "metax-c500": ((240, 280), None, (480, 560), (64, 69), (1.55, 1.8), None),
    "metax-c550": (None, None, None, (64, 69), (1.55, 1.8), about(448)),
    "enflame-s60": (None, None, None, (48, 52), (0.65, 0.7), None),
    "enflame-l600": (None, None, None, (144, 155), about(3.6), None),
    # Any x86 server core makes 30 to 200 GFLOP/s in fp32; one to twelve memory channels.
    "cpu-host": ((0.03, 30), None, None, (4, 4000), (0.01, 0.6), None),
}

BANDS = NVIDIA | ASCEND | OTHERS
COLUMNS = (
    ("chip.peak.bf16_flops_per_s", 1e12),
    ("chip.peak.fp8_flops_per_s", 1e12),
    ("chip.peak.int8_flops_per_s", 1e12),
    ("chip.memory.capacity_bytes", 1e9),
    ("chip.memory.bandwidth_bytes_per_s", 1e12),
    ("link.scale_up.bandwidth_bytes_per_s", 1e9),
)


def test_every_shipped_profile_has_bands() -> None:
    assert set(names()) == set(BANDS)


@pytest.mark.parametrize("name", BANDS)
def test_headline_figures_lie_in_their_bands(name: str) -> None:
    profile = load(name)
    for (field, scale), band in zip(COLUMNS, BANDS[name], strict=True):
        figure = profile.get(field)
        if band is None:
            assert figure is None, f"{field} is published nowhere we know of, yet the profile has {figure}"
        else:
            assert figure is not None, f"{field} is known, yet absent"
            assert band[0] <= figure.value / scale <= band[1], field


@pytest.mark.parametrize("name", BANDS)
def test_shipped_profiles_are_plausible(name: str) -> None:
    assert check(load(name)) == []


@pytest.mark.parametrize("name", BANDS)
def test_every_shipped_figure_says_where_it_comes_from(name: str) -> None:
    profile = load(name)
    assert profile.name == name
    for item in (*profile.figures.values(), *profile.curves.values(), profile.formats):
        assert item.source and item.date and item.grade in ("A", "B", "C")


# What the driver leaves, from CUDA's and torch_npu's own totals, in GiB.
USABLE_GIB = {
    "a100-sxm-80gb": (79.1, 79.3),
    "h100-sxm": (79.1, 79.3),
    "h200-sxm": (139.7, 139.9),
    "b200-sxm": (178.3, 178.4),
    "b300-sxm": (267.6, 267.8),
    "gb200-nvl72": (184.3, 184.4),
    "gb300-nvl72": (276.4, 276.6),
    "ascend-910b2": (60.9, 61.3),
    "ascend-910b4": (29.4, 29.6),
    "ascend-910c-die": (60.9, 61.3),
}


@pytest.mark.parametrize("name", USABLE_GIB)
def test_usable_memory_is_what_drivers_report(name: str) -> None:
    low, high = USABLE_GIB[name]
    assert low <= load(name).value("chip.memory.usable_bytes") / 2**30 <= high


FORMATS = [
    ("h200-sxm", {"fp8-block", "fp8-tensor", "w8a8-int8"}, {"nvfp4", "mxfp8", "mxfp4"}),
    ("a100-sxm-80gb", {"w8a8-int8", "bf16"}, {"fp8-block", "fp8-tensor", "nvfp4"}),
    ("b200-sxm", {"fp8-block", "mxfp8", "nvfp4", "mxfp4"}, {"w4a8"}),
    ("ascend-910c-die", {"w8a8-int8", "w4a8"}, {"fp8-block", "mxfp8"}),
    ("ascend-950dt", {"mxfp8", "mxfp4", "w8a8-int8"}, {"fp8-block", "nvfp4"}),
]


@pytest.mark.parametrize(("name", "has", "lacks"), FORMATS)
def test_number_formats(name: str, has: set[str], lacks: set[str]) -> None:
    weights = set(load(name).formats.weights)
    assert has <= weights
    assert not lacks & weights


def test_a_package_is_two_dies() -> None:
    package, die = load("ascend-910c"), load("ascend-910c-die")
    assert package.package_devices == 2
    for field in (
        "chip.peak.bf16_flops_per_s",
        "chip.memory.capacity_bytes",
        "chip.memory.bandwidth_bytes_per_s",
        "link.scale_up.bandwidth_bytes_per_s",
        "link.scale_up.domain_devices",
        "node.devices",
    ):
        factor = 0.5 if field.endswith("devices") else 2
        assert package.value(field) == pytest.approx(factor * die.value(field)), field
