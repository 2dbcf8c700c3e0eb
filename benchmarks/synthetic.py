"""The model of `step.py` and `encode.py`, and their texts, which have stated lengths.

Weights are random and words made up.
"""

import argparse
import gzip
import json
import string
from pathlib import Path

import jax
import numpy as np
import tokenizers
from jaxtyping import Int
from transformers import PreTrainedTokenizerFast

from colbert_jax.colbert import ColbertConfig, DenseConfig, init_params
from colbert_jax.errors import UserError
from colbert_jax.huggingface import Model, encoder_json, save_model
from colbert_jax.modernbert import ModernBertConfig
from colbert_jax.tokenization import ColbertTokenizer, TokenizationConfig, train_tokenizer

SHORTEST = 8  # tokens: [CLS], the marker, a prompt, a word, [SEP]
SPECIAL = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
PUNCTUATION_SHARE = 0.1  # of a document's tokens: what the skip list removes


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, np.ndarray]:
    """Saves the model to `folder`, where both sides read it, and returns the batch.

    Raises:
      UserError: the texts of --real-text, or its tokenizer, cannot be used.
    """
    model, lengths = _prepare_model(args, folder)
    return make_batch(args, model.tokenizer, lengths)


def prepare_documents(
    args: argparse.Namespace, folder: Path
) -> tuple[list[str], Int[np.ndarray, "N"]]:
    """Saves the model to `folder` as `prepare` does, and returns documents as text.

    Returns:
      N texts, and `lengths[document]`, the tokens that the tokenizer makes of each: `[CLS]`, the
      marker and `[SEP]` are among them.

    Raises:
      UserError: as `prepare`.
    """
    model, lengths = _prepare_model(args, folder)
    ids = make_batch(args, model.tokenizer, lengths)["document_input_ids"]
    words = model.tokenizer.tokenizer.convert_ids_to_tokens
    # What stands around a text is the tokenizer's to add.
    rows = zip(ids, lengths["document"], strict=True)
    texts = [" ".join(words(row[2 : length - 1].tolist())) for row, length in rows]
    return texts, lengths["document"]


def _prepare_model(args: argparse.Namespace, folder: Path) -> tuple[Model, dict[str, np.ndarray]]:
    """Saves the model, and returns it with the tokens that each text is to have."""
    jax.config.update("jax_platforms", "cpu")  # this process only prepares
    lengths = real_lengths(args) if args.real_text else drawn_lengths(args)
    model = make_model(args)
    save_model(folder, model, init_params(model.config, 0), "A benchmark's.\n")
    return model, lengths


def drawn_lengths(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Tokens of each text, drawn as the head of `step.py` says."""
    rng = np.random.default_rng(1)
    documents = rng.lognormal(np.log(args.document_tokens / 2), 0.7, args.pairs)
    return {
        "query": rng.integers(SHORTEST, args.query_tokens + 1, args.pairs),
        "document": np.clip(documents.astype(int), SHORTEST, args.document_tokens),
    }


def real_lengths(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Tokens of texts spread evenly over a file, prompt and marker included, cut as in training."""
    rows = read_rows(Path(args.real_text))
    if len(rows) < args.pairs:
        raise UserError(
            f"--real-text={args.real_text} has {len(rows)} pairs, {args.pairs} are needed"
        )
    chosen = [rows[i * len(rows) // args.pairs] for i in range(args.pairs)]
    if args.tokenizer:
        try:
            tokenizer = tokenizers.Tokenizer.from_file(args.tokenizer)
        except Exception as error:  # what the library raises
            raise UserError(f"--tokenizer={args.tokenizer} cannot be read ({error})") from error
    else:
        texts = (row[side] for row in rows[:20_000] for side in ("query", "document"))
        tokenizer = train_tokenizer(texts, 30_000).backend_tokenizer

    def count(side: str, longest: int) -> np.ndarray:
        texts = [f"search_{side}: {row[side]}" for row in chosen]
        with_marker = [len(encoding.ids) + 1 for encoding in tokenizer.encode_batch(texts)]
        return np.minimum(with_marker, longest)

    return {
        "query": count("query", args.query_tokens),
        "document": count("document", args.document_tokens),
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    """All pairs of a file."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return [{side: str(row[side]) for side in ("query", "document")} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--real-text={path} is no JSON Lines file of query and document ({error!r})"
        ) from error


def make_batch(
    args: argparse.Namespace, tokenizer: ColbertTokenizer, lengths: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Random tokens of the given lengths, with the masks that the tokenizer would give."""
    rng = np.random.default_rng(0)
    hf, first_word = tokenizer.tokenizer, len(SPECIAL) + len(string.punctuation)
    marks = hf.convert_tokens_to_ids(list(string.punctuation))
    batch = {}
    for side, width in (("query", args.query_tokens), ("document", args.document_tokens)):
        shape = (args.pairs, width)
        ids = rng.integers(first_word, args.vocabulary, shape)
        if side == "document":
            ids = np.where(rng.random(shape) < PUNCTUATION_SHARE, rng.choice(marks, shape), ids)
        ids[:, 0] = hf.cls_token_id
        ids[:, 1] = hf.convert_tokens_to_ids(getattr(tokenizer.config, f"{side}_prefix"))
        attended = np.arange(width) < lengths[side][:, None]
        ids = np.where(attended, ids, tokenizer.pad_id)
        # Expanded queries score at every position, documents where they are no punctuation.
        scored = attended & ~np.isin(ids, marks) if side == "document" else np.ones(shape, bool)
        batch |= {
            f"{side}_input_ids": ids.astype(np.int32),
            f"{side}_attention_mask": attended,
            f"{side}_scoring_mask": scored,
        }
    return batch


def make_model(args: argparse.Namespace) -> Model:
    """A ModernBERT of the size asked for, with a vocabulary of made-up words."""
    made_up = args.vocabulary - len(SPECIAL) - len(string.punctuation)
    words = [*SPECIAL, *string.punctuation, *(f"word{i}" for i in range(made_up))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(x, words.index(x)) for x in ("[CLS]", "[SEP]")]
    )
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    settings = TokenizationConfig(
        query_length=args.query_tokens, document_length=args.document_tokens
    )
    tokenizer = ColbertTokenizer(hf, settings)
    encoder = ModernBertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
    )
    # The padding that the encoder is told of stays [PAD]: PyTorch does not train that row, and
    # [MASK]'s is trained.
    ids = {name: SPECIAL.index(f"[{name.upper()}]") for name in ("cls", "sep", "pad")}
    fields = encoder_json(encoder, **ids)
    config = ColbertConfig(encoder, (DenseConfig(args.hidden),))
    return Model(config, tokenizer, fields, "random weights of a benchmark")
