"""Where a step's time goes: instructions to parts, self time, whole profiles, and wrong input."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.profiler import ProfileData
from ml_collections import ConfigDict
from test_cli import ROOT, config_of, one_line, program
from tiny_run import text_pairs, write_lines

from colbert_jax.colbert import ColbertConfig, DenseConfig
from colbert_jax.cost import encoder_flops, model_flops
from colbert_jax.errors import UserError
from colbert_jax.modernbert import ModernBertConfig
from colbert_jax.profile_step import (
    OTHER,
    PARTS,
    Ran,
    Span,
    compile_named,
    part_flops,
    part_of,
    profile_json,
    profile_step,
    program_parts,
    read_trace,
    self_times,
    time_by_part,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

HLO = """\
HloModule jit_train_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused_computation.1 (param_0: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0} parameter(0)
  %exp.1 = f32[8]{0} exponential(%param_0), metadata={op_name="jit(train_step)/jvp(mlp)/exp"}
  %neg.1 = f32[8]{0} negate(%exp.1), metadata={op_name="jit(train_step)/jvp(mlp)/neg"}
  ROOT %add.1 = f32[8]{0} add(%neg.1, %neg.1), metadata={op_name="jit(train_step)/loss/add"}
}

%fused_computation.2 (param_1: f32[8]) -> f32[8] {
  %param_1 = f32[8]{0} parameter(0)
  ROOT %abs.1 = f32[8]{0} abs(%param_1), metadata={op_name="jit(train_step)/abs"}
}

