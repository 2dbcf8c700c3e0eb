"""A loss or gradient that is not finite costs its step; many in a row stop a run and are kept."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_run import text_pairs, tiny_config, write_lines

from colbert_jax import huggingface, not_finite
from colbert_jax import replay as replay_module
from colbert_jax.errors import UserError, printable
from colbert_jax.metric_log import read_metrics
from colbert_jax.not_finite import NotFinite, Watch, keep_steps, none_skipped, read_batch
from colbert_jax.optimizer import build_optimizer
from colbert_jax.replay import replay
from colbert_jax.run import run
from colbert_jax.tokenization import ColbertTokenizer
from colbert_jax.train import make_train_step
from colbert_jax.train_state import TrainState

ROOT = Path(__file__).parents[1]
MOST = 3

pytestmark = pytest.mark.usefixtures("quick_compilation")
OPTIMIZER = {
    "learning_rate": 0.1,
    "warmup_steps": 4,
    "b1": 0.9,
    "b2": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "gradient_of": "mean",
}


# --- one step ---


def toy_loss(params: Any, batch: dict[str, Any]) -> Any:
    """Finite or not as the batch has it: `x` is in the loss, of `root` 0 has an infinite slope."""
    weight = params["model"]
    loss = jnp.sum((weight - batch["x"]) ** 2) + jnp.sqrt(weight[0] * batch["root"])
    return loss, {"loss": loss}


GOOD = {"x": jnp.float32(0.5), "root": jnp.float32(1)}
OTHER = {"x": jnp.float32(-0.25), "root": jnp.float32(4)}
NOT_FINITE = {
    "a loss that is no number": GOOD | {"x": jnp.float32(np.nan)},
    "an infinite loss": GOOD | {"x": jnp.float32(np.inf)},
    "an infinite gradient of a finite loss": GOOD | {"root": jnp.float32(0)},
    "a gradient whose norm overflows": GOOD | {"x": jnp.float32(1e19)},
}


@pytest.fixture(scope="module")
def toy() -> Any:
    optimizer, schedule = build_optimizer(OPTIMIZER, total_steps=20, batch_size=1)
    step = make_train_step(toy_loss, optimizer, schedule, lambda batch: jnp.float32(0), MOST)

    def start() -> TrainState:
        params = {"model": jnp.asarray([1.0, 2.0, 3.0]), "loss": {}}
        return TrainState(jnp.int32(0), params, optimizer.init(params), none_skipped())

    return start, step


def after(toy: Any, batches: list[dict[str, Any]]) -> tuple[TrainState, list[dict[str, Any]]]:
    start, step = toy
    state, logged = start(), []
    for batch in batches:
        state, metrics = step(state, batch)
        logged.append({name: np.asarray(x).item() for name, x in metrics.items()})
    return jax.device_get(state), logged


def assert_same_model(one: TrainState, other: TrainState) -> None:
    for a, b in zip(
        jax.tree.leaves((one.params, one.opt_state)),
        jax.tree.leaves((other.params, other.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("what", NOT_FINITE)
def test_a_step_that_is_not_finite_leaves_the_model_as_if_its_batch_had_not_come(
    what: str, toy: Any
) -> None:
    with_it, logged = after(toy, [GOOD, NOT_FINITE[what], OTHER, GOOD])
    without, expected = after(toy, [GOOD, OTHER, GOOD])
    assert_same_model(with_it, without)
    assert (with_it.step, without.step) == (4, 3)
    assert (with_it.skipped.in_all, with_it.skipped.in_row) == (1, 0)
    assert [m["skipped"] for m in logged] == [0, 1, 1, 1]
    # The learning rate that is logged is the one that was used: it waits too.
    used = [m["learning_rate"] for m in logged]
    assert [used[0], *used[2:]] == [m["learning_rate"] for m in expected]
    assert len({*used[2:], used[0]}) == 3


@pytest.mark.parametrize("what", NOT_FINITE)
def test_both_the_loss_and_the_gradient_are_looked_at(what: str, toy: Any) -> None:
    _, (metrics,) = after(toy, [NOT_FINITE[what]])
    assert np.isfinite(metrics["loss"]) == ("gradient" in what)
    assert not np.isfinite(metrics["grad_norm"]) and metrics["skipped"] == 1


def test_after_too_many_in_a_row_nothing_changes_the_model_any_more(toy: Any) -> None:
    bad = NOT_FINITE["an infinite loss"]
    ended, logged = after(toy, [GOOD, *[bad] * MOST, GOOD, GOOD])
    assert_same_model(ended, after(toy, [GOOD])[0])
    assert [bool(m["stop"]) for m in logged] == [False] * MOST + [True] * 3
    assert [m["skipped_in_row"] for m in logged] == [0, *range(1, MOST + 1), MOST, MOST]


def test_a_finite_step_begins_the_row_anew(toy: Any) -> None:
    bad = NOT_FINITE["an infinite loss"]
    ended, logged = after(toy, [*[bad] * (MOST - 1), GOOD, *[bad] * (MOST - 1)])
    assert not any(m["stop"] for m in logged)
    assert (ended.skipped.in_all, ended.skipped.in_row) == (2 * (MOST - 1), MOST - 1)


# --- the host's look at it ---


def numbers(in_row: int, loss: float = np.nan) -> dict[str, Any]:
    return {
        "loss": loss,
        "grad_norm": 1.0,
        "skipped_in_row": np.int32(in_row),
        "stop": np.bool_(in_row >= MOST),
    }


class Unfinished(dict):
    """Metrics of a step that is still being computed: reading one would wait."""

    def __getitem__(self, name: str) -> Any:
        class Value:
            def __int__(self) -> int:
                raise AssertionError(f"waits for {name}")

            __bool__ = __float__ = __int__

        return Value()


def test_a_step_is_looked_at_when_the_next_is_under_way(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(lambda step: f"source of {step}")
    with caplog.at_level(logging.WARNING):
        watch.note(7, numbers(0), None)
        watch.note(8, numbers(1), None)
        assert not caplog.messages
        watch.note(9, Unfinished(), None)
    assert caplog.messages == [
        "Step 8, a batch of source of 8, is skipped: its loss is nan and its gradient's norm 1."
    ]


def test_the_last_of_too_many_stops_the_run_with_all_of_them_and_the_state() -> None:
    watch = Watch(lambda step: "a source")
    watch.note(8, numbers(MOST - 1), "state 8")
    watch.note(9, numbers(MOST, loss=np.inf), "state 9")
    with pytest.raises(NotFinite) as stop:
        watch.note(10, Unfinished(), "state 10")
    assert (stop.value.first, stop.value.last) == (10 - MOST, 9)
    assert stop.value.values == {"loss": np.inf, "grad_norm": 1.0}
    assert stop.value.state == "state 10"


def test_before_a_state_is_saved_its_own_step_is_looked_at() -> None:
    watch = Watch(lambda step: "a source")
    watch.note(9, numbers(MOST), None)
    with pytest.raises(NotFinite):
        watch.look(None)


# --- what is kept ---


class Counted:
    """Batches whose rows are their numbers; this host has one half of each."""

    def __init__(self, host: int):
        self.host, self.index = host, 0

    def __next__(self) -> dict[str, Any]:
        self.index += 1
        rows = np.asarray(self.origin(self.index - 1)[1])
        return {"query": {"input_ids": rows[:, None]}, "scores": rows / 2}

    def get_state(self) -> dict:
        return {"next_index": self.index}

    def set_state(self, state: Any) -> None:
        self.index = state["next_index"]

    def origin(self, index: int) -> tuple[str, list[int]]:
        first = 100 * index + 2 * self.host
        return f"source {index}", [first, first + 1]


def test_every_host_keeps_its_part_and_they_are_read_as_one_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = NotFinite(5, 6, {"loss": np.nan, "grad_norm": 2.0}, None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for host in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        keep_steps(failure, Counted(host), tmp_path)
    steps, hosts = not_finite.read_steps(tmp_path)
    assert steps == [{"step": 5, "source": "source 4"}, {"step": 6, "source": "source 5"}]
    batch, rows = read_batch(tmp_path, 6, hosts)
    assert rows.tolist() == [500, 501, 502, 503]
    assert batch["query"]["input_ids"].tolist() == [[500], [501], [502], [503]]
    np.testing.assert_array_equal(batch["scores"], rows / 2)


# --- a whole run ---


def diverging(files: list[Path], cache: Path, temperature: float) -> ConfigDict:
    config = tiny_config("quickstart", "", files, cache, total_steps=6)
    config.model.update({"vocab_size": 400, "embedding_size": 16})
    config.model.encoder.update(
        {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}
    )
    config.evals.update({"collections": (), "every_steps": 0, "best": "", "baselines": False})
    config.loss.temperature = temperature
    config.optimizer.max_skipped = MOST
    return config


@pytest.fixture(scope="module")
def stopped(real_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run whose logits overflow from the first step on."""
    folder = tmp_path_factory.mktemp("diverging")
    rows = text_pairs(real_texts, 24)
    files = [write_lines(folder / "pairs.jsonl", rows)]
    config = diverging(files, folder / "cache", temperature=1e-38)
    with pytest.raises(UserError) as error:
        run(config, folder / "run")
    return {"folder": folder, "files": files, "said": str(error.value), "rows": rows}


