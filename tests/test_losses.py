"""Losses and all their gradients, from tokens on, equal PyLate's."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from reference.client import PyLateReference

from colbert_jax.colbert import Params, make_embed
from colbert_jax.huggingface import (
    Model,
    dense_table,
    get_path,
    read_model,
    read_weights,
    weight_table,
)
from colbert_jax.losses import contrastive_loss, distillation_loss
from colbert_jax.micro_batch import make_encode
from colbert_jax.optimizer import build_optimizer
from colbert_jax.train import make_loss_fn

TOLERANCE = 1e-5
PROMPTS = {"query": "search_query: ", "document": "search_document: "}
LENGTHS = {"query_length": 16, "document_length": 40}
COUNT = 6  # queries of a batch


@pytest.fixture(scope="module")
def folder(
    pylate: PyLateReference, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    path = tmp_path_factory.mktemp("losses") / "model"
    pylate.call(
        "make_model",
        folder=str(path),
        tokenizer_json=str(tokenizer_file),
        num_hidden_layers=2,  # one that attends globally, one locally
        config={"local_attention": 16},  # some expansion tokens have nothing in their window
        dense=[
            {"in_features": 64, "out_features": 48, "bias": True, "use_residual": True},
            {"in_features": 48, "out_features": 32},
        ],
        **LENGTHS,
    )
    return str(path)


@pytest.fixture(scope="module")
def queries(real_texts: list[str]) -> list[str]:
    """Most of them shorter than a query may be, so that there is expansion."""
    return [text for text in real_texts if 1 <= len(text.split()) <= 7]


@pytest.fixture(scope="module")
def documents(real_texts: list[str]) -> list[str]:
    return [text for text in real_texts if 3 <= len(text.split()) <= 60]


def loss_config(**settings: Any) -> dict[str, Any]:
    return {
        "kind": "contrastive",
        "temperature": 1.0,
        "normalize_scores": True,
        "masked_similarity": 0.0,
    } | settings


def make_batch(result: dict[str, Any], expands: bool, per_query: int) -> dict[str, Any]:
    """PyLate's token arrays as our batch: documents next to their query, expansion scored."""
    query, *documents = result["batches"]
    query = {name: query[name] for name in ("input_ids", "attention_mask", "scoring_mask")}
    if expands:
        query["scoring_mask"] = np.ones_like(query["scoring_mask"])
    count = len(query["input_ids"])
    width = max(batch["input_ids"].shape[1] for batch in documents)

    def gather(name: str) -> np.ndarray:
        arrays = [
            np.pad(batch[name], ((0, 0), (0, width - batch[name].shape[1]))) for batch in documents
        ]
        if len(arrays) == 1:
            return arrays[0].reshape(count, per_query, width)
        return np.stack(arrays, axis=1)

    batch = {"query": query, "document": {name: gather(name) for name in query}}
    masks = ("attention_mask", "scoring_mask")
    for side in batch.values():
        side |= {name: side[name].astype(bool) for name in masks}
    return batch


def by_name(model: Model, tree: Params) -> dict[str, np.ndarray]:
    """A tree of parameters or gradients by PyLate's names."""
    config = model.config
    tables = [("0.auto_model", weight_table(config.encoder))]
    tables += [(str(i + 1), dense_table(dense, i)) for i, dense in enumerate(config.projection)]
    return {
        f"{prefix}.{weight.name}": weight.to_theirs(np.asarray(get_path(tree, weight.path)))
        for prefix, table in tables
        for weight in table
    }


@functools.cache
def compiled(folder: str, settings: tuple[tuple[str, Any], ...]) -> tuple[Params, Callable]:
    model = read_model(folder)
    encode = make_encode(make_embed(model.config))
    loss_fn = make_loss_fn({"exchange": "gather", **dict(settings)}, encode, encode)
    return read_weights(folder, model, seed=0), jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


def value_and_gradient(
    folder: str, batch: dict[str, Any], config: dict[str, Any], loss_params: Params | None = None
) -> tuple[float, Params]:
    """Our loss and its gradient, in the structure of `{"model": ..., "loss": ...}`."""
    params, run = compiled(folder, tuple(config.items()))
    (loss, _), gradient = run({"model": params, "loss": loss_params or {}}, batch)
    return float(loss), jax.device_get(gradient)


