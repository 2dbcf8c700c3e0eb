"""A run on a GPU computes by what its trials found; here trials and GPU are stood in for."""

import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokamax
from test_ahead import tiny
from test_not_finite import diverging
from tiny_run import text_pairs, write_lines

from colbert_jax import attention, forms, train, trial
from colbert_jax.ahead import model_config
from colbert_jax.attention import ByReach
from colbert_jax.colbert import init_params
from colbert_jax.errors import UserError
from colbert_jax.forms import Forms, choose_forms, untried
from colbert_jax.replay import replay
from colbert_jax.run import run
from colbert_jax.sharding import make_mesh

EVERYWHERE, LOCAL, QUERY = (
    "attention to 80 tokens",
    "attention to 80 tokens, 64 on either side",
    "attention to 8 tokens",
)
BEST = {QUERY: "xla", EVERYWHERE: "cudnn", LOCAL: "tokamax", "MaxSim": "kernels"}
FOUND = Forms(ByReach("xla", "xla"), ByReach("cudnn", "tokamax"), True)


def config_of(**model: Any) -> dict[str, Any]:
    """Documents are longer than a window, queries are not."""
    config = tiny()
    config["model"] |= {"document_length": 80, "dtype": "float32", **model}
    return config


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU, by its name; its trials end as `BEST` has it, and are noted."""
    tried: list[str] = []

    def end(what: str, runs: Mapping[str, Callable[[], Any]]) -> tuple[str, str]:
        assert BEST[what] in runs
        assert next(iter(runs)) == "xla"  # which says what is right
        tried.append(what)
        return BEST[what], f"{what} by {BEST[what]}"

    monkeypatch.setattr(forms, "_gpu_at_hand", lambda: True)
    monkeypatch.setattr(forms, "fastest", end)
    return tried


def choose(config: dict[str, Any], folder: Path | None = None, **options: Any) -> Forms:
    return choose_forms(config, model_config(config), folder, **options)


def test_each_length_and_window_gets_what_its_trial_found(
    gpu: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "colbert_jax"), jax.set_mesh(make_mesh(2, 2, 2)):
        assert choose(config_of()) == FOUND
    assert gpu == [QUERY, EVERYWHERE, LOCAL, "MaxSim"]  # a window holds all of a query
    assert caplog.messages == [f"{what} by {BEST[what]}" for what in gpu]


def test_lengths_that_are_alike_are_tried_once(gpu: list[str]) -> None:
    found = choose(config_of(query_length=80))
    assert gpu == [EVERYWHERE, LOCAL, "MaxSim"]
    assert found.query_attention == found.document_attention == FOUND.document_attention


def test_attention_that_the_config_names_is_not_tried(gpu: list[str]) -> None:
    assert choose(config_of(attention="xla")) == Forms("xla", "xla", True)
    assert gpu == ["MaxSim"]


@pytest.mark.parametrize(("key", "value"), [("kind", "distillation"), ("masked_similarity", -0.5)])
def test_maxsim_that_kernels_do_not_compute_is_not_tried(
    key: str, value: Any, gpu: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Distillation scores each query's candidates only, and misses no kernels."""
    config = config_of()
    config["loss"][key] = value
    with caplog.at_level(logging.INFO, "colbert_jax"):
        assert choose(config) == FOUND._replace(maxsim_kernels=False)
        config["model"]["attention"] = "xla"
        assert choose(config) == untried(config)
    assert "MaxSim" not in gpu
    line = "MaxSim by XLA, since our kernels do not take what the run has"
    assert caplog.messages.count(line) == (2 if key == "masked_similarity" else 0)


