"""Checkpoints give back what was saved, and a run that was stopped ends as if it had not been."""

import asyncio
import contextlib
import copy
import errno
import gc
import gzip
import json
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict
from test_processes import two_joined

from colbert_jax import manifest
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


# --- damage ---


KINDS = {
    "parameters": "params/ocdbt.process_0/d/*",
    "their index": "params/manifest.ocdbt",
    "their shapes": "params/_METADATA",
    "optimiser": "optimizer/ocdbt.process_0/d/*",
    "input state": "input/metadata",
    "config": "config/metadata",
    "worth": "metrics/metrics",
    "metadata": "_CHECKPOINT_METADATA",
    "manifest": "manifest.json",
}


def large_tree(seed: int) -> dict[str, Any]:
    """An array that is stored as a file's bytes, which small ones are not."""
    kernel = np.random.default_rng(seed).normal(size=(128, 64)).astype(np.float32)
    return {"model": {"kernel": kernel}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with steps 3 and 7."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir)
    for step in (3, 7):
        save(checkpoints, step, large_tree(step))
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def damage(folder: Path, kind: str, how: str) -> str:
    """Damages the largest file of a kind in a step's folder; its name below the folder."""
    path = max(folder.glob(KINDS[kind]), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    return path.relative_to(folder).as_posix()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_restores(checkpoints: Checkpoints, step: int, tree: Any = None) -> None:
    """Whether the newest whole step is this one, bit for bit."""
    tree = large_tree(step) if tree is None else tree
    params, optimizer = placed(tree, (1, 1, 1)), placed(optimizer_tree(tree), (1, 1, 1))
    restored = checkpoints.restore(params=like(params), optimizer=like(optimizer))
    assert restored[2] == {"next_index": step}
    assert_same(restored[0], params)
    assert_same(restored[1], optimizer)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """This project's own; Orbax may have more to say."""
    ours = (r for r in caplog.records if r.name.startswith("colbert_jax"))
    return [r.getMessage() for r in ours if r.levelname == "WARNING"]


@pytest.mark.parametrize("how", ["truncated", "flipped", "deleted"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_named_left_alone_and_the_one_before_is_used(
    kind: str, how: str, workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = workdir / "checkpoints" / "7"
    name = damage(folder, kind, how)
    before = contents(workdir)
    checkpoints = Checkpoints(workdir)
    assert_restores(checkpoints, 3)
    assert checkpoints.latest_step() == 3
    checkpoints.close()
    (line,) = warnings(caplog)
    assert line.startswith(f"{folder} is damaged ({name} ") and "step 7" in line
    assert contents(workdir) == before


@pytest.mark.parametrize("kind", ["parameters", "optimiser"])
def test_parameters_are_read_where_only_the_rest_is_damaged(kind: str, workdir: Path) -> None:
    damage(workdir / "checkpoints" / "7", kind, "flipped")
    newest = 3 if kind == "parameters" else 7
    wanted = like(placed(large_tree(0), (1, 1, 1)))
    checkpoints = Checkpoints(workdir)
    assert checkpoints.find_step("latest") == newest
    checkpoints.close()
    checkpoints = Checkpoints(workdir)
    assert_same(checkpoints.restore_params(wanted), placed(large_tree(newest), (1, 1, 1)))
    assert_same(checkpoints.restore_params(wanted, 3), placed(large_tree(3), (1, 1, 1)))
    checkpoints.close()
    checkpoints = Checkpoints(workdir)
    if newest == 3:  # a step that was asked for is not replaced by another
        with pytest.raises(UserError, match=r"/7 is damaged \(params/.*\): choose another step"):
            checkpoints.restore_params(wanted, checkpoints.find_step("7"))
    checkpoints.close()


def test_where_none_is_whole_all_are_named_and_nothing_is_touched(workdir: Path) -> None:
    damage(workdir / "checkpoints" / "3", "optimiser", "truncated")
    damage(workdir / "checkpoints" / "7", "input state", "deleted")
    before = contents(workdir)
    checkpoints = Checkpoints(workdir)
    assert checkpoints.latest_step() == 7  # so that no run takes the folder for a new one
    named = r"step 3 \(optimizer/.* bytes and not .*\), step 7 \(input/metadata is missing\)"
    with pytest.raises(UserError, match=f"holds no whole checkpoint, but damaged ones, {named}"):
        assert_restores(checkpoints, 7)
    checkpoints.close()
    assert contents(workdir) == before


def test_a_new_save_keeps_the_damaged_one_aside(
    workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = workdir / "checkpoints"
    damage(folder / "7", "parameters", "flipped")
    damaged = contents(folder / "7")
    checkpoints = Checkpoints(workdir, max_to_keep=2)
    assert_restores(checkpoints, 3)
    for step in (4, 5, 6):  # steps before it leave it where it is, and out of the count
        save(checkpoints, step, large_tree(step))
    checkpoints.wait()
    assert sorted(p.name for p in folder.iterdir()) == ["5", "6", "7"]
    assert contents(folder / "7") == damaged
    save(checkpoints, 7, large_tree(70))
    checkpoints.close()
    assert f"{folder / '7'} is damaged and now called 7.damaged-1" in warnings(caplog)
    assert sorted(p.name for p in folder.iterdir()) == ["6", "7", "7.damaged-1"]
    assert contents(folder / "7.damaged-1") == damaged
    checkpoints = Checkpoints(workdir)
    assert_restores(checkpoints, 7, large_tree(70))
    checkpoints.close()


def test_a_damaged_one_that_is_passed_is_kept_aside_too(workdir: Path) -> None:
    folder = workdir / "checkpoints"
    damage(folder / "7", "optimiser", "truncated")
    (folder / "7.damaged-1").mkdir()  # of an earlier time
    checkpoints = Checkpoints(workdir, max_to_keep=1)
    assert_restores(checkpoints, 3)
    save(checkpoints, 8, large_tree(8))
    checkpoints.close()
    assert sorted(p.name for p in folder.iterdir()) == ["7.damaged-1", "7.damaged-2", "8"]


def test_a_damaged_checkpoint_is_the_best_no_more(tmp_path: Path) -> None:
    config = {"evals": {"best": "MAP", "collections": ["a"]}}
    checkpoints = Checkpoints(tmp_path)
    for step, value in ((1, 0.5), (2, 0.9)):
        tree = placed(large_tree(step), (1, 1, 1))
        parts = {"optimizer": placed(optimizer_tree(large_tree(step)), (1, 1, 1))}
        state = {"input_state": {"next_index": step}, "config": config, "value": value}
        checkpoints.save(step, params=tree, **parts, **state)
    checkpoints.close()
    damage(tmp_path / "checkpoints" / "2", "parameters", "flipped")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.best() == (2, 0.9) and not checkpoints.is_best(0.9, config)
    assert_restores(checkpoints, 1)
    assert checkpoints.best() == (1, 0.5) and checkpoints.is_best(0.9, config)
    checkpoints.close()


def without_manifests(workdir: Path) -> None:
    """As checkpoints were saved before there were manifests."""
    for folder in (workdir / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
        (folder / "metrics" / "metrics").write_text('{"value": null, "of": [""]}')


def test_an_old_checkpoint_without_a_manifest_is_read_as_before(
    workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without_manifests(workdir)
    checkpoints = Checkpoints(workdir)
    assert checkpoints.find_step("latest") == 7
    assert_restores(checkpoints, 7)
    save(checkpoints, 8, large_tree(8))
    checkpoints.wait()
    assert_restores(checkpoints, 8)
    checkpoints.close()
    assert not warnings(caplog)


@pytest.mark.parametrize("kind", ["parameters", "their shapes", "input state", "worth"])
def test_of_an_old_checkpoint_what_orbax_notices_is_damage_too(
    kind: str, workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without_manifests(workdir)
    damage(workdir / "checkpoints" / "7", kind, "truncated")
    checkpoints = Checkpoints(workdir)
    assert_restores(checkpoints, 7 if kind == "worth" else 3)
    checkpoints.close()
    assert len(warnings(caplog)) == (0 if kind == "worth" else 1)


@pytest.mark.parametrize("moment", ["before the manifest", "after it", "once renamed"])
def test_a_kill_while_saving_loses_at_most_that_save(
    moment: str, workdir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What lies there at a moment of the save of step 9 is what a kill then leaves."""
    seal, killed = manifest.seal, workdir.parent / "killed"

    def watched(folder: Path, beside_items: bool) -> None:
        if moment == ("once renamed" if beside_items else "before the manifest"):
            shutil.copytree(workdir, killed)
        seal(folder, beside_items)
        if moment == "after it" and not beside_items:
            shutil.copytree(workdir, killed)

    checkpoints = Checkpoints(workdir, max_to_keep=1)
    with monkeypatch.context() as patched:
        patched.setattr(manifest, "seal", watched)
        save(checkpoints, 9, large_tree(9))
        checkpoints.close()

    checkpoints = Checkpoints(killed)
    if moment == "once renamed":
        assert_restores(checkpoints, 9)
    else:
        unfinished = f"{killed / 'checkpoints' / '9.orbax-checkpoint-tmp'}: step 9 was never saved"
        assert warnings(caplog)[0].startswith(unfinished)
        assert_restores(checkpoints, 7)  # though only one is to be kept
        save(checkpoints, 9, large_tree(9))
        checkpoints.wait()
        assert_restores(checkpoints, 9)
        assert sorted(p.name for p in (killed / "checkpoints").iterdir()) == ["3", "7", "9"]
    checkpoints.close()


# --- a full disk ---


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Has the system refuse what a full disk would, without one: any write beyond these bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def no_space_for(prefix: str) -> Iterator[None]:
    """Has the disk be full when the manifest of some steps is to be written."""
    seal = manifest.seal

    def full(folder: Path, beside_items: bool) -> None:
        if folder.name.startswith(prefix):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        seal(folder, beside_items)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(manifest, "seal", full)
        yield


@pytest.mark.parametrize(
    ("full", "reason"),
    [
        (lambda: no_file_larger_than(20_000), "File too large"),  # arrays
        (lambda: no_file_larger_than(5), "File too large"),  # all
        (lambda: no_space_for(""), "No space left on device"),  # the manifest
    ],
)
def test_a_save_that_fails_is_warned_about_costs_no_other_and_leaves_nothing(
    full: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(tmp_path, max_to_keep=1)
    save(checkpoints, 1, large_tree(1))
    checkpoints.wait()
    failed = rf"could not be saved in {folder} \({reason}\), where step 1 is the newest"
    with full():
        save(checkpoints, 2, large_tree(2))
        save(checkpoints, 3, large_tree(3))  # training goes on
        gc.collect()  # when asyncio reports what was not awaited
        (line,) = [record.getMessage() for record in caplog.records]  # and none of Orbax's own
        assert re.match(f"Step 2 {failed} .*: make room there", line)
        with pytest.raises(UserError, match=f"^Step 3 {failed} .*: make room there .* start the"):
            checkpoints.wait()
    checkpoints.wait()  # said once
    assert checkpoints.latest_step() == 1
    assert_restores(checkpoints, 1)
    save(checkpoints, 4, large_tree(4))
    checkpoints.wait()
    assert [p.name for p in folder.iterdir()] == ["4"]
    assert_restores(checkpoints, 4)
    checkpoints.close()


def test_asyncio_reports_no_write_that_the_run_has_warned_of_but_all_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = asyncio.new_event_loop()
    for error in ("Failed to write 9 bytes to file 29 [os_error_code='27']", "a bug"):
        loop.create_future().set_exception(ValueError(error))  # and none awaits it
    gc.collect()
    loop.close()
    (record,) = caplog.records
    assert record.name == "asyncio" and record.exc_info
    assert str(record.exc_info[1]) == "a bug"


def test_closing_says_that_the_last_save_failed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with no_space_for("1."):
        save(checkpoints, 1, large_tree(1))
        with pytest.raises(UserError, match=r"\(No space left on device\), where nothing is saved"):
            checkpoints.close()


def test_an_error_that_is_no_disks_is_raised_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path, beside_items: bool) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(manifest, "seal", broken)
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, large_tree(1))
    with pytest.raises(RuntimeError, match="a bug"):
        checkpoints.wait()
    checkpoints.close()


# --- several processes ---


TOGETHER = """
import json, pathlib, sys
import jax, numpy as np
from colbert_jax.checkpoint import Checkpoints
from colbert_jax.cli import show_log
from colbert_jax.sharding import join_hosts

join_hosts()
show_log()
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
halves = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

def tree(step):
    kernel = np.random.default_rng(step).normal(size=(128, 64)).astype(np.float32)
    return {"kernel": jax.make_array_from_callback(kernel.shape, halves, lambda i: kernel[i])}

def save(step):
    state = {"params": tree(step), "optimizer": tree(step + 100)}
    checkpoints.save(step, **state, input_state={"step": step}, config={})

like = {"kernel": jax.ShapeDtypeStruct((128, 64), np.float32, sharding=halves)}
folder = pathlib.Path(sys.argv[1]) / "checkpoints"
checkpoints = Checkpoints(sys.argv[1], max_to_keep=2)
for step in (1, 2, 3):
    save(step)
checkpoints.close()
if jax.process_index() == 0:  # of what the second process wrote
    half = max((folder / "3/params/ocdbt.process_1/d").iterdir(), key=lambda f: f.stat().st_size)
    content = bytearray(half.read_bytes())
    content[len(content) // 2] ^= 1
    half.write_bytes(content)
checkpoints = Checkpoints(sys.argv[1], max_to_keep=2)
params, optimizer, position = checkpoints.restore(params=like, optimizer=like)
assert position == {"step": 2}, position
for restored, expected in ((params, tree(2)), (optimizer, tree(102))):
    for one, other in zip(
        restored["kernel"].addressable_shards, expected["kernel"].addressable_shards
    ):
        np.testing.assert_array_equal(one.data, other.data)
save(3)
checkpoints.close()
"""


def test_two_processes_save_and_pass_over_a_damaged_checkpoint_alike(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path)],
            env=environment | who,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for who in two_joined()
    ]
    for process in both:
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed[-3000:]
        named = r"/3 is damaged \(params/ocdbt.process_1/d/\w+ has other bytes\): step 3 is passed"
        assert len(re.findall(named, printed)) == 1, printed
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3", "3.damaged-1"]
    for step in ("2", "3"):
        assert not manifest.find_damage(folder / step)
        assert "optimizer/ocdbt.process_1/" in (folder / step / "manifest.json").read_text()


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
    timed = ("time/", "train/pairs_per_second", "train/tokens_per_second", "train/mfu")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def assert_same_run(workdir: Path, unbroken: Path) -> None:
    ours, theirs = everything(workdir, 6), everything(unbroken, 6)
    assert ours.keys() == theirs.keys() and any("log_temperature" in name for name in ours)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    logged = read_metrics(workdir)
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    assert without_times(logged) == without_times(read_metrics(unbroken))


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

    assert_same_run(workdir, unbroken)


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


def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_if_it_were_not(
    unbroken: Path, config: ConfigDict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workdir = Path(shutil.copytree(unbroken, tmp_path / "run"))
    damage(workdir / "checkpoints" / "6", "optimiser", "flipped")
    damaged = contents(workdir / "checkpoints" / "6")
    with caplog.at_level("INFO"):
        run(config, workdir)
    assert "going on after 3 of 6 steps" in caplog.text
    assert contents(workdir / "checkpoints" / "6.damaged-1") == damaged
    assert_same_run(workdir, unbroken)


def test_a_run_without_a_whole_checkpoint_does_not_start_anew(
    unbroken: Path, config: ConfigDict, tmp_path: Path
) -> None:
    workdir = Path(shutil.copytree(unbroken, tmp_path / "run"))
    for step in ("3", "6"):
        damage(workdir / "checkpoints" / step, "input state", "truncated")
    before = contents(workdir / "checkpoints")
    with pytest.raises(UserError, match=r"holds no whole checkpoint.*step 3 \(.*step 6 \("):
        run(config, workdir)
    assert contents(workdir / "checkpoints") == before
    assert (workdir / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()


def test_a_run_goes_on_though_a_save_fails(
    unbroken: Path, config: ConfigDict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with no_space_for("3."):
        run(config, tmp_path / "run")
    (line,) = [line for line in warnings(caplog) if "saved" in line]
    assert line.startswith(f"Step 3 could not be saved in {tmp_path / 'run' / 'checkpoints'} (No s")
    assert_same_run(tmp_path / "run", unbroken)


def test_a_run_whose_last_save_fails_ends_with_an_error_and_can_be_started_again(
    unbroken: Path, config: ConfigDict, tmp_path: Path
) -> None:
    with no_space_for("6."), pytest.raises(UserError, match=r"Step 6 could .* step 3 is the newes"):
        run(config, tmp_path / "run")
    run(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", unbroken)