ENTRY %main.9 (state.1: f32[8]) -> f32[8] {
  %state.1 = f32[8]{0} parameter(0), metadata={op_name="state.params[\\'mlp\\'][\\'wi\\']"}
  %fusion.1 = f32[8]{0} fusion(%state.1), kind=kLoop, calls=%fused_computation.1
  %fusion.2 = f32[8]{0} fusion(%fusion.1), kind=kLoop, calls=%fused_computation.2
  %loop-fusion.3 = f32[8]{0} fusion(%fusion.2), kind=kLoop, calls=%fused_computation.1, \
metadata={op_name="jit(train_step)/transpose(jvp(attention_local))/dot_general" stack_frame_id=3}
  ROOT %dot.4 = f32[8]{0} copy(%loop-fusion.3), metadata={op_name="jit(train_step)/optimizer/mul"}
}
"""


# --- the program ---


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        ("jit(train_step)/transpose(jvp(mlp))/dot_general", "mlp"),
        ("jit(train_step)/jvp()/while/body/closed_call/attention_global/exp", "attention_global"),
        ("jit(train_step)/jvp(maxsim)/jit(_where)/select_n", "maxsim"),
        ("jit(train_step)/loss/jvp(projection)/mul", "projection"),  # the innermost
        ("jit(train_step)/jvp(mlp_norm)/mul", None),
        ("state.params['model']['encoder']['layers'][0]['mlp']['wi']", None),  # a parameter's name
        ("", None),
    ],
)
def test_an_instruction_is_of_the_last_scope_that_it_was_traced_in(
    op_name: str, part: str | None
) -> None:
    assert part_of(op_name) == part


def test_each_instruction_of_a_program_has_a_part() -> None:
    parts = program_parts(HLO)
    assert parts["loop_fusion_3"] == "attention_local"  # its own name goes before what it holds
    assert parts["fusion_1"] == "mlp"  # has none: what most of it is
    assert parts["fusion_2"] == OTHER  # nor has what it holds
    assert parts["state_1"] == OTHER
    assert parts["dot_4"] == "optimizer" and parts["add_1"] == "loss"


def test_a_cached_program_does_not_bring_back_the_scopes_of_an_earlier_one() -> None:
    def text(scope: str, compile_: Any) -> str:
        def train_step(state: jax.Array, batch: jax.Array) -> jax.Array:
            with jax.named_scope(scope):
                return jnp.sin(state) @ batch

        return compile_(jax.jit(train_step), jnp.ones((3, 5)), jnp.ones((5, 7))).as_text()

    def as_jax_does(step: Any, *args: Any) -> jax.stages.Compiled:
        return step.lower(*args).compile()

    smallest = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, smallest)
    jax.config.update(smallest, 0)
    compilation_cache.reset_cache()
    try:
        assert "/mlp/" in text("mlp", as_jax_does)
        assert "/loss/" not in text("loss", as_jax_does)  # what this is about
        assert "/loss/" in text("loss", compile_named)
        assert not jax.config.jax_compilation_cache_include_metadata_in_key  # type: ignore
    finally:
        jax.config.update(smallest, before)
        compilation_cache.reset_cache()


# --- the trace ---


def own_times(line: Sequence[Span]) -> dict[str, float]:
    return {span.part: own for span, own, _ in self_times(line)}


def test_what_is_inside_another_span_is_not_counted_for_it() -> None:
    line = [
        Span(30, 60, "fusion"),
        Span(0, 100, "while"),
        Span(10, 90, "body"),
        Span(60, 80, "call"),  # right after its sibling
        Span(65, 70, "dot"),
        Span(120, 150, "after"),
    ]
    expected = {"while": 20, "body": 30, "fusion": 30, "call": 15, "dot": 5, "after": 30}
    assert own_times(line) == expected
    around = {span.part: outer and outer.part for span, _, outer in self_times(line)}
    assert around["dot"] == "call" and around["fusion"] == "body"
    assert around["while"] is None and around["after"] is None


def test_spans_that_overlap_take_together_what_the_line_takes() -> None:
    own = own_times([Span(0, 10, "a"), Span(8, 15, "b"), Span(9, 20, "c")])
    assert own == {"a": 8, "b": 1, "c": 11}


def test_a_pools_tasks_count_for_the_instruction_that_queued_them() -> None:
    one, two, three, starter = (("pool", number) for number in range(4))
    first = [
        Span(0, 10, "mlp"),
        Span(2, 2, queues=one),
        Span(20, 30, "maxsim"),
        Span(25, 25, queues=three),
        Span(40, 40, queues=starter),  # outside of all instructions
    ]
    second = [
        Span(5, 105, runs=one),
        Span(10, 20, "loss"),  # an instruction that the task runs
        Span(50, 50, queues=two),
        Span(200, 207, runs=two),  # queued by a task
        Span(300, 303, runs=three),
        Span(400, 500, runs=starter),
    ]
    expected = {"mlp": 10 + 90 + 7, "loss": 10, "maxsim": 10 + 3}
    assert time_by_part([first, second]) == expected
    assert time_by_part([second, first]) == expected


def write_trace(path: Path, planes: dict[str, dict[str, list[tuple]]]) -> Path:
    """A trace by hand: events `(name, start, end, stats)` in ns, by plane and line."""
    text = ""
    for plane, lines in planes.items():
        names: list[str] = []
        stat_names: list[str] = []
        text += f"planes {{ name: '{plane}' "
        for line, events in lines.items():
            text += f"lines {{ name: '{line}' "
            for name, start, end, *stats in events:
                names.append(name)
                text += f"events {{ metadata_id: {len(names)} offset_ps: {1000 * start} "
                text += f"duration_ps: {1000 * (end - start)} "
                for key, value in (stats[0] if stats else {}).items():
                    stat_names.append(key)
                    text += f"stats {{ metadata_id: {len(stat_names)} str_value: '{value}' }} "
                text += "} "
            text += "} "
        for field, found in (("event_metadata", names), ("stat_metadata", stat_names)):
            for number, name in enumerate(found, start=1):
                text += f"{field} {{ key: {number} value {{ id: {number} name: '{name}' }} }} "
        text += "} "
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    return path


def test_a_tpus_cores_are_read_from_their_instructions_alone(tmp_path: Path) -> None:
    ops = [
        ("%while.7 = (f32[8]) while(...)", 0, 100),
        ("%fusion.1 = f32[8]{0} fusion(f32[8] %state.1), kind=kLoop", 10, 40),
        ("%loop-fusion.3 = f32[8]{0} fusion(f32[8] %fusion.2)", 40, 90),
        ("%never-seen.5 = f32[8]{0} copy(...)", 100, 110),
    ]
    core = {
        "XLA Modules": [("jit_train_step(1)", 0, 110)],
        "XLA Ops": ops,
        "Async XLA Ops": [("%fusion.1 = ...", 0, 110)],
    }
    planes = {
        "/device:TPU:0": core,
        "/device:TPU:1": core,
        "/device:TPU:0 SparseCore 0": core,
        "/host:CPU": {"python": [("fusion.1", 0, 999, {"hlo_op": "fusion.1"})]},
    }
    times, devices = read_trace(write_trace(tmp_path / "t.xplane.pb", planes), HLO)
    assert devices == 2
    assert times == {"mlp": 60, "attention_local": 100, OTHER: 2 * (20 + 10)}


def test_a_gpus_kernels_are_named_after_instructions_or_say_whose_they_are(tmp_path: Path) -> None:
    stream = [
        ("loop_fusion_3", 0, 10),
        ("nvjet_sm90_gemm", 10, 17, {"hlo_op": "dot.4"}),
        ("MemcpyD2D", 20, 24),
    ]
    plane = {"Stream #7(Compute)": stream, "XLA Ops summary": [("fusion.1", 0, 24)]}
    times, devices = read_trace(
        write_trace(tmp_path / "t.xplane.pb", {"/device:GPU:0": plane}), HLO
    )
    assert devices == 1
    assert times == {"attention_local": 10, "optimizer": 7, OTHER: 4}


def test_a_cpus_threads_are_read_with_their_pools_tasks(tmp_path: Path) -> None:
    def op(name: str, start: int, end: int, module: str = "jit_train_step") -> tuple:
        return name, start, end, {"hlo_op": name, "hlo_module": module}

    pool = "ThreadpoolListener::"
    one, two = ({"_pt": "15", "_p": "1"}, {"_ct": "15", "_c": "1"})
    inner = {"_ct": "15", "_c": "2"}
    first = [
        ("ThunkExecutor::Execute", 0, 60),  # no instruction
        op("fusion.1", 0, 10),
        (pool + "Record", 5, 5, one),
        ("end: fusion.1", 12, 13),
        op("dot.4", 20, 26),
        op("dot.4", 30, 37, module="jit_another"),
        op("never-seen", 40, 41),
    ]
    second = [
        (pool + "StartRegion", 6, 6, two),
        (pool + "StartRegion", 8, 8, inner),  # while it waits; nobody is known to have queued it
        (pool + "StopRegion", 10, 10),
        (pool + "StopRegion", 16, 16),
    ]
    planes = {"/host:CPU": {"a": first, "b": second}, "/host:metadata": {}}
    times, devices = read_trace(write_trace(tmp_path / "t.xplane.pb", planes), HLO)
    assert devices == 0
    assert times == {"mlp": 10 + 8, "optimizer": 6, OTHER: 7 + 1}


def test_a_trace_without_the_step_is_the_users_error(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.xplane.pb", {"/device:GPU:0": {"Stream #1": []}})
    with pytest.raises(UserError, match=r"t\.xplane\.pb holds nothing of the step"):
        read_trace(trace, HLO)


# --- whole profiles ---


@pytest.fixture(scope="module")
def changes(real_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What makes quickstart a tiny step, as overrides: a global layer and a local one."""
    folder = tmp_path_factory.mktemp("rows")
    rows = write_lines(folder / "rows.jsonl", text_pairs(real_texts, 48))
    return {
        "compilation_cache": "",
        "input.files": (str(rows),),
        "input.cache_dir": str(folder / "cache"),
        "input.batch_size": 8,
        "input.threads": 1,
        "model.query_length": 12,
        "model.document_length": 20,
        "model.vocab_size": 600,
        "model.embedding_size": 16,
        "model.encoder.num_hidden_layers": 2,
        "model.encoder.hidden_size": 32,
        "model.encoder.intermediate_size": 48,
    }


