"""The endless stream of batches: which rows come at which step, on every host alike."""

import hashlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from colbert_jax.data.records import Source
from colbert_jax.data.rows import Row, cut_documents
from colbert_jax.errors import UserError

Encode = Callable[[list[Row], int], dict[str, Any]]

_GRACE_SECONDS = 120.0  # of a worker that was asked to end

_logger = logging.getLogger(__name__)


class Batches:
    """An endless stream of batches, that can be taken up at any step.

    Its state, `{"next_index": step, "sources": digest}`, is fit for JSON and good for any number of
    hosts, worker processes and threads. Close it when done.
    """

    def __init__(
        self,
        make_stream: Callable[[int], grain.IterDataset],
        origin: Callable[[int], tuple[str, list[int]]],
        sources: str,
    ):
        """Begins at step 0.

        Args:
          make_stream: `make_stream(step)` makes the dataset of the batches from a step on.
          origin: `origin(step)` is the source of a batch, and which of its rows this host's are.
          sources: a digest of what decides, beside a run's config, which rows come when.
        """
        self._make_stream = make_stream
        self.origin = origin
        self._sources = sources
        self._next_index = 0
        self._iterator: grain.DatasetIterator | None = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Any]:
        if self._iterator is None:
            self._iterator = iter(self._make_stream(self._next_index))
        batch = next(self._iterator)
        self._next_index += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position."""
        return {"next_index": self._next_index, "sources": self._sources}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position.

        Raises:
          UserError: it is one in other sources, where other rows would follow.
        """
        if state.get("sources", self._sources) != self._sources:
            raise UserError(
                "The sources have other names or numbers of rows than when the checkpoint was "
                "written, so that other rows would follow: prepare them as they were, or start "
                "another run from it with config.init_from."
            )
        self.close()
        self._next_index = int(state["next_index"])

    def close(self) -> None:
        """Ends worker processes and threads; the next batch starts them anew."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def make_batches(
    sources: Mapping[str, Source],
    *,
    encode: Encode,
    batch_size: int,
    max_documents: int,
    seed: int,
    process_index: int,
    process_count: int,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 4,
) -> Batches:
    """Returns this host's part of an endless stream of global batches.

    Every global batch is drawn from one source, so that the other rows of a batch are hard
    negatives. Within an epoch a source gives each of its rows once, but for the few that do not
    fill a last batch, so sources take turns exactly in proportion to their size; each epoch has
    another order. Which rows make up the batch of a step, and their order, follows from the seed,
    the sources' names and lengths, and the batch size: not from the number of hosts.

    Args:
      sources: rows by name; the order of the names does not matter.
      encode: called with this host's rows of a batch and their common number of documents;
        returns a dictionary of arrays. It runs in several threads at once.
      batch_size: rows in a global batch, over all hosts.
      max_documents: at most this many documents of a row are used; a batch has as many for each
        row as the row of its source that has fewest, if that is less. A row with more gives its
        first, or, where they are scored candidates, some that are drawn anew in each epoch.
      seed: any integer.
      process_index: this host, from 0.
      process_count: the number of hosts. Host `i` has the `i`-th of that many equal contiguous
        parts of every global batch.
      workers: processes that read and encode batches ahead of time; 0 leaves that to this one.
      threads: threads of each of them that do so; 0 for none.
      prefetch: batches that each of them makes ahead of time.

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
    draws = {name: _derive_seed(seed, f"candidates {name}") for name in usable}
    share = batch_size // process_count
    places = [_batch_places(name, len(usable[name]), batch_size) for name in usable]
    mixture = grain.MapDataset.concatenate(places).shuffle(seed=_derive_seed(seed, "mixture"))
    steps = mixture.repeat()
    steps[0]  # as in _row_order

    def find_rows(step: int) -> tuple[str, range]:
        """The source of a step's batch, and where in its order this host's rows are."""
        name, start = steps[step]
        first = start + process_index * share
        return name, range(first, first + share)

    def origin(step: int) -> tuple[str, list[int]]:
        name, positions = find_rows(step)
        return name, [int(orders[name][position]) for position in positions]

    def read_batch(step: int) -> dict[str, Any]:
        name, positions = find_rows(step)
        source, order = usable[name], orders[name]
        documents = min(source.min_documents, max_documents)
        rows = source.__getitems__([order[position] for position in positions])
        if source.has_scores:
            rows = [
                _draw_candidates(row, documents, (draws[name], position))
                for row, position in zip(rows, positions, strict=True)
            ]
        else:
            rows = [cut_documents(row, documents) for row in rows]
        return encode(rows, documents)

    def make_stream(step: int) -> grain.IterDataset:
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        stream = grain.MapDataset.range(step, sys.maxsize).map(read_batch).to_iter_dataset(options)
        if not workers:
            return stream
        if not flags.FLAGS.is_parsed():  # grain hands them on to the workers
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        return stream.mp_prefetch(processes, worker_init_fn=_start_worker)

    sizes = {name: len(source) for name, source in sources.items()}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()
    return Batches(make_stream, origin, digest[:16])


def _start_worker(index: int, count: int) -> None:
    del index, count
    os.environ["JAX_PLATFORMS"] = "cpu"  # a worker never takes the accelerator from its parent
    # A scheduler asks all processes of a job to end. The run is to save first, and may need some
    # more batches until then; at its end it closes its workers itself.
    signal.signal(signal.SIGTERM, lambda number, frame: _end_after(_GRACE_SECONDS))


def _end_after(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, (0,))
    timer.daemon = True
    timer.start()


def _draw_candidates(row: Row, documents: int, seed: tuple[int, int]) -> Row:
    count = len(row["documents"])
    if count <= documents:
        return row
    chosen = np.random.default_rng(seed).choice(count, documents, replace=False, shuffle=False)
    return cut_documents(row, sorted(chosen.tolist()))


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
