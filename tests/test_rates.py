"""What a device can do: known by its name, or measured."""

import types

import jax
import numpy as np
import pytest

from colbert_jax import rates
from colbert_jax.rates import measure_bandwidth, measure_flops, peak_rates


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
    ],
)
def test_published_peaks_go_by_the_kind_of_device(
    kind: str, flops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = types.SimpleNamespace(device_kind=kind)
    monkeypatch.setattr(rates.jax, "devices", lambda: [device])
    peak = peak_rates()
    assert (peak.flops, peak.source) == (flops, "published")


def test_an_unknown_device_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rates.MATRIX, "cpu", 64)
    peak = peak_rates("float32")
    assert peak.source == "measured" and peak.flops > 0


def test_rates_are_work_over_the_fastest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.cumsum([0.0, 3.0, 1.0, 0.5, 1.0, 2.0, 1.0, 4.0, 1.0, 1.0] * 2))
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(clock))
    monkeypatch.setitem(rates.MATRIX, "cpu", 8)
    monkeypatch.setitem(rates.MOVED, "cpu", 16)
    assert measure_flops("float32") == 2 * 8**3 / 0.5
    assert measure_bandwidth() == 2 * 16 * 4 / 0.5
    assert jax.default_backend() == "cpu"
