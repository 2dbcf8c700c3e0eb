"""Compiling ahead of time: the report on devices at hand, and what a user can get wrong."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from colbert_jax import ahead
from colbert_jax.ahead import (
    accelerator_type,
    check_topology,
    choose_mesh,
    compile_ahead,
    find_advice,
    measure,
    model_config,
    program_memory,
    report_apart,
    report_json,
    report_table,
    slice_extents,
    smaller_steps,
    topology_devices,
    wanted_bytes,
)
from colbert_jax.colbert import ColbertConfig, DenseConfig
from colbert_jax.collectives import read_traffic
from colbert_jax.cost import CHIPS, step_traffic
from colbert_jax.errors import UserError
from colbert_jax.modernbert import ModernBertConfig
from colbert_jax.sharding import make_mesh
from colbert_jax.train import check_batch

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[1]
ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def config_of(name: str, **changes: Any) -> Any:
    import runpy

    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    config.update_from_flattened_dict(changes)
    return config


def tiny(exchange: str = "gather", **mesh: int) -> dict[str, Any]:
    """A step that compiles in a few seconds, as plain values."""
    config = json.loads(config_of("quickstart").to_json())
    config["mesh"] |= mesh
    config["input"]["batch_size"] = 16
    config["loss"]["exchange"] = exchange
    config["model"] |= {
        "vocab_size": 128,
        "query_length": 8,
        "document_length": 16,
        "embedding_size": 16,
        "dtype": "bfloat16",
        "encoder": ENCODER,
    }
    return config


def report_of(config: dict[str, Any]) -> ahead.Report:
    mesh = choose_mesh(config["mesh"], topology_devices("local"))
    return measure(config, model_config(config), mesh, "local")


# --- the report ---


@pytest.fixture(scope="module")
def gathered(quick_compilation: None) -> ahead.Report:
    return report_of(tiny())


def test_the_program_sends_what_shapes_foretell(gathered: ahead.Report) -> None:
    config = tiny()
    foretold = step_traffic(config, model_config(config), gathered.mesh)
    assert gathered.traffic is not None
    sent = gathered.traffic.bytes_by_kind()
    for kind, expected in foretold.items():
        # CPUs send bfloat16 as float32. Masks and metrics are the rest.
        expected *= 2 if kind == "all-gather" else 1
        assert expected <= sent[kind] <= 1.2 * expected, kind
    assert sent["all-to-all"] == 0


def test_a_ring_sends_what_shapes_foretell() -> None:
    config = tiny("ring", data=4)
    config["model"]["dtype"] = "float32"
    report = report_of(config)
    foretold = step_traffic(config, model_config(config), report.mesh)
    assert report.mesh == {"data": 4, "fsdp": 1, "tensor": 1}  # the first four of eight
    assert report.traffic is not None
    sent = report.traffic.bytes_by_kind()
    expected = foretold["collective-permute"]
    # The last handover of a loop is not needed, and XLA may leave it out.
    assert 0.8 * expected <= sent["collective-permute"] <= 1.2 * expected
    assert foretold["all-gather"] == 0 and sent["reduce-scatter"] == 0


def test_devices_of_unknown_speed_have_memory_flops_and_bytes_alone(
    gathered: ahead.Report,
) -> None:
    values = report_json(gathered)
    assert values["fits"] is True and values["chip"] is None and values["seconds"] is None
    assert values["memory_bytes"]["total"] > values["memory_bytes"]["arguments"] > 0
    assert values["hardware_flops"] > 0 and values["collective_bytes"]["all-reduce"] > 0
    table = report_table(gathered)
    assert any(line.split() == ["step", "at", "best", "-"] for line in table.splitlines())


def test_a_known_chip_gets_times(gathered: ahead.Report) -> None:
    chip = CHIPS["v5e"]
    seconds = ahead.roofline(gathered.work, {"all-reduce": 2e9}, chip, (2, 4))
    report = dataclasses.replace(gathered, chip=chip, seconds=seconds)
    values = report_json(report)
    assert values["seconds"]["network"] == pytest.approx(2e9 / 100e9)
    assert values["pairs_per_second"] == pytest.approx(16 / seconds.step)
    assert values["days_for_235m_pairs"] == pytest.approx(235e6 * seconds.step / 16 / 86400)
    assert f"{seconds.network:.3f} s" in report_table(report)


def test_compile_ahead_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    changes = {
        "input.batch_size": 16,
        "model.query_length": 8,
        "model.document_length": 16,
        "model.encoder.num_hidden_layers": 1,
        "mesh.data": 1,
    }
    assert compile_ahead(config_of("quickstart", **changes), "local", as_json=True) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["batch_size"] == 16 and not any(values["collective_bytes"].values())


# --- what does not fit ---


def test_what_does_not_fit_ends_with_status_1_and_advice(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    exhausted = jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (19.71G) exceeds available HBM (15.75G)."
    )

    class Lowered:
        def compile(self) -> None:
            raise exhausted

    step = SimpleNamespace(lower=lambda *_: Lowered())
    optimizer = ahead.build_step(tiny(), model_config(tiny()))[1]
    monkeypatch.setattr(ahead, "build_step", lambda *_, **__: (step, optimizer))
    status = compile_ahead(config_of("quickstart", **{"mesh.data": 2}), "local")
    output, said = capsys.readouterr().out, caplog.text
    assert status == 1 and "DOES NOT FIT" in output and "19.71 GiB" in output
    assert "needs 19.71 GiB" in said and "take more devices" in said


def test_a_program_larger_than_the_device_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    needs = report_of(config).memory
    assert needs is not None
    for capacity, fits in ((needs.total, True), (needs.total - 1, False)):
        monkeypatch.setattr(ahead, "device_memory", lambda _, size=capacity: size)
        report = report_of(config)
        assert report.fits is fits and report.capacity == capacity
    assert "DOES NOT FIT" in report_table(report)


def test_advice_is_the_first_change_that_was_seen_to_fit(gathered: ahead.Report) -> None:
    memory = ahead.Memory(19.71 * 2**30)
    report = dataclasses.replace(
        gathered, batch_size=512, memory=memory, capacity=16 * 2**30, fits=False
    )
    config = tiny()
    config["input"]["batch_size"] = 512
    config["model"]["micro_batch"] = 64
    seen: list[dict[str, Any]] = []

    def attempt(changed: dict[str, Any]) -> ahead.Report:
        seen.append(changed)
        fits = changed["mesh"]["fsdp"] == 8
        return dataclasses.replace(report, memory=ahead.Memory(8 * 2**30), fits=fits)

    sentence = find_advice(report, config, attempt)
    assert sentence == (
        "the step needs 19.71 GiB, of which a device has 16.00: --config.model.micro_batch=8 "
        "--config.mesh.data=1 --config.mesh.fsdp=8 fits (8.00 GiB)."
    )
    assert [c["model"]["micro_batch"] for c in seen] == [32, 16, 8, 8]
    assert config["model"]["micro_batch"] == 64  # what was asked for stays
    sentence = find_advice(report, config, lambda _: report)
    assert "--config.loss.exchange=ring did not fit either: take more devices" in sentence
    for changed in seen:
        check_batch(changed, make_mesh())


@pytest.mark.parametrize("micro_batch", [0, 16, 12])
def test_no_change_that_is_tried_is_one_that_would_be_refused(
    gathered: ahead.Report, micro_batch: int
) -> None:
    config = tiny()
    config["input"] |= {"batch_size": 96, "max_documents": 3}  # 12 queries a device
    config["model"]["micro_batch"] = micro_batch
    check_batch(config, make_mesh())
    tried = list(smaller_steps(dataclasses.replace(gathered, batch_size=96), config))
    sizes = [changes["model.micro_batch"] for changes in tried]
    assert sizes[:2] == [6, 3]
    for size in sizes:
        config["model"]["micro_batch"] = size
        check_batch(config, make_mesh())


def test_a_compiler_that_ends_its_process_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "report_here", _abort)
    with pytest.raises(UserError, match="v5e:4x4 ended before it was done"):
        report_apart({}, "v5e:4x4", False)


def _abort(*_: Any) -> None:
    """As libtpu does."""
    os.abort()


def test_a_process_of_its_own_reports_and_refuses_as_this_one_does() -> None:
    changes = {
        "input.batch_size": 16,
        "model.query_length": 8,
        "model.document_length": 16,
        "model.encoder.num_hidden_layers": 1,
    }
    config = json.loads(config_of("quickstart", **changes).to_json())
    report = report_apart(config, "local", False)
    assert report.fits and report.capacity is not None and report.capacity > 2**28
    assert report.traffic is not None and report.traffic.bytes > 0  # it has 8 devices too
    config["mesh"]["data"] = 3
    config["mesh"]["fsdp"] = 5
    with pytest.raises(UserError, match="does not fit 8 device"):
        report_apart(config, "local", False)


def test_what_xla_says_that_it_needs() -> None:
    used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
    assert wanted_bytes(used) == 20.5 * 2**30
    assert wanted_bytes("RESOURCE_EXHAUSTED") is None


def test_other_failures_of_xla_are_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: oh")

    lowered = SimpleNamespace(compile=fail)
    optimizer = ahead.build_step(tiny(), model_config(tiny()))[1]
    step = SimpleNamespace(lower=lambda *_: lowered)
    monkeypatch.setattr(ahead, "build_step", lambda *_, **__: (step, optimizer))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        report_of(tiny())


# --- models ---


def test_models_of_the_hub_need_no_download() -> None:
    config = json.loads(config_of("pretrain").to_json())
    assert model_config(config) == ColbertConfig(ModernBertConfig(), (DenseConfig(768),))
    config["init_from"] = "answerdotai/ModernBERT-large"
    large = model_config(config)
    assert large.encoder.num_hidden_layers == 28 and large.projection[0].in_features == 1024
    assert large.encoder.head_size == 64


def test_a_new_model_has_the_configs_encoder() -> None:
    model = model_config(tiny())
    assert model.encoder.vocab_size == 128 and model.embedding_size == 16


@pytest.mark.parametrize(
    ("init_from", "said"),
    [
        ("runs/pretrain", r"--config\.init_from=answerdotai/ModernBERT-base"),
        ("", "name a run, a folder or a hub model"),
    ],
)
def test_a_start_that_is_not_there(
    init_from: str, said: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    config = json.loads(config_of("supervised").to_json()) | {"init_from": init_from}
    with pytest.raises(UserError, match=said):
        model_config(config)


def test_heads_that_do_not_divide_are_refused_before_anything_is_compiled() -> None:
    config = tiny()
    config["model"]["encoder"] = ENCODER | {"num_attention_heads": 3}
    with pytest.raises(UserError, match="does not split into 3 heads"):
        model_config(config)


# --- topologies ---


@pytest.mark.parametrize(
    ("topology", "extents"),
    [
        ("v5e:4x4", (4, 4)),
        ("v6e:16x16", (16, 16)),
        ("v5p:2x2x1", (2, 2, 1)),
        ("v4:4x4x8", (4, 4, 8)),
    ],
)
def test_topologies(topology: str, extents: tuple[int, ...]) -> None:
    chip, found = check_topology(topology)
    assert found == extents and topology.startswith(chip.name)


@pytest.mark.parametrize(
    ("topology", "nearest"),
    [
        ("v5x:2x2", "v5"),
        ("tpu", "v5e:4x4"),
        ("v5e", "v5e:2x2"),
        ("v5e:3x3", "v5e:2x4"),
        ("v5e:32x32", "v5e:16x16"),
        ("v5e:2x2x2", "v5e:2x4"),
        ("v5p:4x4", "v5p:2x2x4"),
        ("v5p:3x2x2", "v5p:2x2x"),
        ("v5p:0x2x2", "v5p:2x2x1"),
        ("v5p:64x64x64", "v5p:8x8x16"),
        ("v5e:-2x2", "v5e:2x2"),
    ],
)
def test_unknown_topologies_name_the_nearest(topology: str, nearest: str) -> None:
    with pytest.raises(UserError, match=nearest) as error:
        check_topology(topology)
    assert "\n" not in str(error.value)


def test_a_missing_libtpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[tpu\]'"):
        topology_devices("v5e:2x2")


def test_slices_have_their_names_in_the_cloud() -> None:
    assert accelerator_type(CHIPS["v5e"], (4, 4)) == "v5litepod-16"
    assert accelerator_type(CHIPS["v6e"], (4, 4)) == "v6e-16"
    assert accelerator_type(CHIPS["v5p"], (2, 2, 2)) == "v5p-16"


def test_the_mesh_takes_the_first_devices_or_does_not_fit() -> None:
    devices = jax.devices()
    part = choose_mesh({"data": 1, "fsdp": 2, "tensor": 1}, devices)
    assert list(part.devices.flat) == devices[:2]
    assert choose_mesh({"data": -1, "fsdp": 2, "tensor": 1}, devices).shape["data"] == 4
    with pytest.raises(UserError, match="8 device"):
        choose_mesh({"data": 16, "fsdp": 1, "tensor": 1}, devices)


def test_a_slices_extents_are_those_of_its_chips() -> None:
    chips = [SimpleNamespace(coords=(x, y, 0)) for x in (2, 3) for y in range(4)]
    mesh: Any = SimpleNamespace(devices=SimpleNamespace(flat=chips))
    assert slice_extents(mesh, CHIPS["v5e"]) == (2, 4)


# --- the program ---


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "compile.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config=configs/pretrain.py"], "--topology is missing"),
        (["--config=configs/pretrain.py", "--topology=v5e:5x5"], "nearest is v5e:"),
        (
            ["--config=configs/quickstart.py", "--topology=local", "--config.mesh.data=3"],
            "1 device",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(arguments: list[str], said: str) -> None:
    result = program(*arguments)
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0] and "Traceback" not in result.stderr
    assert result.stdout == ""


TINY = (
    "--config=configs/quickstart.py",
    "--json",
    "--config.input.batch_size=64",
    "--config.model.dtype=bfloat16",
    "--config.model.micro_batch=8",
    "--config.model.query_length=16",
    "--config.model.document_length=64",
    "--config.model.vocab_size=512",
    "--config.model.encoder.hidden_size=128",
    "--config.model.encoder.num_attention_heads=2",
    "--config.model.encoder.intermediate_size=128",
    "--config.model.encoder.num_hidden_layers=1",
)
AS_SHIPPED = (
    "--config.model.lengths=2",
    "--config.model.scan_layers=True",
    "--config.model.encoder.num_hidden_layers=4",
)


@pytest.mark.parametrize(
    ("topology", "settings", "kinds"),
    [
        ("v5e:2x4", AS_SHIPPED, {"all-gather", "all-reduce"}),
        ("v6e:2x2", ["--config.loss.exchange=ring"], {"all-reduce", "collective-permute"}),
        (
            "v5p:2x2x2",
            ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"],
            {"all-gather", "all-reduce"},
        ),
    ],
)
def test_the_step_compiles_for_tpus_that_are_not_here(
    topology: str, settings: Sequence[str], kinds: set[str]
) -> None:
    result = program(*TINY, f"--topology={topology}", *settings)
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = result.stdout.splitlines()
    values = json.loads(line)
    assert values["fits"] is True and values["chip"] == topology.split(":")[0]
    assert values["memory_bytes"]["total"] < values["hbm_bytes"]
    assert values["seconds"]["step"] > 0 and values["pairs_per_second"] > 0
    sent = values["collective_bytes"]
    # XLA for TPU may scatter by an all-reduce of which each chip keeps its part, and lays some
    # parameters out anew where `tensor` splits them.
    kinds = kinds | {"reduce-scatter"}
    others = sum(size for kind, size in sent.items() if kind not in kinds)
    assert all(sent[kind] for kind in kinds - {"reduce-scatter"})
    assert others <= (0.02 * sum(sent.values()) if values["mesh"]["tensor"] > 1 else 0)


def test_memory_and_traffic_of_any_program() -> None:
    compiled = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((256,), "float32")).compile()
    memory = program_memory(compiled)
    assert memory is not None and memory.total >= 2 * 1024 and memory.arguments == 1024
    assert read_traffic(compiled.as_text()).bytes == 0