def check_equal(
    folder: str,
    result: dict[str, Any],
    batch: dict[str, Any],
    config: dict[str, Any],
    factor: int = 1,
) -> None:
    """Compares value and gradients, each tensor relative to its largest element."""
    loss, gradient = value_and_gradient(folder, batch, config)
    ours = by_name(read_model(folder), gradient["model"])
    print(f"loss {loss:.6f}, relative difference {abs(loss / result['loss'] - 1):.1e}")
    assert loss == pytest.approx(result["loss"], rel=TOLERANCE)
    theirs = result["gradients"]
    assert ours.keys() == theirs.keys()
    differences = {
        name: np.abs(factor * ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()
        for name in theirs
    }
    worst = max(differences, key=differences.get)
    print(f"largest relative difference {differences[worst]:.1e}, of {worst}")
    assert differences[worst] <= TOLERANCE, differences


# The whole loss.

CONTRASTIVE: dict[str, tuple[int, dict[str, Any]]] = {
    "in_batch": (1, {}),
    "low_temperature": (1, {"temperature": 0.02}),
    "mined_negatives": (3, {"temperature": 0.2}),
    "prompts": (2, {"prompts": PROMPTS, "query_length": 23, "document_length": 47}),
    "no_expansion": (2, {"do_query_expansion": False}),
    "attended_expansion": (1, {"attend_to_expansion_tokens": True}),
}


def contrastive(
    pylate: PyLateReference,
    folder: str,
    queries: list[str],
    documents: list[str],
    per_query: int = 1,
    **settings: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    result = pylate.call(
        "contrastive",
        folder=folder,
        query_texts=queries[:COUNT],
        document_texts=[documents[i * per_query :][:per_query] for i in range(COUNT)],
        **settings,
    )
    batch = make_batch(result, settings.get("do_query_expansion", True), per_query)
    if not settings.get("attend_to_expansion_tokens"):
        assert 0.2 < np.mean(batch["query"]["attention_mask"]) < 0.8
    assert not batch["document"]["scoring_mask"].all(axis=-1).any()
    return result, batch


@pytest.mark.parity
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_contrastive_loss_and_gradients_equal_pylate(
    pylate: PyLateReference, folder: str, queries: list[str], documents: list[str], name: str
) -> None:
    per_query, settings = CONTRASTIVE[name]
    result, batch = contrastive(pylate, folder, queries, documents, per_query, **settings)
    config = loss_config(temperature=settings.get("temperature", 1.0))
    check_equal(folder, result, batch, config)


@pytest.mark.parity
def test_masking_tokens_out_equals_pylate_where_every_maximum_is_positive(
    pylate: PyLateReference, folder: str, queries: list[str], documents: list[str]
) -> None:
    # The default: a masked token never wins, while in PyLate it has similarity 0.
    long = [text for text in documents if len(text.split()) > 30]
    result, batch = contrastive(pylate, folder, queries, long, 2)
    check_equal(folder, result, batch, loss_config(masked_similarity=None))


@pytest.mark.parity
def test_padding_token_in_a_text_differs_from_pylate_in_its_own_row_only(
    pylate: PyLateReference, folder: str, queries: list[str], documents: list[str]
) -> None:
    spelt = ["copy [PAD]", *queries], [documents[0], "[PAD] in another's document", *documents[1:]]
    result, batch = contrastive(pylate, folder, *spelt)
    name = "0.auto_model.embeddings.tok_embeddings.weight"
    row = read_model(folder).tokenizer.tokenizer.convert_tokens_to_ids("[PAD]")
    _, gradient = value_and_gradient(folder, batch, loss_config())
    ours = by_name(read_model(folder), gradient["model"])
    # PyTorch leaves that row out of the gradient (`padding_idx`), though the token is attended to.
    assert ours[name][row].any() and not result["gradients"][name][row].any()
    result["gradients"][name][row] = ours[name][row]
    check_equal(folder, result, batch, loss_config())


@pytest.mark.parity
@pytest.mark.parametrize(
    ("normalize", "settings"),
    [
        (True, {}),
        (False, {}),
        (True, {"do_query_expansion": False}),
        (True, {"prompts": PROMPTS, "query_length": 23}),
    ],
    ids=["normalized", "plain", "no_expansion", "prompts"],
)
def test_distillation_loss_and_gradients_equal_pylate(
    pylate: PyLateReference,
    folder: str,
    queries: list[str],
    documents: list[str],
    normalize: bool,
    settings: dict[str, Any],
) -> None:
    count, candidates = 4, 9
    result = pylate.call(
        "distillation",
        folder=folder,
        query_texts=queries[:count],
        documents_texts=[documents[i * candidates :][:candidates] for i in range(count)],
        scores=(
            teacher := np.random.default_rng(0).normal(size=(count, candidates)).astype(np.float32)
        ),
        normalize_scores=normalize,
        **settings,
    )
    batch = make_batch(result, settings.get("do_query_expansion", True), candidates)
    batch["scores"] = teacher
    config = loss_config(kind="distillation", normalize_scores=normalize)
    check_equal(folder, result, batch, config)


# PyLate's cached loss, with which phase 1 was trained.


@pytest.mark.parity
def test_cached_contrastive_has_our_value_and_batch_size_times_our_gradients(
    pylate: PyLateReference, folder: str, queries: list[str], documents: list[str]
) -> None:
    settings = {"temperature": 0.2}
    result, batch = contrastive(pylate, folder, queries, documents, 3, cached=True, **settings)
    check_equal(folder, result, batch, loss_config(**settings), factor=COUNT)


@pytest.mark.parity
@pytest.mark.parametrize("clips", [False, True])
def test_gradient_of_the_sum_makes_the_step_of_the_cached_loss(
    pylate: PyLateReference, folder: str, queries: list[str], documents: list[str], clips: bool
) -> None:
    result, batch = contrastive(pylate, folder, queries, documents, 1, cached=True)
    _, gradient = value_and_gradient(folder, batch, loss_config())
    # Below the norm of PyLate's gradient, above that of ours.
    clip_norm = 3 * float(optax.tree.norm(gradient)) if clips else 0.0
    model = read_model(folder)
    params = {"model": read_weights(folder, model, seed=0), "loss": {}}
    before = by_name(model, params["model"])

    parameters = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in before.items()}
    for name, parameter in parameters.items():
        parameter.grad = torch.from_numpy(result["gradients"][name])
    if clip_norm:
        torch.nn.utils.clip_grad_norm_(parameters.values(), clip_norm)
    # A large epsilon, or the first step of AdamW would be the sign of the gradient, of any scale.
    torch.optim.AdamW(parameters.values(), lr=0.1, eps=1.0, weight_decay=0.01).step()

    def our_step(gradient_of: str) -> dict[str, np.ndarray]:
        config = {"learning_rate": 0.1, "warmup_steps": 0, "b1": 0.9, "b2": 0.999, "eps": 1.0}
        config |= {"weight_decay": 0.01, "clip_norm": clip_norm, "gradient_of": gradient_of}
        optimizer, _ = build_optimizer(config, total_steps=100, batch_size=COUNT)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return by_name(model, optax.apply_updates(params, updates)["model"])

    def largest_difference(after: dict[str, np.ndarray]) -> float:
        return max(np.abs(after[k] - parameters[k].detach().numpy()).max() for k in after)

    difference = largest_difference(our_step("sum"))
    print(f"largest difference of a step of 0.1: {difference:.1e}")
    assert difference <= TOLERANCE
    assert largest_difference(our_step("mean")) > 1e-2


# Each loss alone, against float64.


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def infonce(scores: np.ndarray, positives: np.ndarray, temperature: float) -> float:
    own = log_softmax(scores.astype(np.float64) / temperature)
    return -own[np.arange(len(scores)), positives].mean()


@pytest.mark.parametrize("temperature", [1.0, 0.02])
@pytest.mark.parametrize("per_query", [1, 3])
def test_contrastive_loss_equals_float64(temperature: float, per_query: int) -> None:
    scores = np.random.default_rng(0).normal(20, 5, (8, 8 * per_query)).astype(np.float32)
    positives = np.arange(8) * per_query
    scores[[1, 4], positives[[1, 4]]] = 60
    loss, accuracy = contrastive_loss(jnp.asarray(scores), jnp.asarray(positives), temperature)
    assert loss == pytest.approx(infonce(scores, positives, temperature), rel=1e-6)
    assert accuracy == np.mean(scores.argmax(axis=1) == positives) >= 0.25


@pytest.mark.parametrize("normalize", [True, False])
def test_distillation_loss_equals_float64(normalize: bool) -> None:
    rng = np.random.default_rng(0)
    scores, teacher = (rng.normal(10, 4, (8, 32)).astype(np.float32) for _ in range(2))
    scores[3], teacher[3] = scores[3].mean(), teacher[3].max()  # as equal as can be
    teacher[:2] = scores[:2]
    student = scores.astype(np.float64)
    if normalize:
        low, high = student.min(axis=1, keepdims=True), student.max(axis=1, keepdims=True)
        student = (student - low) / (high - low + 1e-8)
    target = log_softmax(teacher.astype(np.float64))
    expected = (np.exp(target) * (target - log_softmax(student))).sum(axis=1).mean()
    loss, agreement = distillation_loss(jnp.asarray(scores), jnp.asarray(teacher), normalize)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert agreement == np.mean(scores.argmax(axis=1) == teacher.argmax(axis=1)) >= 3 / 8


def test_equal_scores_give_a_finite_gradient() -> None:
    teacher = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)), jnp.float32)
    gradient = jax.grad(lambda scores: distillation_loss(scores, teacher)[0])(jnp.ones((2, 8)))
    assert np.isfinite(gradient).all()


@pytest.mark.parity
def test_gradient_of_a_learned_temperature_equals_finite_difference(
    pylate: PyLateReference, folder: str, queries: list[str], documents: list[str]
) -> None:
    result, batch = contrastive(pylate, folder, queries, documents, 2)
    start, step = np.log(0.3), 1e-5
    loss, gradient = value_and_gradient(
        folder, batch, loss_config(temperature=9.0), {"log_temperature": jnp.float32(start)}
    )
    positives = np.arange(COUNT) * 2
    ends = [infonce(result["scores"], positives, np.exp(start + s)) for s in (step, -step)]
    assert loss == pytest.approx(infonce(result["scores"], positives, 0.3), rel=TOLERANCE)
    expected = (ends[0] - ends[1]) / (2 * step)
    assert gradient["loss"]["log_temperature"] == pytest.approx(expected, rel=1e-4)
