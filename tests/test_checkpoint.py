"""Checkpoints give back what was saved, and a run that was stopped ends as if it had not been."""

import copy
import gzip
import json
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from colbert_jax import train as train_module
from colbert_jax.checkpoint import Checkpoints, read_config
from colbert_jax.errors import UserError
from colbert_jax.metric_log import MetricLog, read_metrics
from colbert_jax.run import run
from colbert_jax.sharding import make_mesh, partition_spec

LAYERS = 12
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"


pytestmark = pytest.mark.usefixtures("quick_compilation")


def a_tree(seed: int = 0) -> dict[str, Any]:
    """Parameters in the shapes that ours have: dicts by name and by number, and scalars."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    layers = {i: {"kernel": draw(16, 8), "scale": draw(16)} for i in range(LAYERS)}
    return {"model": {"layers": layers, "projection": {0: {"kernel": draw(16, 8)}}}, "loss": {}}


def optimizer_tree(params: dict[str, Any]) -> dict[str, Any]:
    moments = (params["model"], jax.tree.map(np.square, params["model"]))
    return {"step": np.int32(7), "state": ((), (np.int32(7), *moments), ())}


def placed(tree: Any, sizes: tuple[int, int, int]) -> Any:
    """Arrays on a mesh, matrices split over `embed` and `mlp`."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])

    def place(x: Any) -> jax.Array:
        axes = {2: ("embed", "mlp"), 1: ("embed",), 0: ()}[np.ndim(x)]
        spec = partition_spec(axes, np.shape(x), mesh)
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def like(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, one), other in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert one.dtype == other.dtype, name
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=name)


def save(checkpoints: Checkpoints, step: int, tree: Any, sizes: Any = (1, 1, 1)) -> None:
    checkpoints.save(
        step,
        params=placed(tree, sizes),
        optimizer=placed(optimizer_tree(tree), sizes),
        input_state={"next_index": step},
        config={"seed": 0},
    )


# --- saving and restoring ---


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_what_was_saved_comes_back_bit_for_bit_on_any_mesh(
    tmp_path: Path, sizes: tuple[int, int, int]
) -> None:
    tree = a_tree()
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 7, tree, (2, 4, 1))
    checkpoints.wait()
    wanted, optimizer = placed(tree, sizes), placed(optimizer_tree(tree), sizes)
    params, restored, position = checkpoints.restore(params=like(wanted), optimizer=like(optimizer))
    checkpoints.close()
    assert position == {"next_index": 7}
    assert_same(params, wanted)
    assert_same(restored, optimizer)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        assert ours.sharding == theirs.sharding


def test_layers_of_two_digits_come_back_in_place(tmp_path: Path) -> None:
    tree = a_tree()
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, tree)
    checkpoints.close()
    reader = Checkpoints(tmp_path)
    layers = reader.restore_params(like(placed(tree, (1, 1, 1))))["model"]["layers"]
    reader.close()
    assert list(layers) == list(range(LAYERS))
    for i in (1, 2, 9, 10, 11):
        np.testing.assert_array_equal(layers[i]["kernel"], tree["model"]["layers"][i]["kernel"])


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every_steps=2, max_to_keep=2)
    assert checkpoints.latest_step() is None
    assert [step for step in range(1, 8) if checkpoints.due(step)] == [2, 4, 6]
    for step in (2, 4, 6):
        save(checkpoints, step, a_tree(step))
    checkpoints.wait()
    assert checkpoints.latest_step() == 6
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    assert_same(checkpoints.restore_params(like(placed(a_tree(), (1, 1, 1)))), a_tree(6))
    checkpoints.close()


def test_a_step_that_is_saved_already_is_left_as_it_is(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3, a_tree(0))
    checkpoints.wait()
    save(checkpoints, 3, a_tree(1))
    checkpoints.wait()
    assert_same(checkpoints.restore_params(like(placed(a_tree(), (1, 1, 1)))), a_tree(0))
    checkpoints.close()
    assert not Checkpoints(tmp_path, every_steps=0).due(3)


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path: Path) -> None:
    tree = placed(a_tree(), (1, 1, 1))
    wanted = like(tree)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, params=tree, optimizer={"step": jnp.int32(1)}, input_state={}, config={})
    double = jax.jit(lambda t: jax.tree.map(lambda x: x * 2, t), donate_argnums=0)
    jax.block_until_ready(double(tree))
    checkpoints.wait()
    assert_same(checkpoints.restore_params(wanted), a_tree())
    checkpoints.close()


def test_parameters_of_another_shape_are_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 5, a_tree())
    checkpoints.wait()
    wider = a_tree()
    wider["model"]["layers"][10]["kernel"] = np.zeros((16, 9), np.float32)
    message = r"step 5: model\.layers\.10\.kernel has shape \(16, 8\), but .* makes it \(16, 9\)"
    with pytest.raises(UserError, match=message):
        checkpoints.restore_params(like(placed(wider, (1, 1, 1))))
    deeper = a_tree()
    deeper["model"]["layers"][LAYERS] = deeper["model"]["layers"][0]
    with pytest.raises(UserError, match=r"model\.layers\.12\.kernel has shape none"):
        checkpoints.restore_params(like(placed(deeper, (1, 1, 1))))
    shallower = a_tree()
    del shallower["model"]["layers"][11]
    with pytest.raises(UserError, match=r"model\.layers\.11\.kernel .* makes it none"):
        checkpoints.restore_params(like(placed(shallower, (1, 1, 1))))
    other = optimizer_tree(a_tree())
    other["state"] = other["state"][1:]
    with pytest.raises(UserError, match=r"step 5: state\."):
        checkpoints.restore(
            params=like(placed(a_tree(), (1, 1, 1))), optimizer=like(placed(other, (1, 1, 1)))
        )
    checkpoints.close()