@pytest.mark.parametrize(("compiled_for", "here"), [("cpu", "cpu"), ("tpu", "gpu"), ("gpu", "cpu")])
def test_nothing_is_tried_without_a_gpu_to_compile_for(
    compiled_for: str, here: str, gpu: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(forms, "platform", lambda: compiled_for)
    monkeypatch.setattr(jax, "default_backend", lambda: here)
    assert choose(config_of(), tmp_path) == untried(config_of()) == Forms("auto", "auto", False)
    assert not gpu and not list(tmp_path.iterdir())


@pytest.mark.parametrize("host", [0, 1])
def test_on_several_hosts_the_first_ones_choice_counts(
    host: int, gpu: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent = []

    def of_the_first(found: np.ndarray) -> np.ndarray:
        sent.append(found.tolist())
        return np.array([0, 2, 1, 1], np.int32)  # as the first has them

    monkeypatch.setattr(forms.multihost_utils, "broadcast_one_to_all", of_the_first)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: host)
    assert choose(config_of(), tmp_path) == FOUND
    assert len(gpu) == (0 if host else 4)
    assert sent == [[0, 0, 0, 0] if host else [0, 2, 1, 1]]
    assert (tmp_path / "forms.json").exists() == (host == 0)


# --- what a run keeps ---


def test_a_run_that_goes_on_computes_as_it_began(
    gpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(config_of(), tmp_path) == FOUND
    for what in BEST:
        monkeypatch.setitem(BEST, what, "xla")  # another day's trials would end in another way
    gpu.clear()
    assert choose(config_of(), tmp_path) == FOUND
    assert not gpu


def another_version(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> None:
    monkeypatch.setattr(forms, "package_version", lambda package: "0.0.1")


def another_dtype(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> None:
    config["model"]["dtype"] = "bfloat16"


def another_micro_batch(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> None:
    config["model"]["micro_batch"] = 7


@pytest.mark.parametrize("change", [another_version, another_dtype, another_micro_batch])
def test_under_other_conditions_all_is_tried_again(
    change: Callable[..., None],
    gpu: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of()
    choose(config, tmp_path)
    change(monkeypatch, config)
    choose(config, tmp_path)
    assert len(gpu) == 8
    choose(config, tmp_path)
    assert len(gpu) == 8


@pytest.mark.parametrize(
    "damage",
    ["", "[]", "{}", '{"for": {}, "fastest": 3}', '{"for": {}, "fastest": {"MaxSim": "magic"}}'],
)
def test_a_kept_file_that_is_none_is_found_anew(
    damage: str, gpu: list[str], tmp_path: Path
) -> None:
    choose(config_of(), tmp_path)
    good = (tmp_path / "forms.json").read_text()
    (tmp_path / "forms.json").write_text(damage)
    assert choose(config_of(), tmp_path) == FOUND
    assert len(gpu) == 8
    assert (tmp_path / "forms.json").read_text() == good


def test_a_name_that_is_none_of_a_trials_is_found_anew(gpu: list[str], tmp_path: Path) -> None:
    choose(config_of(), tmp_path)
    kept = json.loads((tmp_path / "forms.json").read_text())
    kept["fastest"]["MaxSim"] = "magic"
    (tmp_path / "forms.json").write_text(json.dumps(kept))
    assert choose(config_of(), tmp_path) == FOUND


def test_a_replay_leaves_no_file(gpu: list[str], tmp_path: Path) -> None:
    assert choose(config_of(), tmp_path, keep=False) == FOUND
    assert not list(tmp_path.iterdir())


# --- trials of attention ---


@pytest.fixture
def libraries_by_xla(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The libraries' own XLA forms in the place of their kernels, and which were used."""
    used: list[str] = []

    def stand_in(library: Any, name: str) -> None:
        real = library.dot_product_attention

        def by_xla(*inputs: Any, implementation: Any, **settings: Any) -> jax.Array:
            used.append(name)
            return real(*inputs, implementation="xla", **settings)

        monkeypatch.setattr(library, "dot_product_attention", by_xla)

    stand_in(tokamax, "tokamax")
    stand_in(jax.nn, "cudnn")
    forms._attention_both_ways.clear_cache()
    monkeypatch.setattr(trial, "CALLS", 1)
    return used


@pytest.mark.parametrize("reach", [None, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trial_of_attention_finds_the_same_numbers_by_all_forms(
    reach: int | None, dtype: str, libraries_by_xla: list[str]
) -> None:
    config = config_of(dtype=dtype, micro_batch=3)
    runs = forms._attention_runs(config, model_config(config), 80, reach)
    best, line = trial.fastest("attention", runs)
    assert best in runs and list(runs) == ["xla", "tokamax", "cudnn"]
    assert line.count(" ms") == 3
    assert set(libraries_by_xla) == {"tokamax", "cudnn"}


@pytest.mark.parametrize("wrong", ["value", "gradient 0", "gradient 1", "gradient 2", "window"])
def test_attention_with_other_numbers_fails_its_trial(
    wrong: str, libraries_by_xla: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window on one side only is what cuDNN makes of one without a word (jax-ml/jax 39576)."""
    real = attention.attend

    def steeper(x: jax.Array) -> jax.Array:
        return x + 0.1 * (x - jax.lax.stop_gradient(x))

    def attend(*inputs: Any) -> jax.Array:
        *arrays, mask, reach, form = inputs
        if form != "cudnn":
            return real(*inputs)
        if wrong == "window":
            reach = 10
        elif wrong != "value":
            place = int(wrong.split()[1])
            arrays[place] = steeper(arrays[place])
        gathered = real(*arrays, mask, reach, "xla")
        return gathered * 1.1 if wrong == "value" else gathered

    monkeypatch.setattr(forms, "attend", attend)
    config = config_of(micro_batch=3)
    runs = forms._attention_runs(config, model_config(config), 80, 64)
    best, line = trial.fastest("attention", runs)
    assert best != "cudnn"
    assert line.endswith("cudnn gives other numbers here")


def test_a_library_that_is_not_there_or_has_no_kernel_fails_its_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU neither has one. Tokamax must not give way to XLA, timed under its own name."""
    forms._attention_both_ways.clear_cache()
    config = config_of(micro_batch=3)
    runs = forms._attention_runs(config, model_config(config), 80, 64)
    best, line = trial.fastest("attention", runs)
    assert best == "xla"
    assert "tokamax does not run here (" in line and "cudnn does not run here (" in line


def test_a_trial_has_no_more_texts_than_a_device_has_room_for() -> None:
    config = config_of(micro_batch=64)
    model = model_config(config)
    shapes = {
        length: forms._attention_runs(config, model, length, None)["xla"].args[2].shape  # type: ignore[attr-defined]
        for length in (16, 2048)
    }
    assert shapes[16][0] == 64
    assert shapes[2048][0] == 32  # of two heads: 2 x 2,048 x 2,048 logits each


# --- a loss with them ---


def test_a_loss_computes_by_the_chosen_forms_with_the_same_numbers(
    libraries_by_xla: list[str],
) -> None:
    config = config_of()
    model = model_config(config)
    params = {"model": init_params(model, 0), "loss": {}}
    rng = np.random.default_rng(0)

    def tokens(length: int, *shape: int) -> dict[str, jax.Array]:
        mask = jnp.asarray(np.arange(length) < rng.integers(2, length + 1, (*shape, 1)))
        ids = jnp.asarray(rng.integers(0, 128, (*shape, length)), jnp.int32)
        return {"input_ids": ids, "attention_mask": mask, "scoring_mask": mask}

    batch = {"query": tokens(8, 4), "document": tokens(80, 4, 1)}

    def numbers(chosen: Forms | None) -> Any:
        with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
            loss_fn = train.build_loss(config, model, forms=chosen)
            return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch)

    plain = numbers(None)
    assert not libraries_by_xla
    (loss, _), gradients = numbers(FOUND._replace(maxsim_kernels=False))
    # The encoder's only layer looks at the whole text.
    assert set(libraries_by_xla) == {"cudnn"}
    np.testing.assert_allclose(loss, plain[0][0], rtol=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(plain[1]))
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6 * largest)
    jax.tree.map(close, gradients, plain[1])


def test_a_run_its_replay_and_the_run_that_goes_on_compute_by_what_was_found_first(
    real_texts: list[str],
    gpu: list[str],
    libraries_by_xla: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    used: list[Any] = []
    make_embed = train.make_embed

    def noting(*arguments: Any) -> Any:
        used.append(arguments[-1])
        return make_embed(*arguments)

    monkeypatch.setattr(train, "make_embed", noting)
    files = [write_lines(tmp_path / "pairs.jsonl", text_pairs(real_texts, 24))]
    names = ("attention to 12 tokens", "attention to 20 tokens", "MaxSim")
    for what, best in zip(names, ("cudnn", "tokamax", "kernels"), strict=True):
        monkeypatch.setitem(BEST, what, best)
    found = [ByReach("cudnn", "cudnn"), ByReach("tokamax", "tokamax")]
    with pytest.raises(UserError, match="no finite loss"):
        run(diverging(files, tmp_path / "cache", temperature=1e-38), tmp_path / "run")
    assert gpu == list(names) and used == found
    assert set(libraries_by_xla) == {"cudnn", "tokamax"}

    for what in names:
        monkeypatch.setitem(BEST, what, "xla")
    gpu.clear()
    config = diverging(files, tmp_path / "cache", temperature=0.5)
    assert replay(config, tmp_path / "run" / "not_finite" / "step-1")
    run(config, tmp_path / "run")
    assert not gpu and used == 3 * found


@pytest.mark.parametrize("use", [True, False])
def test_a_loss_is_built_with_the_choice_for_maxsim(
    use: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []
    monkeypatch.setattr(train, "make_loss_fn", lambda *arguments: given.append(arguments[-1]))
    config = config_of()
    train.build_loss(config, model_config(config), forms=FOUND._replace(maxsim_kernels=use))
    assert given == [use]