def tokenizer_of(stopped: dict[str, Any]) -> ColbertTokenizer:
    return huggingface.read_model(str(stopped["folder"] / "run" / "model")).tokenizer


def kept(stopped: dict[str, Any]) -> Path:
    return stopped["folder"] / "run" / "not_finite" / "step-1"


def test_a_run_stops_with_steps_source_numbers_and_where_they_are_kept(
    stopped: dict[str, Any],
) -> None:
    said = stopped["said"]
    assert f"steps 1 to {MOST} (batches of pairs) had no finite loss and gradient" in said
    assert f"--replay={kept(stopped)}" in said and "\n" not in said
    names = {path.name for path in kept(stopped).iterdir()}
    batches = {f"batch-{step}-host-0.npz" for step in range(1, MOST + 1)}
    assert names == {"steps.json", "checkpoints", *batches}
    logged = read_metrics(stopped["folder"] / "run")
    assert [row["train/skipped"] for row in logged] == list(range(1, len(logged) + 1))
    assert len(logged) >= MOST and not any("train/loss" in row for row in logged)
    lines = (stopped["folder"] / "run" / "metrics.jsonl").read_text().splitlines()
    assert "NaN" not in "".join(lines) and "Infinity" not in "".join(lines)
    assert not list((stopped["folder"] / "run" / "checkpoints").iterdir())


