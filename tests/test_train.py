"""The training step and loop: what they learn, what they keep, what they log."""

import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from colbert_jax.checkpoint import Checkpoints
from colbert_jax.colbert import ColbertConfig, DenseConfig, init_params, make_embed
from colbert_jax.meter import Meter
from colbert_jax.metric_log import MetricLog, draw_curves, read_metrics
from colbert_jax.micro_batch import make_encode
from colbert_jax.modernbert import ModernBertConfig
from colbert_jax.not_finite import none_skipped
from colbert_jax.optimizer import build_optimizer
from colbert_jax.sharding import global_batch, make_mesh
from colbert_jax.train import Batch, make_loss_fn, make_train_step, train
from colbert_jax.train_state import TrainState, abstract_state, init_state, restore_state

BATCH, TOTAL_STEPS = 8, 40
MODEL = ColbertConfig(
    ModernBertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    ),
    (DenseConfig(32, 16),),
)
LOSS = {
    "temperature": 0.25,
    "normalize_scores": True,
    "masked_similarity": None,
    "exchange": "gather",
}
OPTIMIZER = {
    "learning_rate": 5e-3,
    "warmup_steps": 4,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "gradient_of": "mean",
}
MODEL_FLOPS, PEAK_FLOPS = 3e9, 1e12
TRAIN_METRICS = {
    *(
        f"train/{name}"
        for name in ("loss", "accuracy", "grad_norm", "learning_rate", "real_tokens", "mfu")
    ),
    "train/skipped",
    *("train/pairs_per_second", "train/tokens_per_second", "time/step", "time/data_wait"),
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    """Most of a tiny model's time goes to optimising its program, which is not at test here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tokens(rng: np.random.Generator, *shape: int) -> dict[str, np.ndarray]:
    attended = np.arange(shape[-1]) < rng.integers(4, shape[-1] + 1, shape[:-1])[..., None]
    ids = rng.integers(0, 64, shape, dtype=np.int32)
    return {"input_ids": ids, "attention_mask": attended, "scoring_mask": attended.copy()}


def one_batch(documents: int, scored: bool) -> Batch:
    rng = np.random.default_rng(0)
    batch: Batch = {"query": tokens(rng, BATCH, 8), "document": tokens(rng, BATCH, documents, 16)}
    if scored:
        batch["scores"] = rng.normal(size=(BATCH, documents)).astype(np.float32)
    return batch


class Repeat:
    """The same batch for ever."""

    def __init__(self, batch: Batch):
        self.batch, self.count = batch, 0

    def __next__(self) -> Batch:
        self.count += 1
        return self.batch

    def get_state(self) -> dict:
        return {"next_index": self.count}

    def origin(self, index: int) -> tuple[str, list[int]]:
        return "repeated", [index]


@dataclasses.dataclass
class Trained:
    workdir: Path
    step: Callable[[TrainState, Batch], Any]
    first: TrainState
    last: TrainState
    like: TrainState
    asked: list[int]
    input: Repeat
    compilations: int

    def rows(self) -> list[dict[str, float]]:
        return read_metrics(self.workdir)


_COMPILED: list[str] = []


def _compiled(event: str, seconds: float, **facts: Any) -> None:
    if event.endswith("backend_compile_duration"):
        _COMPILED.append(str(facts))


jax.monitoring.register_event_duration_secs_listener(_compiled)


def overfit(workdir: Path, batch: Batch, dtype: str = "float32", **loss: Any) -> Trained:
    """The whole loop on one batch."""
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(devices=jax.devices()[:1])
    learn = loss.pop("learn_temperature", False)
    optimizer, schedule = build_optimizer(OPTIMIZER, total_steps=TOTAL_STEPS, batch_size=BATCH)
    encode = make_encode(make_embed(MODEL, dtype))
    loss_fn = make_loss_fn(LOSS | loss, encode, encode)
    flops = jnp.float32(MODEL_FLOPS)
    step = make_train_step(loss_fn, optimizer, schedule, lambda batch: flops, max_skipped=3)
    like = abstract_state(MODEL, optimizer, mesh, learn)
    extra = {"log_temperature": jnp.log(jnp.float32(LOSS["temperature"]))} if learn else {}
    input_ = Repeat(batch)
    asked: list[int] = []
    _COMPILED.clear()
    checkpoints = Checkpoints(workdir, every_steps=15, max_to_keep=5)
    log = MetricLog(workdir)
    with jax.set_mesh(mesh):
        make = lambda: {"model": init_params(MODEL, 0), "loss": extra}  # noqa: E731
        first = init_state(make, optimizer, like)
        copy = jax.tree.map(np.array, first)
        last = train(
            first,
            step,
            input_,
            {"total_steps": TOTAL_STEPS},
            mesh=mesh,
            meter=Meter(log, 10, PEAK_FLOPS),
            checkpoints=checkpoints,
            evaluate=lambda at, params: asked.append(at),
        )
    # The state handed over is gone: its memory was given to the next one.
    assert all(x.is_deleted() for x in jax.tree.leaves(first.params))
    assert all(x.is_deleted() for x in jax.tree.leaves(first.opt_state) if x.ndim)
    checkpoints.close()
    log.close()
    compilations = sum("train_step" in facts for facts in _COMPILED)
    return Trained(workdir, step, copy, last, like, asked, input_, compilations)


@pytest.fixture(scope="module")
def contrastive(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return overfit(
        tmp_path_factory.mktemp("contrastive") / "run", one_batch(2, False), kind="contrastive"
    )


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return overfit(
        tmp_path_factory.mktemp("distilled") / "run",
        one_batch(4, True),
        kind="distillation",
        normalize_scores=False,  # or a teacher's scores could not be matched exactly
        dtype="bfloat16",
    )


@pytest.fixture(scope="module")
def tempered(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return overfit(
        tmp_path_factory.mktemp("tempered") / "run",
        one_batch(1, False),
        kind="contrastive",
        dtype="bfloat16",
        learn_temperature=True,
    )


# --- learning ---


def test_contrastive_training_learns_one_batch(contrastive: Trained) -> None:
    losses = [row["train/loss"] for row in contrastive.rows()]
    assert losses[-1] < 0.5 * losses[0] and losses[-1] < 0.6
    assert contrastive.rows()[-1]["train/accuracy"] == 1.0


def test_distillation_learns_one_batch(distilled: Trained) -> None:
    losses = [row["train/loss"] for row in distilled.rows()]
    assert losses[-1] < 0.5 * losses[0]
    assert distilled.rows()[-1]["train/accuracy"] >= 0.75


def test_a_learned_temperature_moves_and_is_logged_and_saved(tempered: Trained) -> None:
    rows = tempered.rows()
    learned = float(jnp.exp(tempered.last.params["loss"]["log_temperature"]))
    assert rows[-1]["train/temperature"] != rows[0]["train/temperature"]
    assert 0 < learned < 0.25 - 1e-3  # this batch is easily told apart: sharper is better
    checkpoints = Checkpoints(tempered.workdir)
    restored, _ = restore_state(checkpoints, tempered.like)
    checkpoints.close()
    assert float(jnp.exp(restored.params["loss"]["log_temperature"])) == learned


def test_a_fixed_temperature_is_no_parameter(contrastive: Trained) -> None:
    assert contrastive.last.params["loss"] == {}
    assert "train/temperature" not in contrastive.rows()[-1]


def test_every_parameter_is_trained(contrastive: Trained) -> None:
    before, after = contrastive.first.params, contrastive.last.params
    moved = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), before, after)
    assert all(jax.tree.leaves(moved)), moved


# --- the state ---


def test_the_state_stays_float32_under_bfloat16_arithmetic(distilled: Trained) -> None:
    for x in jax.tree.leaves((distilled.last.params, distilled.last.opt_state)):
        assert x.dtype == (jnp.float32 if x.ndim else x.dtype) and x.dtype != jnp.bfloat16
    floats = [x for x in jax.tree.leaves(distilled.last.opt_state) if x.ndim]
    assert len(floats) == 2 * len(jax.tree.leaves(distilled.last.params))
    assert distilled.last.step.dtype == jnp.int32 and int(distilled.last.step) == TOTAL_STEPS


def test_bfloat16_is_what_the_encoder_computes_in() -> None:
    params, ids = init_params(MODEL, 0), np.zeros((1, 8), np.int32)
    traced = {
        dtype: str(jax.make_jaxpr(make_embed(MODEL, dtype))(params, ids, ids == 0))
        for dtype in ("float32", "bfloat16")
    }
    assert "bf16" in traced["bfloat16"] and "bf16" not in traced["float32"]


@pytest.mark.parametrize("run", ["contrastive", "distilled", "tempered"])
def test_a_step_is_compiled_once_for_one_shape(run: str, request: pytest.FixtureRequest) -> None:
    assert request.getfixturevalue(run).compilations == 1


def test_the_loss_is_that_of_the_parameters_before_the_update(contrastive: Trained) -> None:
    mesh = make_mesh(devices=jax.devices()[:1])
    batch = global_batch(contrastive.input.batch, mesh)
    with jax.set_mesh(mesh):
        state = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), contrastive.first, contrastive.like
        )
        encode = make_encode(make_embed(MODEL))
        loss_fn = make_loss_fn(LOSS | {"kind": "contrastive"}, encode, encode)
        value_and_grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
        (loss, metrics), grads = value_and_grad(state.params, batch)
        after, logged = contrastive.step(state, batch)
    norm = np.sqrt(sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(float(logged["loss"]), float(loss), rtol=1e-5)
    np.testing.assert_allclose(float(logged["grad_norm"]), norm, rtol=1e-4)  # before clipping
    assert float(logged["learning_rate"]) == 0.0 and int(after.step) == 1  # warm-up starts at 0
    real = sum(
        int(contrastive.input.batch[side]["attention_mask"].sum()) for side in ("query", "document")
    )
    assert float(logged["tokens"]) == float(metrics["tokens"]) == real


# --- the loop ---


def test_the_log_has_every_metric_at_every_tenth_step(contrastive: Trained) -> None:
    rows = contrastive.rows()
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    for row in rows:
        assert TRAIN_METRICS | {"step"} == set(row)
        assert all(np.isfinite(value) for value in row.values())
        assert row["time/step"] > row["time/data_wait"] >= 0
        np.testing.assert_allclose(row["train/pairs_per_second"], BATCH / row["time/step"])
        assert row["train/tokens_per_second"] > row["train/pairs_per_second"]
        np.testing.assert_allclose(
            row["train/mfu"], MODEL_FLOPS / row["time/step"] / PEAK_FLOPS, rtol=1e-5
        )
    # The rate is that of the update before the row's step: linear to 0 at the end.
    rate = OPTIMIZER["learning_rate"] * (TOTAL_STEPS - 39) / (TOTAL_STEPS - 4)
    np.testing.assert_allclose(rows[-1]["train/learning_rate"], rate, rtol=1e-4)


def test_evaluation_is_offered_every_step_and_input_is_taken_once_a_step(
    contrastive: Trained,
) -> None:
    assert contrastive.asked == list(range(1, TOTAL_STEPS + 1))
    assert contrastive.input.count == TOTAL_STEPS


def test_checkpoints_are_saved_when_due_and_at_the_end(contrastive: Trained) -> None:
    saved = sorted(int(p.name) for p in (contrastive.workdir / "checkpoints").iterdir())
    assert saved == [15, 30, 40]
    checkpoints = Checkpoints(contrastive.workdir)
    state, input_state = restore_state(checkpoints, contrastive.like)
    checkpoints.close()
    assert input_state == {"next_index": TOTAL_STEPS}
    ours, theirs = jax.tree.leaves(state), jax.tree.leaves(contrastive.last)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def run_loop(
    workdir: Path,
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]],
    batches: Repeat | None = None,
    *,
    total_steps: int,
    log_every_steps: int = 0,
    **settings: Any,
) -> None:
    """The loop around a step that trains nothing; other settings are `train`'s."""
    log = MetricLog(workdir)
    quiet = {"checkpoints": NoCheckpoints(), "evaluate": lambda step, params: None}
    train(
        TrainState(jnp.int32(0), {"model": {}, "loss": {}}, {}, none_skipped()),
        step,
        batches or Repeat({"x": np.zeros((8, 1), np.float32)}),
        {"total_steps": total_steps},
        mesh=make_mesh(),
        meter=Meter(log, log_every_steps, PEAK_FLOPS),
        **quiet | settings,
    )
    log.close()


@pytest.mark.parametrize("every, steps", [(0, [5]), (1, [1, 2, 3, 4, 5]), (3, [3, 5])])
def test_the_last_step_is_always_logged(tmp_path: Path, every: int, steps: list[int]) -> None:
    metrics = step_metrics()

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        return dataclasses.replace(state, step=state.step + 1), metrics

    run_loop(tmp_path, step, total_steps=5, log_every_steps=every)
    assert [row["step"] for row in read_metrics(tmp_path)] == steps


def test_python_collects_no_garbage_while_a_step_is_made_but_afterwards(tmp_path: Path) -> None:
    seen: list[bool] = []
    metrics = step_metrics()

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        seen.append(gc.isenabled())
        return dataclasses.replace(state, step=state.step + 1), metrics

    run_loop(
        tmp_path, step, total_steps=1, evaluate=lambda step, params: seen.append(gc.isenabled())
    )
    assert seen == [False, True]


def test_the_next_batch_is_sent_while_the_devices_are_at_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    batches = Repeat({"x": np.zeros((8, 1), np.float32)})
    metrics = step_metrics()

    def place(batch: Batch, mesh: Any) -> Batch:
        events.append(f"send {batches.count}")
        return global_batch(batch, mesh)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        events.append("step")
        return dataclasses.replace(state, step=state.step + 1), metrics

    def fetch(tree: Any) -> Any:
        events.append("fetch")  # waits for the step to end
        return jax.tree.map(np.asarray, tree)

    class Noted(NoCheckpoints):
        def due(self, step: int) -> bool:
            return step == 2

        def save(self, step: int, **state: Any) -> None:
            events.append(f"save {step} at {state['input_state']['next_index']}")

    monkeypatch.setattr("colbert_jax.train.global_batch", place)
    monkeypatch.setattr("colbert_jax.meter.jax.device_get", fetch)
    run_loop(tmp_path, step, batches, total_steps=3, log_every_steps=1, checkpoints=Noted())
    assert events == [
        *("send 1", "step", "send 2", "fetch"),
        *("step", "send 3", "fetch", "save 2 at 2"),
        *("step", "fetch", "save 3 at 3"),
    ]


def step_metrics() -> dict[str, Any]:
    ones = ("loss", "accuracy", "tokens", "model_flops", "grad_norm")
    zeros = ("skipped", "skipped_in_row", "stop")
    return {n: jnp.float32(1) for n in ones} | {n: jnp.float32(0) for n in zeros}


class NoCheckpoints(Checkpoints):
    def __init__(self) -> None:
        pass

    def due(self, step: int) -> bool:
        return False

    def save(self, step: int, **state: Any) -> None:
        pass

    def wait(self) -> None:
        pass


# --- the log ---


def test_resuming_drops_what_was_logged_after_and_a_line_cut_short(tmp_path: Path) -> None:
    log = MetricLog(tmp_path)
    for step in (0, 10, 20, 30):
        log.write(step, {"train/loss": 1.0 / (step + 1)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "train/lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 10, 20, 30]
    log = MetricLog(tmp_path, resume_step=20)
    log.write(30, {"train/loss": 0.5})
    log.close()
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 10, 20, 30]
    assert lines[2]["train/loss"] == 1 / 21 and lines[3]["train/loss"] == 0.5


def test_a_fresh_log_forgets_a_run_that_left_no_checkpoint(tmp_path: Path) -> None:
    log = MetricLog(tmp_path)
    log.write(0, {"eval/held_out/nDCG@10": 0.1})
    log.close()
    MetricLog(tmp_path).close()
    assert read_metrics(tmp_path) == []


def test_curves_are_drawn(contrastive: Trained, tmp_path: Path) -> None:
    assert draw_curves(tmp_path) is None
    path = draw_curves(contrastive.workdir)
    assert path == contrastive.workdir / "curves.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_curves_show_evaluations_too(tmp_path: Path) -> None:
    log = MetricLog(tmp_path)
    log.write(0, {"eval/a/nDCG@10": 0.1, "eval/b/nDCG@10": 0.2})
    log.close()
    assert draw_curves(tmp_path) is not None


def test_tensorboard_events_are_written_without_tensorflow(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from colbert_jax.metric_log import MetricLog\n"
        "import colbert_jax.run\n"
        "log = MetricLog(sys.argv[1])\n"
        "log.write(3, {'train/loss': 0.25})\n"
        "log.close()\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=120)
    files = list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert len(files) == 1 and b"train/loss" in files[0].read_bytes()