def test_no_checkpoint_is_the_users_error(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"checkpoints holds no checkpoint: train first"):
        checkpoints.restore_params(like(placed(a_tree(), (1, 1, 1))))
    checkpoints.close()


def test_a_config_that_cannot_be_read_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not the folder of a run"):
        read_config(tmp_path / "train_config.json")
    (tmp_path / "train_config.json").write_text("{")
    with pytest.raises(UserError, match="is not the folder of a run"):
        read_config(tmp_path / "train_config.json")


# --- stopping and going on ---


def tiny_config(files: tuple[str, ...], cache: Path) -> ConfigDict:
    config = runpy.run_path(str(QUICKSTART))["get_config"]()
    config.update(
        {
            "total_steps": 6,
            "log_every_steps": 1,
            "export": False,
            "compilation_cache": "",
            "mesh": {"fsdp": 2},
            "input": {"corpus": "", "files": files, "batch_size": 8, "max_documents": 2},
            "model": {
                "dtype": "bfloat16",
                "embedding_size": 16,
                "query_length": 8,
                "document_length": 16,
                "vocab_size": 400,
                "encoder": {
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                },
            },
            "loss": {"learn_temperature": True},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.01},
            "checkpoint": {"every_steps": 3, "max_to_keep": 3},
            "evals": {"collections": (), "baselines": False},
        }
    )
    config.input.cache_dir = str(cache)
    return config


@pytest.fixture(scope="module")
def config(real_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
    folder = tmp_path_factory.mktemp("data")
    texts = [text for text in real_texts if len(text.split()) > 8][:120]
    rows = [{"query": " ".join(text.split()[:6]), "document": text} for text in texts]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:70]))
    with gzip.open(folder / "mined.jsonl.gz", "wt") as file:
        for i, row in enumerate(rows[70:]):
            file.write(json.dumps(row | {"negative": [texts[i], texts[i + 1]]}) + "\n")
    files = (str(folder / "pairs.jsonl"), str(folder / "mined.jsonl.gz"))
    return tiny_config(files, folder / "cache")


@pytest.fixture(scope="module")
def unbroken(config: ConfigDict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a run that was never stopped."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    run(config, workdir)
    return workdir


class Stopped(Exception):
    """What a kill looks like from inside."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    write = MetricLog.write

    def stopping(self: MetricLog, at: int, values: Any) -> None:
        write(self, at, values)
        if at == step:
            raise Stopped

    monkeypatch.setattr(MetricLog, "write", stopping)


def everything(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Each array of a checkpoint, by name, as it lies on disk."""
    manager = Checkpoints(workdir)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    names: dict[str, np.ndarray] = {}
    for item in ("params", "optimizer"):
        tree = manager.manager.item_metadata(step)[item]
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
            getattr(tree, "tree", tree),
        )
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(wanted)})
        restored = manager.manager.restore(step, args=args)[item]
        for path, x in jax.tree.leaves_with_path(restored):
            names[item + jax.tree_util.keystr(path)] = np.asarray(x)
    manager.close()
    return names


def without_times(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    timed = ("time/", "train/pairs_per_second", "train/tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


# Stopped at 2, before the first checkpoint, it starts anew; at 5, after that of step 3, it goes on
# from there; stopped at 6, after the last update but before it is saved, it makes 4 to 6 again.
@pytest.mark.parametrize("stop", [2, 5, 6])
def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(
    stop: int,
    unbroken: Path,
    config: ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workdir = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_at(patched, stop)
        with pytest.raises(Stopped):
            run(config, workdir)
    assert read_metrics(workdir)[-1]["step"] == stop
    steps_made = []
    make = train_module.make_train_step

    def counting(*args: Any) -> Any:
        step = make(*args)

        def counted(state: Any, batch: Any) -> Any:
            steps_made.append(int(state.step) + 1)
            return step(state, batch)

        return counted

    monkeypatch.setattr(train_module, "make_train_step", counting)
    run(config, workdir)
    assert steps_made == ([1, 2, 3, 4, 5, 6] if stop < 3 else [4, 5, 6])

    ours, theirs = everything(workdir, 6), everything(unbroken, 6)
    assert ours.keys() == theirs.keys() and any("log_temperature" in name for name in ours)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    logged = read_metrics(workdir)
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    assert without_times(logged) == without_times(read_metrics(unbroken))


def test_a_finished_run_is_not_trained_again(
    unbroken: Path, config: ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(unbroken, 6)
    lines = (unbroken / "metrics.jsonl").read_text()

    def forbidden(*args: Any) -> Any:
        return lambda state, batch: pytest.fail("a step was made")

    monkeypatch.setattr(train_module, "make_train_step", forbidden)
    run(config, unbroken)
    after = everything(unbroken, 6)
    assert (unbroken / "metrics.jsonl").read_text() == lines
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_a_run_goes_on_only_with_the_model_it_was_started_with(
    unbroken: Path, config: ConfigDict
) -> None:
    wider = copy.deepcopy(config)
    wider.model.encoder.hidden_size = 64
    longer = copy.deepcopy(config)
    longer.model.document_length = 24
    untempered = copy.deepcopy(config)
    untempered.loss.learn_temperature = False
    before = everything(unbroken, 6)
    for other, named in (
        (wider, r"config\.model\.encoder\.hidden_size=32, not 64"),
        (longer, r"config\.model\.document_length=16, not 24"),
        (untempered, r"loss\.log_temperature has shape \(\), but"),
    ):
        with pytest.raises(UserError, match=named):
            run(other, unbroken)
    after = everything(unbroken, 6)
    assert all(np.array_equal(after[name], before[name]) for name in before)
