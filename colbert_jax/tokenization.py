"""Text to ids and masks, as PyLate's `ColBERT.tokenize` does it.

prompt + text -> tokens with [CLS] and [SEP], cut to length - 1 -> the marker `[Q] ` or `[D] ` at
position 1 -> for queries, padding with [MASK] up to the query length ("query expansion").

Two masks leave here and keep their names everywhere: `attention_mask` says which tokens the
encoder may look at, `scoring_mask` which tokens MaxSim may use. Expansion makes them differ for
queries, the skip list for documents.
"""

import dataclasses
import hashlib
import itertools
import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from colbert_jax.errors import UserError, brief

TokenBatch = dict[str, np.ndarray]  # input_ids int32, attention_mask and scoring_mask bool
Ids = Sequence[int] | np.ndarray  # [token], of any integer type


LONGEST = 1_000_000  # tokens; every query is padded to its length, an absurd one would fill memory


@dataclasses.dataclass(frozen=True)
class TokenizationConfig:
    """How texts become tokens; the defaults are PyLate's.

    Attributes:
      query_length: tokens of a query, markers and special tokens included.
      document_length: most tokens of a document, likewise.
      query_prefix: marker token of queries, trailing space included; "" for none.
      document_prefix: marker token of documents.
      do_query_expansion: whether queries are padded to `query_length` with [MASK] and the padding
        scored.
      attend_to_expansion_tokens: whether the encoder may look at that padding.
      skiplist_words: tokens that never score in a document.
      query_prompt: text put before every query, such as "search_query: ".
      document_prompt: text put before every document.
      do_lower_case: whether texts are lower-cased first (`sentence_bert_config.json`).
    """

    query_length: int = 32
    document_length: int = 180
    query_prefix: str = "[Q] "
    document_prefix: str = "[D] "
    do_query_expansion: bool = True
    attend_to_expansion_tokens: bool = False
    skiplist_words: tuple[str, ...] = tuple(string.punctuation)
    query_prompt: str = ""
    document_prompt: str = ""
    do_lower_case: bool = False

    def __post_init__(self):
        for name in ("query_length", "document_length"):
            if getattr(self, name) < 4:
                raise UserError(
                    f"{name} is {getattr(self, name)}: it must be at least 4 tokens, to hold "
                    "[CLS], the marker, one token of text and [SEP]."
                )
            if getattr(self, name) > LONGEST:
                raise UserError(
                    f"{name} is {getattr(self, name)}: no more than {LONGEST} tokens can be asked "
                    "for."
                )


_HALF_PAIR = re.compile("[\ud800-\udfff]")


def whole(text: str) -> str:
    """A text as a model reads it: JSON can hold half of a surrogate pair, tokenizers refuse it."""
    return text if text.isascii() else _HALF_PAIR.sub("\ufffd", text)


class Piece(NamedTuple):
    """What a token stands for.

    Attributes:
      label: its stretch of the text, or its name where it has none.
      span: where that stands in the text, `(start, end)` in characters; None for special tokens,
        markers and the prompt.
    """

    label: str
    span: tuple[int, int] | None