def test_the_kept_batch_holds_the_rows_that_it_names(stopped: dict[str, Any]) -> None:
    batch, rows = read_batch(kept(stopped), 2, 1)
    tokenizer = tokenizer_of(stopped)
    queries = tokenizer.queries([stopped["rows"][i]["query"] for i in rows])
    documents = tokenizer.documents([stopped["rows"][i]["document"] for i in rows], 20)
    np.testing.assert_array_equal(batch["query"]["input_ids"], queries["input_ids"])
    np.testing.assert_array_equal(batch["document"]["input_ids"][:, 0], documents["input_ids"])


def test_a_replay_finds_the_same_numbers_and_says_what_is_wrong(
    stopped: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    config = diverging(stopped["files"], stopped["folder"] / "cache", temperature=1e-38)
    assert not replay(config, kept(stopped))
    printed = capsys.readouterr().out
    assert f"{MOST} step(s), parameters not finite: none" in printed
    assert printed.count("a batch of pairs: loss nan, gradient norm nan") == MOST
    assert "query embeddings: 0 of 8 texts not finite" in printed
    assert "gradient not finite in: " in printed and "more\n" in printed


def test_a_replay_with_other_settings_says_whether_they_help(
    stopped: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    config = diverging(stopped["files"], stopped["folder"] / "cache", temperature=0.5)
    assert replay(config, kept(stopped))
    printed = capsys.readouterr().out
    assert "nan" not in printed and printed.count("loss ") == MOST


def test_a_replay_names_the_texts_whose_embeddings_are_not_finite(
    stopped: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = diverging(stopped["files"], stopped["folder"] / "cache", temperature=1e-38)
    batch, rows = read_batch(kept(stopped), 1, 1)
    texts = tokenizer_of(stopped).tokenizer
    victim = int(batch["query"]["input_ids"][3, 2])
    make_embed = replay_module.make_embed

    def poisoned(*args: Any, **options: Any) -> Any:
        embed = make_embed(*args, **options)
        return lambda params, ids, mask: jnp.where(
            (ids == victim)[..., None], jnp.nan, embed(params, ids, mask)
        )

    monkeypatch.setattr(replay_module, "make_embed", poisoned)
    replay(config, kept(stopped))
    first = capsys.readouterr().out.split("step 2")[0]
    bad = ((batch["query"]["input_ids"] == victim) & batch["query"]["scoring_mask"]).any(axis=1)
    assert bad.any()
    assert f"query embeddings: {bad.sum()} of 8 texts not finite" in first
    for i in np.flatnonzero(bad)[:5]:
        seen = batch["query"]["input_ids"][i][batch["query"]["attention_mask"][i]]
        assert f"row {rows[i]}: {printable(texts.decode(seen.tolist()))[:40]}" in first


def test_the_run_goes_on_with_settings_that_help(stopped: dict[str, Any]) -> None:
    config = diverging(stopped["files"], stopped["folder"] / "cache", temperature=0.5)
    run(config, stopped["folder"] / "run")
    logged = read_metrics(stopped["folder"] / "run")
    assert [row["step"] for row in logged] == list(range(1, 7))
    assert all(np.isfinite(row["train/loss"]) and row["train/skipped"] == 0 for row in logged)
    assert (kept(stopped) / "steps.json").is_file()


@pytest.mark.parametrize("where", ["nowhere", "not_a_replay", "damaged"])
def test_a_folder_that_is_no_replay_is_refused(
    where: str, stopped: dict[str, Any], tmp_path: Path
) -> None:
    if where != "nowhere":
        (tmp_path / where).mkdir()
    if where == "damaged":
        facts = json.loads((kept(stopped) / "steps.json").read_text())
        (tmp_path / where / "steps.json").write_text(json.dumps(facts))
        (tmp_path / where / "batch-1-host-0.npz").write_bytes(b"PK no more")
    config = diverging(stopped["files"], stopped["folder"] / "cache", temperature=0.5)
    with pytest.raises(UserError, match=r"--replay=.* cannot be read"):
        replay(config, tmp_path / where)


def test_never_stopping_is_refused(stopped: dict[str, Any], tmp_path: Path) -> None:
    config = diverging(stopped["files"], stopped["folder"] / "cache", temperature=0.5)
    config.optimizer.max_skipped = 0
    with pytest.raises(UserError, match=r"config\.optimizer\.max_skipped=0"):
        run(config, tmp_path / "run")


def test_the_program_replays_and_ends_with_status_1_while_it_is_not_mended(
    stopped: dict[str, Any],
) -> None:
    command = [sys.executable, str(ROOT / "launch" / "train.py")]
    command += [f"--config={ROOT / 'configs' / 'quickstart.py'}", f"--replay={kept(stopped)}"]
    command += ["--config.loss.temperature=1e-38", "--config.input.batch_size=8"]
    command += ["--config.model.dtype=float32", "--config.model.lengths=1"]
    command += ["--config.compilation_cache="]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr[-2000:]
    assert f"step {MOST}, a batch of pairs: loss nan" in done.stdout
    assert not done.stderr.count("Traceback")