@pytest.fixture
def config(changes: dict[str, Any]) -> ConfigDict:
    config = config_of("quickstart")
    config.update_from_flattened_dict(changes)
    return config


def assert_positive(seconds: Mapping[str, float]) -> None:
    """Even in a tiny step these take time."""
    for part in ("attention_global", "attention_local", "mlp", "maxsim", "optimizer"):
        assert seconds[part] > 0, part


def test_the_program_shows_every_part_and_keeps_the_trace(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    file = f"--config={ROOT / 'configs' / 'quickstart.py'}"
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    result = program("profile_step.py", file, *overrides, "--steps=2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line}
    figures = {part: float(rows[part][0].replace(",", "")) for part in (*PARTS, OTHER)}
    assert_positive(figures)
    traced = float(rows["traced"][0].replace(",", ""))
    assert traced == pytest.approx(sum(figures.values()), abs=0.01 * len(figures))
    shares = [float(rows[part][1].rstrip("%")) for part in figures]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    assert float(rows["wall"][0].replace(",", "")) > float(rows["input"][1].replace(",", "")) > 0
    assert "2 step(s) on 1 cpu device(s)" in result.stdout and "thread-ms/step" in result.stdout
    # By default in a folder of the config's name; nothing else is left behind.
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    folder = Path("runs/profile/quickstart")
    assert [path.name for path in (tmp_path / folder).iterdir()] == ["plugins"]
    assert (tmp_path / rows["Trace:"][0]).is_file() and f"--logdir={folder}" in result.stdout


def test_a_profile_of_several_devices_is_one_object_and_leaves_its_folder_as_it_was(
    config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    earlier = write_trace(tmp_path / "earlier.xplane.pb", {"/host:CPU": {}})
    capsys.readouterr()
    profile = profile_step(config, 1, tmp_path, as_json=True)
    values = json.loads(capsys.readouterr().out)
    assert values == profile_json(profile)
    assert values["devices"] == 8 and values["seconds_are"] == "thread-seconds"
    assert_positive(values["seconds"])
    assert sum(values["shares"].values()) == pytest.approx(1)
    assert values["flops_per_second"]["encoder"] > 0 and values["flops_per_second"]["maxsim"] > 0
    assert Path(values["trace"]).is_file() and values["trace"] != str(earlier)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", earlier.name, "plugins"}


def test_the_parts_flops_are_those_of_the_step() -> None:
    encoder = ModernBertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    model = ColbertConfig(encoder, (DenseConfig(32, 16),))

    def ran(*lengths: int) -> Ran:
        """Steps of one query and its document, both of one length."""
        batches, metrics = [], []
        for length in lengths:
            mask = np.arange(24)[None] < length
            text = {"attention_mask": mask, "scoring_mask": mask}
            batches.append({"query": text, "document": jax.tree.map(lambda x: x[:, None], text)})
            count = model_flops(model, "contrastive", np.array([length]), np.array([[length]]))
            metrics.append({"model_flops": count})
        return Ran(None, {}, batches, metrics, 1.0, 0.0)  # type: ignore[arg-type]

    flops = part_flops(model, ran(12, 20))
    scores = [16 * n * (2 * n + 4) for n in (12, 20)]  # forward 2 S T D, backward 4 S D
    assert flops["maxsim"] == pytest.approx(sum(scores) / 2, rel=1e-3)
    assert flops["encoder"] == pytest.approx(
        3 * sum(2 * float(encoder_flops(model, np.array([n]))) for n in (12, 20)) / 2
    )


# --- wrong input ---


def test_no_steps_are_the_users_error(config: ConfigDict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--steps=0 leaves nothing to trace: give 1 or more\."):
        profile_step(config, 0, tmp_path)


def test_a_folder_that_cannot_be_written_is_the_users_error(
    config: ConfigDict, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/traces cannot be written \(Not a directory\)"):
        profile_step(config, 1, tmp_path / "file" / "traces")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps=2"], "--config is missing"),
        (["--config=configs/quickstart.py", "--steps=two"], "--steps=two"),
    ],
)
def test_the_program_ends_with_one_line_and_status_2(arguments: list[str], said: str) -> None:
    assert said in one_line(program("profile_step.py", *arguments))