class ColbertTokenizer:
    """A Hugging Face tokenizer with ColBERT's markers, lengths, expansion and skip list."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: TokenizationConfig):
        """Adds the markers to the tokenizer's vocabulary and makes [MASK] its padding.

        Raises:
          UserError: the tokenizer has no [MASK] token, or can encode nothing.
        """
        if tokenizer.mask_token_id is None:
            raise UserError(
                "The tokenizer has no mask token, which pads queries: set `mask_token` in its "
                "tokenizer_config.json."
            )
        markers = [m for m in (config.query_prefix, config.document_prefix) if m]
        # Not normalized: a lower-casing tokenizer would keep "[Q] " as "[q] ", which PyLate does
        # not find again.
        known = tokenizer.get_vocab()
        tokenizer.add_tokens(
            [tokenizers.AddedToken(m, normalized=False) for m in markers if m not in known]
        )
        tokenizer.pad_token = tokenizer.mask_token
        self.config = config
        self.tokenizer = tokenizer
        self.pad_id: int = tokenizer.mask_token_id
        self._fingerprint: str | None = None
        ids = [tokenizer.convert_tokens_to_ids(word) for word in config.skiplist_words]
        self._skipped = np.zeros(len(tokenizer), bool)
        self._skipped[[i for i in ids if i is not None]] = True
        # How many special tokens end a text: [SEP], where a tokenizer has it.
        try:
            encoding = tokenizer.backend_tokenizer.encode("a")
        except Exception as error:  # tokenizers raises bare ones
            raise UserError(
                f"The tokenizer cannot encode a text ({brief(error)}): replace its tokenizer.json."
            ) from error
        if max(encoding.ids, default=0) >= len(tokenizer):
            raise UserError(
                f"The tokenizer gives a text ids beyond its {len(tokenizer)} tokens: replace its "
                "tokenizer.json."
            )
        marks = encoding.special_tokens_mask
        for name in ("query_length", "document_length"):
            if sum(marks) + 1 >= getattr(config, name):
                raise UserError(
                    f"{name} is {getattr(config, name)}: the tokenizer's {sum(marks)} special "
                    "tokens and the marker leave no room for a text."
                )
        self._tail = len(list(itertools.takewhile(bool, reversed(marks))))
        self._queries = self._side(config.query_prefix, config.query_length)
        self._documents = self._side(config.document_prefix, config.document_length)

    def _side(self, marker: str, length: int) -> tuple[tokenizers.Tokenizer, int | None]:
        # A tokenizer carries its truncation as state, so each side gets a copy of its own and
        # threads never change what another is using.
        backend = tokenizers.Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.enable_truncation(length - 1 if marker else length)
        return backend, backend.token_to_id(marker) if marker else None

    @property
    def vocab_size(self) -> int:
        """Number of ids, markers included: the fewest rows an embedding table must have."""
        return len(self.tokenizer)

    def fingerprint(self) -> str:
        """SHA-256 of all that decides which ids a text becomes, its cut aside.

        The files of a tokenizer may differ and mean the same: truncation, padding and decoding play
        no part here, and neither do `[PAD]`, expansion and the skip list.
        """
        if self._fingerprint is None:  # a fifth of a second, for each source of a corpus
            self._fingerprint = self._work_out_fingerprint()
        return self._fingerprint

    def _work_out_fingerprint(self) -> str:
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        parts = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")
        fields = ("query_prefix", "document_prefix", "query_prompt", "document_prompt")
        decides = {name: backend[name] for name in parts}
        decides |= {name: getattr(self.config, name) for name in (*fields, "do_lower_case")}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def query_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each query, prompt and marker included, cut to `query_length`."""
        return self._ids(texts, self.config.query_prompt, self._queries)

    def document_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each document, prompt and marker included, cut to `document_length`."""
        return self._ids(texts, self.config.document_prompt, self._documents)

    def query_pieces(self, text: str) -> list[Piece]:
        """What each token of `query_ids([text])` stands for."""
        return self._pieces(text, self.config.query_prompt, self._queries)

    def document_pieces(self, text: str) -> list[Piece]:
        """What each token of `document_ids([text])` stands for."""
        return self._pieces(text, self.config.document_prompt, self._documents)

    def queries(self, texts: Sequence[str]) -> TokenBatch:
        """Tokenizes queries.

        Args:
          texts: one string a query, without the prompt.

        Returns:
          `input_ids[query, token]` int32, `attention_mask[query, token]` and
          `scoring_mask[query, token]` bool. With expansion, and in either case to keep one static
          shape, queries are `query_length` tokens long; without it the padding never scores.
        """
        return self.query_batch(self.query_ids(texts))

    def query_batch(self, ids: Sequence[Ids]) -> TokenBatch:
        """`queries`, of texts that are tokens already, cut to `query_length` where they are longer.

        Args:
          ids: the tokens of each query, as `query_ids` gives them.
        """
        config = self.config
        batch = self._pad(ids, config.query_length)
        if config.do_query_expansion:
            batch["scoring_mask"] = np.ones_like(batch["attention_mask"])
            if config.attend_to_expansion_tokens:
                batch["attention_mask"] = np.ones_like(batch["attention_mask"])
        else:
            batch["scoring_mask"] = batch["attention_mask"].copy()
        return batch

    def documents(self, texts: Sequence[str], length: int | None = None) -> TokenBatch:
        """Tokenizes documents.

        Args:
          texts: one string a document, without the prompt.
          length: tokens to pad to; None pads to the longest of these texts. Longer texts than
            `document_length` are cut to it in either case.

        Returns:
          `input_ids[document, token]` int32, `attention_mask[document, token]` and
          `scoring_mask[document, token]` bool.
        """
        return self.document_batch(self.document_ids(texts), length)

    def document_batch(self, ids: Sequence[Ids], length: int | None = None) -> TokenBatch:
        """`documents`, of texts that are tokens already.

        Args:
          ids: the tokens of each document, as `document_ids` gives them.
          length: as in `documents`.
        """
        longest = self.config.document_length
        if length is None:
            length = max(map(len, ids), default=0)
        batch = self._pad(ids, min(length, longest))
        batch["scoring_mask"] = batch["attention_mask"] & ~self._skipped[batch["input_ids"]]
        return batch

    def _ids(
        self, texts: Sequence[str], prompt: str, side: tuple[tokenizers.Tokenizer, int | None]
    ) -> list[list[int]]:
        backend, marker_id = side
        cleaned = [self._clean(prompt + text) for text in texts]
        try:
            rows = [encoding.ids for encoding in backend.encode_batch_fast(cleaned)]
        except Exception as error:  # a word that the vocabulary lacks, where it has no [UNK]
            raise UserError(
                f"The tokenizer cannot encode a text ({brief(error)}): replace its tokenizer.json."
            ) from error
        if marker_id is None:
            return rows
        return [[*ids[:1], marker_id, *ids[1:]] for ids in rows]

    def _clean(self, text: str) -> str:
        text = whole(text.strip())
        return text.lower() if self.config.do_lower_case else text

    def _pieces(
        self, text: str, prompt: str, side: tuple[tokenizers.Tokenizer, int | None]
    ) -> list[Piece]:
        backend, marker_id = side
        whole = prompt + text
        cleaned = self._clean(whole)
        # From places in what is tokenized to places in the text; a letter of which lower-casing
        # makes two would shift all that follows, so there is none then.
        shift = len(whole) - len(whole.lstrip()) - len(prompt)
        shifted = len(cleaned) == len(whole.strip())
        pieces = []
        encoding = backend.encode(cleaned)
        for token, (start, end), special in zip(
            encoding.tokens, encoding.offsets, encoding.special_tokens_mask, strict=True
        ):
            if special or start == end:
                pieces.append(Piece(token, None))
                continue
            start += len(cleaned[start:end]) - len(cleaned[start:end].lstrip())
            inside = shifted and start + shift >= 0 and start < end
            span = (start + shift, end + shift) if inside else None
            pieces.append(Piece(cleaned[start:end] or token, span))
        if marker_id is not None:
            marker = backend.id_to_token(marker_id) or ""
            pieces.insert(1, Piece(marker.strip(), None))
        return pieces

    def _pad(self, rows: Sequence[Ids], width: int) -> TokenBatch:
        # What ends a text stays when it is cut, as the tokenizer's own truncation has it.
        body = width - self._tail
        arrays = [
            np.asarray(
                ids if len(ids) <= width else [*ids[:body], *ids[len(ids) - self._tail :]], np.int32
            )
            for ids in rows
        ]
        lengths = np.fromiter(map(len, arrays), np.int32, len(arrays))
        mask = np.arange(width) < lengths[:, None]
        input_ids = np.full(mask.shape, self.pad_id, np.int32)
        input_ids[mask] = np.concatenate([np.zeros(0, np.int32), *arrays])
        return {"input_ids": input_ids, "attention_mask": mask}


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Loads the tokenizer files of a folder; no code from the folder is run.

    Raises:
      UserError: the folder holds no tokenizer that Transformers can read.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json: add the model's tokenizer files to it.")
    _check_file_names(Path(folder) / "tokenizer_config.json")
    try:
        # Before Transformers has it written down: tokenizers then prints every id that is left out.
        backend = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        _check_ids(folder, backend.get_vocab())
        # Left open, a folder that names code of its own would have the user asked about it.
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except UserError:
        raise
    except Exception as error:  # the two libraries raise whatever a file provokes, bare ones too
        raise UserError(
            f"The tokenizer in {folder} cannot be read ({brief(error)}): replace its "
            "tokenizer files."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"The tokenizer in {folder} is a {type(tokenizer).__name__}, which does not read "
            "tokenizer.json: name another tokenizer_class in its tokenizer_config.json."
        )
    _check_ids(folder, tokenizer.get_vocab())
    return tokenizer


def _check_ids(folder: str | Path, vocabulary: Mapping[str, int]) -> None:
    """Checks that ids can be rows of a table as long as the vocabulary."""
    largest = max(vocabulary.values(), default=-1)
    if largest >= len(vocabulary):
        raise UserError(
            f"The tokenizer in {folder} has {len(vocabulary)} tokens with ids up to {largest}: a "
            "vocabulary whose ids leave some out cannot be used."
        )


def _check_file_names(path: Path) -> None:
    """Checks that a tokenizer's settings name no file elsewhere, which Transformers would open."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["fast_tokenizer_files"]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return  # there are no such names, or Transformers finds the file unreadable too
    names = names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{path} names fast_tokenizer_files outside of the folder: remove them.")


# A new word starts at `camel|Case` and at `HTTP|Server`.
HUMPS = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, words_only: bool = False
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE with ModernBERT's special tokens.

    Args:
      texts: what to train on.
      vocab_size: number of ids, special tokens included.
      words_only: whether names are cut at underscores and camel-case humps, everything is
        lower-cased, and all but letters and digits is dropped. That suits a small model of source
        code: `getItems` and "get items" become the same tokens, and fewer of them.

    Returns:
      A tokenizer that any Transformers user can load; the same texts give the same tokenizer.
    """
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words_only:
        backend.normalizer = tokenizers.normalizers.Sequence(
            [
                tokenizers.normalizers.NFC(),
                tokenizers.normalizers.Replace(tokenizers.Regex(HUMPS), " "),
                tokenizers.normalizers.Lowercase(),
            ]
        )
        no_word = tokenizers.Regex(r"[^\p{L}\p{N}]+")
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(no_word, "removed"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
    )
