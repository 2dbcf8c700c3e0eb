"""Answer calls with PyLate, from an environment that holds PyLate but not colbert_jax.

`client.py` starts this program and sends it pairs (function name, arguments). Each is answered by
(True, result) or (False, traceback). Tensors travel as numpy arrays, both ways. The functions
marked `@served` can be called; where one takes `**settings`, they are arguments of
`pylate.models.ColBERT` (query_length, document_length, do_query_expansion, query_prefix,
attend_to_expansion_tokens, skiplist_words, ...) and go over what the model's folder says.
"""

import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from pylate import evaluation, losses, models, scores
from pylate.losses.contrastive import extract_skiplist_mask
from pylate.utils import ColBERTCollator
from sentence_transformers.models import Transformer

Array = np.ndarray
Features = list[dict[str, torch.Tensor]]

_kd_scores = scores.colbert_kd_scores  # `distillation` has an argument called scores
_SERVED: dict[str, Callable[..., Any]] = {}


def served(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let the client call this function."""
    _SERVED[function.__name__] = function
    return function


@served
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the numbers."""
    names = (
        "numpy",
        "pylate",
        "ranx",
        "sentence-transformers",
        "tokenizers",
        "torch",
        "transformers",
    )
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


# Making and saving models.


@served
def make_encoder(
    folder: str,
    tokenizer_json: str,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    num_hidden_layers: int = 4,
    num_attention_heads: int = 4,
    vocab_size: int | None = None,
    seed: int = 0,
    masked_lm: bool = False,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Save a random ModernBERT and its tokenizer as Transformers does, with nothing of PyLate's.

    Args:
        folder: Where to save.
        tokenizer_json: A tokenizer file that has ModernBERT's five special tokens.
        hidden_size: Width of the model.
        intermediate_size: Width of the MLPs' inside.
        num_hidden_layers: Number of layers.
        num_attention_heads: Number of heads.
        vocab_size: Rows of the embedding; by default as many as the tokenizer has tokens.
        seed: Seed of the weights.
        masked_lm: Whether to save the model with its MLM head, as the hub's base checkpoint is.
        config: Further settings of ModernBertConfig.

    Returns:
        The configuration as a dictionary.
    """
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad")}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=tokenizer_json,
        mask_token=transformers.AddedToken("[MASK]", lstrip=True, normalized=False, special=True),
        model_max_length=8192,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=True,
        **special,
    )
    settings: dict[str, Any] = {
        "vocab_size": vocab_size or len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "sep_token_id": tokenizer.sep_token_id,
    }
    built = transformers.ModernBertConfig(**(settings | (config or {})))
    kind = transformers.ModernBertForMaskedLM if masked_lm else transformers.ModernBertModel
    encoder = kind(built)
    _randomise(encoder, seed)
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return built.to_dict()


@served
def make_colbert(
    encoder: str,
    folder: str,
    dense: list[dict[str, Any]] | None = None,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Make a PyLate model from a folder of Transformers, and save it.

    Args:
        encoder: A folder as `make_encoder` saves it.
        folder: Where to save.
        dense: The projections, each with `in_features`, `out_features`, and optionally `bias`
            (false), `activation` (the name of a class of torch.nn, "Identity") and
            `use_residual` (false). By default PyLate adds its own, with no bias, to 128.
        seed: Seed of the projections and of the embeddings of new tokens.
        **settings: Arguments of ColBERT.

    Returns:
        What `describe` returns.
    """
    torch.manual_seed(seed)
    if dense is None:
        model = models.ColBERT(encoder, device="cpu", **settings)
    else:
        layers = [_dense(**layer) for layer in dense]
        for index, layer in enumerate(layers):
            _randomise(layer, seed + 1 + index)
        model = models.ColBERT(modules=[Transformer(encoder), *layers], device="cpu", **settings)
    model.save(folder)
    return _describe(model, folder)


@served
def make_model(
    folder: str,
    tokenizer_json: str,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    num_hidden_layers: int = 4,
    num_attention_heads: int = 4,
    vocab_size: int | None = None,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    dense: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Make a random PyLate model and save it: `make_encoder`, then `make_colbert`."""
    with tempfile.TemporaryDirectory() as encoder:
        make_encoder(
            encoder,
            tokenizer_json,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            vocab_size=vocab_size,
            seed=seed,
            config=config,
        )
        return make_colbert(encoder, folder, dense=dense, seed=seed, **settings)


@served
def roundtrip(folder: str, output: str, **settings: Any) -> dict[str, Any]:
    """Load a model with PyLate, save it again, and return what `describe` returns."""
    model = _load(folder, settings)
    model.save(output)
    return _describe(model, output)


@served
def describe(folder: str, **settings: Any) -> dict[str, Any]:
    """Say what PyLate makes of a folder.

    Returns:
        `parameters` (name to shape), `modules` (class names), `files` (sorted relative paths),
        the settings query_prefix, document_prefix, query_length, document_length,
        do_query_expansion, attend_to_expansion_tokens, skiplist_words, prompts,
        default_prompt_name and similarity_fn_name, the ids `query_prefix_id`,
        `document_prefix_id`, `skiplist` and `special_ids` (pad, mask, cls, sep, unk), and
        `tokens`, the number of tokens of the tokenizer.
    """
    return _describe(_load(folder, settings), folder)


# Running models.


@served
def tokenize(
    folder: str,
    texts: list[str],
    is_query: bool,
    pad: bool = False,
    prompt: str | None = None,
    **settings: Any,
) -> dict[str, Array]:
    """Tokenize texts as one batch.

    Args:
        folder: The model.
        texts: The texts.
        is_query: Whether they are queries.
        pad: Whether to pad to the full length rather than to the longest text. PyLate does so in
            training, and always for queries that are expanded.
        prompt: A text to put before each.
        **settings: Arguments of ColBERT.

    Returns:
        `input_ids`, `attention_mask` and the boolean `scoring_mask`, each [texts, tokens].
    """
    model = _load(folder, settings)
    batch = model.tokenize([(prompt or "") + text for text in texts], is_query=is_query, pad=pad)
    return {
        "input_ids": batch["input_ids"].numpy(),
        "attention_mask": batch["attention_mask"].numpy(),
        "scoring_mask": _scoring_mask(model, batch, is_query).numpy(),
    }


@served
def encode(
    folder: str,
    texts: list[str],
    is_query: bool,
    prompt: str | None = None,
    padded: bool = False,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> list[Array] | dict[str, list[Array]]:
    """Encode texts.

    Args:
        folder: The model.
        texts: The texts.
        is_query: Whether they are queries.
        prompt: A text to put before each; None leaves the choice to the model's default prompt.
        padded: Whether to pad all with zeros to the same number of tokens.
        options: Further arguments of ColBERT.encode (batch_size, prompt_name, pool_factor, ...).
        **settings: Arguments of ColBERT.

    Returns:
        An array [tokens scored, dim] for each text. With `options={"output_value": None}` a
        dictionary of such lists, unfiltered: `token_embeddings` [tokens, dim], and `input_ids`,
        `attention_mask` and `masks`, each [tokens].
    """
    result = _load(folder, settings).encode(
        texts,
        is_query=is_query,
        prompt=prompt,
        padding=padded,
        show_progress_bar=False,
        **(options or {}),
    )

    def plain(arrays: list[Array]) -> list[Array]:
        # PyLate leaves a leading axis of one on each padded array.
        return [array[0] if padded else array for array in arrays]

    if isinstance(result, dict):
        return {key: plain(arrays) for key, arrays in result.items()}
    return plain(result)


@served
def project(folder: str, hidden: Array, **settings: Any) -> Array:
    """Apply a model's projections alone to [..., hidden], with no normalisation after."""
    features = {"token_embeddings": torch.from_numpy(hidden)}
    with torch.no_grad():
        for layer in list(_load(folder, settings))[1:]:
            features = layer(features)
    return features["token_embeddings"].numpy()


@served
def token_embeddings(
    folder: str, input_ids: Array, attention_mask: Array, **settings: Any
) -> Array:
    """Run a whole model on tokens: [batch, tokens, dim], normalised, with nothing masked."""
    model = _load(folder, settings).eval()
    batch = {
        "input_ids": torch.from_numpy(input_ids).long(),
        "attention_mask": torch.from_numpy(attention_mask).long(),
    }
    with torch.no_grad():
        output = model(batch)["token_embeddings"]
        return torch.nn.functional.normalize(output, p=2, dim=-1).numpy()


@served
def modernbert(
    config: dict[str, Any],
    state: dict[str, Array],
    input_ids: Array,
    attention_mask: Array,
    attention: str = "sdpa",
    all_layers: bool = False,
) -> Array | list[Array]:
    """Run Transformers' ModernBERT in fp32 with the weights given.

    Args:
        config: The settings, as in a config.json.
        state: Every weight of ModernBertModel by its name.
        input_ids: Tokens, [batch, tokens].
        attention_mask: Which tokens are attended to, [batch, tokens].
        attention: "eager" or "sdpa".
        all_layers: Whether to return the output of the embedding and of every layer.

    Returns:
        The last hidden state, [batch, tokens, hidden], or with `all_layers` a list of those: the
        embedding's, each layer's, of which the last has gone through the final norm.
    """
    model = transformers.ModernBertModel._from_config(
        transformers.ModernBertConfig.from_dict(config),
        attn_implementation=attention,
        dtype=torch.float32,
    )
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    output = _run(model, input_ids, attention_mask, output_hidden_states=all_layers)
    if all_layers:
        return [hidden.numpy() for hidden in output.hidden_states]
    return output.last_hidden_state.numpy()


@served
def automodel(
    folder: str, input_ids: Array, attention_mask: Array, attention: str = "sdpa"
) -> dict[str, Any]:
    """Load a folder with Transformers alone and run it in fp32.

    Returns:
        `last_hidden_state` [batch, tokens, hidden], and the sorted `missing_keys` and
        `unexpected_keys` of the load, both empty for a sound folder.
    """
    model, info = transformers.AutoModel.from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32, output_loading_info=True
    )
    return {
        "last_hidden_state": _run(model, input_ids, attention_mask).last_hidden_state.numpy(),
        "missing_keys": sorted(info["missing_keys"]),
        "unexpected_keys": sorted(info["unexpected_keys"]),
    }


# Scores and losses.


@served
def colbert_scores(
    queries: Array,
    documents: Array,
    queries_mask: Array | None = None,
    documents_mask: Array | None = None,
) -> Array:
    """Score every query against every document.

    Args:
        queries: [queries, query tokens, dim].
        documents: [documents, document tokens, dim].
        queries_mask: [queries, query tokens].
        documents_mask: [documents, document tokens].

    Returns:
        [queries, documents].
    """
    return _score(scores.colbert_scores, queries, documents, queries_mask, documents_mask)


@served
def colbert_kd_scores(
    queries: Array,
    documents: Array,
    queries_mask: Array | None = None,
    documents_mask: Array | None = None,
) -> Array:
    """Score each query against its own candidates.

    Args:
        queries: [queries, query tokens, dim].
        documents: [queries, candidates, document tokens, dim].
        queries_mask: [queries, query tokens].
        documents_mask: [queries, candidates, document tokens].

    Returns:
        [queries, candidates].
    """
    return _score(scores.colbert_kd_scores, queries, documents, queries_mask, documents_mask)


@served
def contrastive(
    folder: str,
    query_texts: list[str],
    document_texts: list[list[str]],
    temperature: float = 1.0,
    prompts: dict[str, str] | None = None,
    cached: bool = False,
    mini_batch_size: int = 2,
    score_mini_batch_size: int | None = None,
    size_average: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Compute the contrastive loss of one batch, and its gradients.

    Args:
        folder: The model.
        query_texts: One text for each query.
        document_texts: One list for each query: its positive, then its negatives. All lists are
            of the same length.
        temperature: What the scores are divided by.
        prompts: The texts to put before `query` and before `document`.
        cached: Whether to use CachedContrastive rather than Contrastive.
        mini_batch_size: Texts encoded at a time, when cached.
        score_mini_batch_size: Queries scored at a time.
        size_average: Whether the loss is the mean over the queries rather than their sum.
        **settings: Arguments of ColBERT.

    Returns:
        `loss` (a float), `gradients` (name of each parameter to an array of its shape), `scores`
        [queries, queries x documents of each] before the temperature, query i's positive in column
        i x documents of each, and `batches`: of the queries, then of all positives, then of all
        first negatives and so on, each a dictionary of `input_ids`, `attention_mask` and
        `scoring_mask`, [queries, tokens]. A query's scoring mask is the loss's own, that is the
        attention mask, which it uses only when queries are not expanded.
    """
    model = _trainable(folder, settings)
    rows = []
    for query, documents in zip(query_texts, document_texts, strict=True):
        columns = {f"document_{index}": document for index, document in enumerate(documents)}
        rows.append({"query": query} | columns)
    features, _ = _collate(model, rows, prompts)
    seen: list[torch.Tensor] = []
    arguments: dict[str, Any] = {
        "model": model,
        "score_metric": _recorded(scores.ColBERTScores(), seen),
        "score_mini_batch_size": score_mini_batch_size,
        "size_average": size_average,
        "temperature": temperature,
    }
    if cached:
        loss = losses.CachedContrastive(mini_batch_size=mini_batch_size, **arguments)
    else:
        loss = losses.Contrastive(**arguments)
    return _backward(model, features, loss(features), seen)


@served
def distillation(
    folder: str,
    query_texts: list[str],
    documents_texts: list[list[str]],
    scores: Array,
    prompts: dict[str, str] | None = None,
    normalize_scores: bool = True,
    size_average: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Compute the distillation loss of one batch, and its gradients.

    Args:
        folder: The model.
        query_texts: One text for each query.
        documents_texts: The list of each query's candidates, all of the same length.
        scores: The teacher's, [queries, candidates].
        prompts: The texts to put before `query` and before `document`.
        normalize_scores: Whether each query's scores are brought between 0 and 1.
        size_average: Whether the loss is the mean over the queries rather than their sum.
        **settings: Arguments of ColBERT.

    Returns:
        As `contrastive` does, but `scores` are [queries, candidates] (the student's, before they
        are normalised), and the second and last batch is [queries x candidates, tokens], one
        query's candidates after the other's.
    """
    model = _trainable(folder, settings)
    rows = [
        {"query": query, "documents": documents, "scores": list(map(float, row))}
        for query, documents, row in zip(query_texts, documents_texts, scores, strict=True)
    ]
    features, labels = _collate(model, rows, prompts)
    seen: list[torch.Tensor] = []
    loss = losses.Distillation(
        model,
        score_metric=_recorded(_kd_scores, seen),
        size_average=size_average,
        normalize_scores=normalize_scores,
    )
    return _backward(model, features, loss(features, labels), seen)


# Evaluation.


@served
def evaluate(
    folder: str,
    collection: str,
    split: str = "test",
    depth: int = 100,
    **settings: Any,
) -> dict[str, Any]:
    """Rank all documents of a collection for each query, and measure the ranking.

    Args:
        folder: The model; its own prompts named `query` and `document` are used.
        collection: A folder in BEIR's layout.
        split: The judgements, `qrels/<split>.tsv`; queries that have none are left out.
        depth: Documents of a ranking that are kept.
        **settings: Arguments of ColBERT.

    Returns:
        `ndcg@10`, the mean; `ndcg@10_of_each`, query id to value; and `rankings`, query id to a
        list of pairs (document id, score), best first.
    """
    documents, queries, qrels = _load_collection(Path(collection), split)
    model = _load(folder, settings)
    asked = _encode_side(model, list(queries.values()), is_query=True)
    found = _encode_side(model, list(documents.values()), is_query=False)
    results = _rank_exactly(asked, found, list(documents))
    kept = {query: hits[:depth] for query, hits in zip(queries, results, strict=True)}

    def measure(judged: dict[str, dict[str, int]]) -> float:
        hits = [kept[query] for query in judged]
        # PyLate returns the bare number where there is one metric alone.
        return float(evaluation.evaluate(hits, judged, list(judged), metrics=["ndcg@10"]))

    return {
        "ndcg@10": measure({query: qrels[query] for query in queries}),
        "ndcg@10_of_each": {query: measure({query: qrels[query]}) for query in queries},
        "rankings": {
            query: [(hit["id"], hit["score"]) for hit in hits] for query, hits in kept.items()
        },
    }


def _load_collection(
    folder: Path, split: str
) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    """Read documents, queries and judgements as `evaluation.load_custom_dataset` gives them.

    That function leaves the reading to the package beir, which writes "None" where a document has
    no title, so only its rule for a document's text is followed here.
    """

    def rows(name: str) -> list[dict[str, Any]]:
        lines = (folder / name).read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]

    documents = {
        row["_id"]: f"{row.get('title') or ''} {row['text']}".strip()
        for row in rows("corpus.jsonl")
    }
    qrels: dict[str, dict[str, int]] = {}
    lines = (folder / "qrels" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
    for query_id, document_id, relevance in (line.split("\t") for line in lines[1:]):
        qrels.setdefault(query_id, {})[document_id] = int(relevance)
    queries = {row["_id"]: row["text"] for row in rows("queries.jsonl") if row["_id"] in qrels}
    return documents, queries, qrels


def _encode_side(model: models.ColBERT, texts: list[str], is_query: bool) -> list[torch.Tensor]:
    side = "query" if is_query else "document"
    return model.encode(
        texts,
        is_query=is_query,
        prompt_name=side if side in model.prompts else None,
        convert_to_tensor=True,
        show_progress_bar=False,
    )


def _rank_exactly(
    queries: list[torch.Tensor], documents: list[torch.Tensor], ids: list[str], at_a_time: int = 32
) -> list[list[dict[str, Any]]]:
    """Score every pair with documents of like length together, so that none is padded.

    PyLate's mask of documents, and `rank.rerank`, would not do: the similarities of padding are 0
    there, and win over negative ones. Those of the queries' padding add nothing to a sum.
    """
    padded = torch.nn.utils.rnn.pad_sequence(queries, batch_first=True)
    table = torch.empty(len(queries), len(documents))
    places: dict[int, list[int]] = {}
    for place, document in enumerate(documents):
        places.setdefault(len(document), []).append(place)
    for alike in places.values():
        for start in range(0, len(alike), at_a_time):
            part = alike[start : start + at_a_time]
            stacked = torch.stack([documents[place] for place in part])
            table[:, part] = scores.colbert_scores(padded, stacked)
    ordered, order = torch.sort(table, dim=1, descending=True, stable=True)
    return [
        [{"id": ids[place], "score": score} for place, score in zip(*row, strict=True)]
        for row in zip(order.tolist(), ordered.tolist(), strict=True)
    ]


def _load(folder: str, settings: dict[str, Any]) -> models.ColBERT:
    return models.ColBERT(folder, device="cpu", **settings)


def _trainable(folder: str, settings: dict[str, Any]) -> models.ColBERT:
    """Load a model in training mode, and insist that it has no dropout to blur the numbers."""
    model = _load(folder, settings).train()
    rates = {name: part.p for name, part in model.named_modules() if hasattr(part, "p")}
    encoder = model[0].auto_model.config.to_dict()
    rates |= {name: rate for name, rate in encoder.items() if name.endswith("_dropout")}
    if active := {name: rate for name, rate in rates.items() if rate}:
        raise ValueError(f"dropout is not zero: {active}")
    return model


def _dense(
    in_features: int,
    out_features: int,
    bias: bool = False,
    activation: str = "Identity",
    use_residual: bool = False,
) -> models.Dense:
    return models.Dense(
        in_features,
        out_features,
        bias=bias,
        activation_function=getattr(torch.nn, activation)(),
        use_residual=use_residual,
    )


def _randomise(module: torch.nn.Module, seed: int) -> None:
    """Draw every weight anew, norms too, large enough that each of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {
        id(part.weight) for part in module.modules() if isinstance(part, torch.nn.Embedding)
    }
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                noise = 1 + 0.2 * noise if name.endswith("weight") else 0.1 * noise
            elif id(parameter) not in embeddings:
                noise /= parameter.shape[1] ** 0.5
            parameter.copy_(noise)


def _describe(model: models.ColBERT, folder: str) -> dict[str, Any]:
    root = Path(folder)
    tokenizer = model.tokenizer
    names = (
        "query_prefix",
        "document_prefix",
        "query_length",
        "document_length",
        "do_query_expansion",
        "attend_to_expansion_tokens",
        "skiplist_words",
        "prompts",
        "default_prompt_name",
        "similarity_fn_name",
        "query_prefix_id",
        "document_prefix_id",
        "skiplist",
    )
    return {name: getattr(model, name) for name in names} | {
        "parameters": {name: tuple(value.shape) for name, value in model.named_parameters()},
        "modules": [f"{type(part).__module__}.{type(part).__qualname__}" for part in model],
        "files": sorted(
            path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()
        ),
        "special_ids": {
            name: getattr(tokenizer, f"{name}_token_id")
            for name in ("pad", "mask", "cls", "sep", "unk")
        },
        "tokens": len(tokenizer),
    }


def _scoring_mask(
    model: models.ColBERT, batch: dict[str, torch.Tensor], is_query: bool
) -> torch.Tensor:
    """Return the tokens that ColBERT.encode keeps."""
    attended = batch["attention_mask"].bool()
    if not is_query:
        return attended & model.skiplist_mask(batch["input_ids"], skiplist=model.skiplist)
    return torch.ones_like(attended) if model.do_query_expansion else attended


def _run(model: Any, input_ids: Array, attention_mask: Array, **options: Any) -> Any:
    with torch.no_grad():
        return model.eval()(
            input_ids=torch.from_numpy(input_ids).long(),
            attention_mask=torch.from_numpy(attention_mask).long(),
            **options,
        )


def _score(function: Callable[..., torch.Tensor], *arrays: Array | None) -> Array:
    tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
    return function(*tensors).numpy()


def _recorded(
    function: Callable[..., torch.Tensor], seen: list[torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """Keep the scores that a loss computes."""

    def score(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = function(*args, **kwargs)
        seen.append(result.detach())
        return result

    return score


def _collate(
    model: models.ColBERT, rows: list[dict[str, Any]], prompts: dict[str, str] | None
) -> tuple[Features, torch.Tensor | None]:
    """Tokenize rows with PyLate's collator and split its batch by column, as its trainer does."""
    columns = [name for name in rows[0] if name != "scores"]
    named = {
        column: (prompts or {}).get("query" if column == "query" else "document", "")
        for column in columns
    }
    batch = ColBERTCollator(tokenize_fn=model.tokenize, prompts=named)(rows)
    features = [
        {key: batch[f"{column}_{key}"] for key in ("input_ids", "attention_mask")}
        for column in columns
    ]
    return features, batch.get("label")


def _backward(
    model: models.ColBERT, features: Features, loss: torch.Tensor, seen: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """Back-propagate a loss and gather what a test compares."""
    loss.backward()
    masks = extract_skiplist_mask(features, skiplist=model.skiplist)
    return {
        "loss": loss.item(),
        "gradients": {
            name: np.zeros(parameter.shape, np.float32)
            if parameter.grad is None
            else parameter.grad.numpy()
            for name, parameter in model.named_parameters()
        },
        "scores": torch.cat(list(seen)).numpy(),
        "batches": [
            {
                "input_ids": feature["input_ids"].numpy(),
                "attention_mask": feature["attention_mask"].numpy(),
                "scoring_mask": mask.numpy(),
            }
            for feature, mask in zip(features, masks, strict=True)
        ],
    }


def main() -> None:
    """Serve calls until the client hangs up."""
    connection = Connection(int(sys.argv[1]))
    torch.set_num_threads(min(4, os.cpu_count() or 1))
    # The client shows the last lines printed should this process die: keep them to the point.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    connection.send((True, None))
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        try:
            if name not in _SERVED:
                raise ValueError(f"no function {name!r}; there are {', '.join(sorted(_SERVED))}")
            answer = (True, _SERVED[name](**arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        connection.send(answer)


if __name__ == "__main__":
    main()
