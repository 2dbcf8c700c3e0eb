"""Test collections by name: BEIR folders, NanoBEIR and BEIR on the Hugging Face Hub."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Collection as Names
from pathlib import Path, PurePosixPath
from typing import Any

from colbert_jax.data.hub import Hub
from colbert_jax.data.rows import RowError, read_table
from colbert_jax.errors import UserError
from colbert_jax.retrieval.collection import Collection, read_beir

logger = logging.getLogger(__name__)

# The thirteen of NanoBEIR, 50 queries each; as PyLate's evaluator names and takes them.
NANO_BEIR = {
    f"Nano{name}": f"zeta-alpha-ai/Nano{name}"
    for name in (
        "ClimateFEVER",
        "DBPedia",
        "FEVER",
        "FiQA2018",
        "HotpotQA",
        "MSMARCO",
        "NFCorpus",
        "NQ",
        "QuoraRetrieval",
        "SCIDOCS",
        "ArguAna",
        "SciFact",
        "Touche2020",
    )
}

# BEIR's names on the hub where they are not `BeIR/NAME`; CQADupStack is twelve forums.
_FORUMS = (
    "android",
    "english",
    "gaming",
    "gis",
    "mathematica",
    "physics",
    "programmers",
    "stats",
    "tex",
    "unix",
    "webmasters",
    "wordpress",
)
_BEIR_NAMES = {"touche2020": "webis-touche2020"}
_DEV_SPLITS = {"msmarco": "dev"}  # the split that BEIR's table reports, where it is not `test`


def open_dataset(
    name: str, split: str | None = None, hub: Hub | None = None
) -> Iterator[Collection]:
    """Reads the collections of a data set, one after the other.

    Args:
      name: a folder in BEIR's layout; a folder of such folders, whose parts count as one (BEIR's
        CQADupStack); `nanobeir`, or one of its parts as `nanobeir/SciFact`; or `beir/NAME`.
      split: which judgements; BEIR's own by default, `test` but for MS MARCO.
      hub: where the names of the hub lead.

    Raises:
      UserError: there is no such data set, or something in it cannot be used.
    """
    hub = hub or Hub()
    if name.strip() and Path(name).is_dir():
        yield from _open_folder(Path(name), split or "test")
    elif name.lower() == "nanobeir":
        for part, dataset in NANO_BEIR.items():
            yield _read_hub(hub, part, dataset, dataset, "train", strip=False)
    elif name.lower().startswith("nanobeir/"):
        wanted = name.partition("/")[2].lower().removeprefix("nano")
        known = {part.lower().removeprefix("nano"): part for part in NANO_BEIR}
        if wanted not in known:
            raise UserError(
                f"NanoBEIR has no part {name.partition('/')[2]!r}: choose one of "
                f"{', '.join(part.removeprefix('Nano') for part in NANO_BEIR)}."
            )
        part = known[wanted]
        yield _read_hub(hub, part, NANO_BEIR[part], NANO_BEIR[part], "train", strip=False)
    elif name.lower() == "beir/cqadupstack":
        for forum in _FORUMS:
            dataset = f"mteb/cqadupstack-{forum}"
            part = f"cqadupstack-{forum}"
            yield _read_hub(hub, part, dataset, dataset, split or "test", group="cqadupstack")
    elif name.lower().startswith("beir/"):
        short = name.partition("/")[2].lower()
        dataset = f"BeIR/{_BEIR_NAMES.get(short, short)}"
        chosen = split or _DEV_SPLITS.get(short, "test")
        yield _read_hub(hub, short, dataset, f"{dataset}-qrels", chosen)
    else:
        raise UserError(
            f"{name!r} is no data set: give a folder in BEIR's layout (corpus.jsonl, "
            "queries.jsonl, qrels/test.tsv), nanobeir, or beir/NAME such as beir/scifact."
        )


def _open_folder(folder: Path, split: str) -> Iterator[Collection]:
    parts = sorted(p for p in folder.iterdir() if (p / "corpus.jsonl").is_file())
    if (folder / "corpus.jsonl").is_file() or not parts:
        yield read_beir(folder, split)
        return
    for part in parts:
        read = read_beir(part, split)
        whole = folder.resolve().name
        yield Collection(
            f"{whole}-{read.name}", read.documents, read.queries, read.qrels, group=whole
        )


def _read_hub(
    hub: Hub,
    name: str,
    dataset: str,
    qrels_dataset: str,
    split: str,
    group: str = "",
    strip: bool = True,
) -> Collection:
    """A collection whose corpus, queries and judgements are files of data sets of the hub.

    Documents are stripped as `read_beir` does; PyLate's evaluator of NanoBEIR does not do so.
    """
    logger.info("reading %s from the hub", dataset)
    commit = hub.commit(dataset, None)
    files = hub.files(dataset, commit)

    def table(part: str, choose: Callable[[Names[str]], list[str]]) -> Iterator[dict[str, Any]]:
        found = [file for file in files if _belongs(file, part)]
        if not found:
            raise UserError(f"{dataset} on the hub has no {part} as Parquet or JSON Lines.")
        for file in _of_one_format(found):
            yield from _rows(hub.fetch(dataset, commit, file), choose)

    documents = dict(_texts(table("corpus", _text_columns), f"{dataset}, corpus"))
    if strip:
        documents = {document_id: text.strip() for document_id, text in documents.items()}
    texts = dict(_texts(table("queries", _text_columns), f"{dataset}, queries"))
    qrels = _read_qrels(hub, qrels_dataset, split)
    for query_id in [q for q in qrels if q not in texts]:  # NFCorpus judges one that is not there
        logger.warning(
            "%s judges the query %r, which it does not have; left out", dataset, query_id
        )
        del qrels[query_id]
    if not qrels:
        raise UserError(f"{dataset} on the hub has no judgements of the split {split!r}.")
    queries = {query_id: texts[query_id] for query_id in texts if query_id in qrels}
    return Collection(name, documents, queries, qrels, group)


def _read_qrels(hub: Hub, dataset: str, split: str) -> dict[str, dict[str, int]]:
    commit = hub.commit(dataset, None)
    files = hub.files(dataset, commit)
    found = [f for f in files if _stem(f) == split and f.endswith(".tsv")]
    found += [f for f in files if _is_table(f) and _stem(f) == split and "corpus" not in f]
    found = [f for f in found if "queries" not in f and "corpus" not in f]
    if not found:
        raise UserError(f"{dataset} on the hub has no judgements of the split {split!r}.")
    qrels: dict[str, dict[str, int]] = {}
    for file in _of_one_format(found):
        for row in _judgements(hub.fetch(dataset, commit, file), f"{dataset}, {file}"):
            # NanoBEIR's have no score: what is listed is relevant.
            relevance = _relevance(row.get("score", 1), f"{dataset}, {file}")
            qrels.setdefault(str(row["query-id"]), {})[str(row["corpus-id"])] = relevance
    return qrels


def _of_one_format(files: Sequence[str]) -> list[str]:
    """The files to read, sorted; the hub may hold the same rows in two formats."""
    first = next(e for e in (".parquet", ".tsv", "") if any(file.endswith(e) for file in files))
    return sorted(file for file in files if file.endswith(first))


def _relevance(score: Any, where: str) -> int:
    try:
        relevance = int(score)
        whole = float(score) == relevance
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise UserError(f"{where} has the relevance {score!r}, which is no whole number.")
    return relevance


def _judgements(path: Path, where: str) -> Iterator[Mapping[str, Any]]:
    def choose(found: Names[str]) -> list[str]:
        if not {"query-id", "corpus-id"} <= set(found):
            raise RowError(
                f"the columns found are {', '.join(found)}; query-id and corpus-id are wanted"
            )
        return [name for name in ("query-id", "corpus-id", "score") if name in found]

    if path.suffix != ".tsv":
        yield from _rows(path, choose)
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        names = next(file, "").rstrip("\r\n").split("\t")
        try:
            choose(names)
        except RowError as error:
            raise UserError(f"{where}: {error}.") from error
        for number, line in enumerate(file, 2):
            fields = line.rstrip("\r\n").split("\t")
            if len(fields) == len(names):
                yield dict(zip(names, fields, strict=True))
            elif line.strip():
                raise UserError(f"{where}, line {number}, is not a judgement.")


def _texts(rows: Iterable[Mapping[str, Any]], where: str) -> Iterator[tuple[str, str]]:
    for row in rows:
        title, text = row.get("title") or "", row.get("text")
        if row.get("_id") is None or not isinstance(text, str):
            raise UserError(f"{where} has a row without an id or a text; it cannot be used.")
        yield str(row["_id"]), f"{title} {text}" if title else text


def _text_columns(found: Names[str]) -> list[str]:
    if not {"_id", "text"} <= set(found):
        raise RowError(f"the columns found are {', '.join(found)}; _id and text are wanted")
    return [name for name in ("_id", "title", "text") if name in found]


def _rows(path: Path, choose: Callable[[Names[str]], list[str]]) -> Iterator[dict[str, Any]]:
    for number, row in read_table(path, choose):
        if isinstance(row, RowError):
            raise UserError(f"{path}, row {number}: {row}.")
        yield row


def _belongs(file: str, part: str) -> bool:
    """Whether a file holds a table: `corpus.jsonl.gz`, `corpus/train-00000-of-00001.parquet`."""
    return _is_table(file) and (file.split("/")[0] == part or _stem(file) == part)


def _is_table(file: str) -> bool:
    return file.endswith((".parquet", ".jsonl", ".jsonl.gz"))


def _stem(file: str) -> str:
    """What a file holds by its name: `qrels/test-00000-of-00001.parquet` is `test`."""
    return PurePosixPath(file).name.split(".")[0].partition("-0")[0]
