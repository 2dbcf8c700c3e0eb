"""Prepared text as token ids: tokenized once, for one tokenizer and its prompts."""

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from colbert_jax.data.builders import ShardedBuilder, check_same
from colbert_jax.data.records import MANIFEST_FILE, TextSource, TokenSource, read_manifest
from colbert_jax.data.rows import Part
from colbert_jax.data.shards import Shard, Summary
from colbert_jax.data.tables import Stretch
from colbert_jax.errors import UserError
from colbert_jax.tokenization import ColbertTokenizer

_BLOCK_ROWS = 512  # rows that are tokenized at a time


class TokenJob:
    """Records of text as records of token ids."""

    def __init__(self, source: TextSource, tokenizer: ColbertTokenizer):
        self.source = source
        self.tokenizer = tokenizer
        self.features = token_features(tokenizer.vocab_size, source.has_scores)
        self.shards, first = [], 0
        for index, rows in enumerate(source.shard_lengths):
            self.shards.append(Shard(index, (Stretch(0, Part(first, rows), first),)))
            first += rows

    def examples(self, shard: Shard, summary: Summary) -> Iterator[dict[str, Any]]:
        """Yields the tokens of each row, cut to the tokenizer's lengths."""
        first, count = shard.stretches[0].first, shard.rows
        for start in range(first, first + count, _BLOCK_ROWS):
            rows = self.source.__getitems__(range(start, min(start + _BLOCK_ROWS, first + count)))
            queries = self.tokenizer.query_ids([row["query"] for row in rows])
            documents = iter(
                self.tokenizer.document_ids([text for row in rows for text in row["documents"]])
            )
            for number, (row, query) in enumerate(zip(rows, queries, strict=True), start + 1):
                own = [next(documents) for _ in row["documents"]]
                scored = row["scores"] is not None
                summary.read += 1
                summary.tokens += len(query) + sum(map(len, own))
                summary.keep(len(own), scored, f"row {number}")
                example: dict[str, Any] = {
                    "query": query,
                    "documents": list(itertools.chain.from_iterable(own)),
                    "lengths": [len(ids) for ids in own],
                }
                if scored:
                    example["scores"] = row["scores"]
                yield {
                    key: np.array(value, self.features[key].np_dtype)
                    for key, value in example.items()
                }


class TokenBuilder(ShardedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Token ids of a prepared source, in a folder within it, for one tokenizer and its prompts."""

    name = "tokens"

    def __init__(self, source: TextSource, tokenizer: ColbertTokenizer, tokenizer_name: str = ""):
        self._source, self._tokenizer, self._tokenizer_name = source, tokenizer, tokenizer_name
        config = tfds.core.BuilderConfig(name=token_folder(tokenizer), version=self.VERSION)
        super().__init__(data_dir=source.folder, config=config)

    def label(self) -> str:
        """What is tokenized, on the screen."""
        return f"{'/'.join(self._source.folder.parts[-3:-1])}: tokens"

    def get_features(self) -> tfds.features.FeaturesDict:
        """The columns of a record."""
        return token_features(self._tokenizer.vocab_size, self._source.has_scores)

    def request(self, resolved: bool) -> dict[str, Any]:
        """As `ShardedBuilder.request`."""
        config = self._tokenizer.config
        return {
            "fingerprint": self._tokenizer.fingerprint(),
            "query_length": config.query_length,
            "document_length": config.document_length,
            "text": text_digest(self._source),
        }

    def check_request(self, was: dict[str, Any]) -> None:
        """As `ShardedBuilder.check_request`; tokens that were cut later than asked for will do."""
        asked = self.request(resolved=False)
        for key in ("query_length", "document_length"):
            asked[key] = max(asked[key], was[key])
        check_same(was, asked, self.folder)

    def open_job(self) -> tuple[TokenJob, dict[str, Any]]:
        """One shard for each of the text."""
        config = self._tokenizer.config
        told = {
            "tokenizer": {
                "name": self._tokenizer_name,
                "fingerprint": self._tokenizer.fingerprint(),
                "vocab_size": self._tokenizer.vocab_size,
                "query_prompt": config.query_prompt,
                "document_prompt": config.document_prompt,
                "query_length": config.query_length,
                "document_length": config.document_length,
            }
        }
        return TokenJob(self._source, self._tokenizer), told


def token_features(vocab_size: int, scored: bool) -> tfds.features.FeaturesDict:
    """A record of tokens: ids of the query, ids of all documents in a row, and their lengths."""

    def vector(dtype: Any) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=(None,), dtype=dtype, encoding="bytes")

    ids = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    features = {"query": vector(ids), "documents": vector(ids), "lengths": vector(np.uint32)}
    return tfds.features.FeaturesDict(features | ({"scores": vector(np.float32)} if scored else {}))


def text_digest(source: TextSource) -> str:
    """SHA-256 of a prepared source's rows, which its tokens must have been made of."""
    digests = [shard["rows_sha256"] for shard in source.manifest["shards"]]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def token_folder(tokenizer: ColbertTokenizer) -> str:
    """What the tokens of a tokenizer are called, within a prepared source's `tokens`."""
    return tokenizer.fingerprint()[:16]


def open_source_tokens(name: str, source: TextSource, tokenizer: ColbertTokenizer) -> TokenSource:
    """The tokens of a prepared source.

    Args:
      name: what messages call the source.
      source: its text.
      tokenizer: the model's.

    Raises:
      UserError: it has no tokens, those of another tokenizer or prompt, or cut too short.
    """
    parent = source.folder / TokenBuilder.name
    folder = parent / token_folder(tokenizer) / str(TokenBuilder.VERSION)
    prepare = "run launch/prepare.py with --tokenizer, or set config.input.tokenized=False"
    if not (folder / MANIFEST_FILE).is_file():
        others = [
            read_manifest(path.parent)["tokenizer"] for path in parent.glob("*/*/manifest.json")
        ]
        if not others:
            raise UserError(f"Source {name} ({source.folder}) has no tokens: {prepare}.")
        made = "; ".join(
            f"{other['name']} with prompts {other['query_prompt']!r} and "
            f"{other['document_prompt']!r} (hash {other['fingerprint'][:16]})"
            for other in others
        )
        config = tokenizer.config
        raise UserError(
            f"Source {name} ({source.folder}) was tokenized for {made}, but the run's prompts are "
            f"{config.query_prompt!r} and {config.document_prompt!r}, and the hash with its "
            f"tokenizer is {token_folder(tokenizer)}: {prepare}."
        )
    tokens = TokenSource(folder)
    if tokens.manifest["request"]["text"] != text_digest(source):
        raise UserError(
            f"Source {name} ({folder}) was tokenized from other text than that beside it: remove "
            f"the folder and {prepare}."
        )
    for key in ("query_length", "document_length"):
        stored, wanted = tokens.manifest["tokenizer"][key], getattr(tokenizer.config, key)
        if stored < wanted:
            raise UserError(
                f"Source {name} ({folder}) was tokenized with {key}={stored}, but "
                f"config.model.{key}={wanted}: lower it, or remove the folder and {prepare}."
            )
    return tokens
