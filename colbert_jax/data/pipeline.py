"""The endless stream of batches: which rows come at which step, on every host alike."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import grain

from colbert_jax.data.records import Source
from colbert_jax.data.rows import Row, cut_documents
from colbert_jax.errors import UserError

Encode = Callable[[list[Row], int], dict[str, Any]]

_logger = logging.getLogger(__name__)


def make_batches(
    sources: Mapping[str, Source],
    *,
    encode: Encode,
    batch_size: int,
    max_documents: int,
    seed: int,
    process_index: int,
    process_count: int,
    num_threads: int = 2,
    prefetch: int = 4,
) -> grain.IterDataset:
    """Returns this host's part of an endless stream of global batches.

    Every global batch is drawn from one source, so that the other rows of a batch are hard
    negatives. Within an epoch a source gives each of its rows once, but for the few that do not
    fill a last batch, so sources take turns exactly in proportion to their size; each epoch has
    another order. Which rows make up the batch of a step, and their order, follows from the seed,
    the sources' names and lengths, and the batch size: not from the number of hosts.

    The stream's iterator has `get_state()` and `set_state()`, whose state, `{"next_index": step}`,
    is fit for JSON and good for any number of hosts and threads. Close the iterator when done.

    Args:
      sources: rows by name; the order of the names does not matter.
      encode: called with this host's rows of a batch and their common number of documents;
        returns a dictionary of arrays. It runs in several threads at once.
      batch_size: rows in a global batch, over all hosts.
      max_documents: at most this many documents of a row are used; a batch has as many for each
        row as the row of its source that has fewest, if that is less.
      seed: any integer.
      process_index: this host, from 0.
      process_count: the number of hosts. Host `i` has the `i`-th of that many equal contiguous
        parts of every global batch.
      num_threads: threads that read and encode batches ahead of time; 0 for none.
      prefetch: batches made ahead of time; 0 for none.

    Raises:
      UserError: the hosts cannot share the batch equally, or no source fills a batch.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"A global batch of {batch_size} rows cannot be shared equally by {process_count} "
            f"hosts: make the batch size a multiple of {process_count}."
        )
    if max_documents < 1:
        raise UserError(f"A row needs a document, but at most {max_documents} were asked for.")
    if not 0 <= process_index < process_count:
        raise ValueError(f"host {process_index} is not one of {process_count}")

    usable = _sources_that_fill_a_batch(sources, batch_size)
    orders = {name: _row_order(len(source), name, seed) for name, source in usable.items()}
    share = batch_size // process_count

    def read_batch(place: tuple[str, int]) -> dict[str, Any]:
        name, start = place
        source, order = usable[name], orders[name]
        first = start + process_index * share
        indices = [order[position] for position in range(first, first + share)]
        documents = min(source.min_documents, max_documents)
        rows = [cut_documents(row, documents) for row in source.__getitems__(indices)]
        return encode(rows, documents)

    places = [_batch_places(name, len(usable[name]), batch_size) for name in usable]
    batches = grain.MapDataset.concatenate(places).shuffle(seed=_derive_seed(seed, "mixture"))
    return (
        batches.repeat()
        .map(read_batch)
        .to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch))
    )


def batches_per_epoch(sources: Mapping[str, Source], batch_size: int) -> int:
    """Returns how many global batches of `batch_size` rows the sources give in an epoch."""
    return sum(len(source) // batch_size for source in sources.values())


def _sources_that_fill_a_batch(sources: Mapping[str, Source], batch_size: int) -> dict[str, Source]:
    usable = {}
    for name in sorted(sources):
        if len(sources[name]) >= batch_size:
            usable[name] = sources[name]
        else:
            _logger.warning(
                "source %s has %d rows, fewer than a global batch of %d, and so gives no batch",
                name,
                len(sources[name]),
                batch_size,
            )
    if not usable:
        sizes = ", ".join(f"{name} has {len(source)}" for name, source in sources.items())
        raise UserError(
            f"No source has the {batch_size} rows of a global batch ({sizes or 'none was given'}): "
            "make the batch smaller or give more rows."
        )
    return usable


def _row_order(length: int, name: str, seed: int) -> grain.MapDataset:
    """Returns the endless order of a source's rows: entry `epoch * length + i` is a row's index.

    grain shuffles epoch `e` with `seed + e`. Sources therefore need unrelated seeds, or those of
    equal length would go through the same orders an epoch apart.
    """
    order = grain.MapDataset.range(length).shuffle(seed=_derive_seed(seed, f"source {name}"))
    order[0]  # grain sets up its statistics on the first access, which threads must not race for
    return order


def _batch_places(name: str, length: int, batch_size: int) -> grain.MapDataset:
    """Returns `(name, where the batch starts in the source's endless order)` of a source's batches.

    `MapDataset.batch` would yield the row indices themselves, but computes those of all hosts on
    each host: a fifth of a second for 16,384 of them.
    """
    count = length // batch_size

    def locate(index: int, _: int) -> tuple[str, int]:
        epoch, batch = divmod(index, count)  # grain counts on through the epochs
        return name, epoch * length + batch * batch_size

    return grain.MapDataset.range(count).map_with_index(locate)


def _derive_seed(seed: int, purpose: str) -> int:
    """Returns 32 bits that are unrelated for any two purposes or seeds."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:4], "big")
