"""The batch stream: every row once an epoch, one source a batch, the same on every host."""

import itertools
import json
import multiprocessing
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colbert_jax.data.corpora import file_builder
from colbert_jax.data.pipeline import batches_per_epoch, make_batches
from colbert_jax.data.records import ListSource, TextSource
from colbert_jax.data.text import TextBuilder
from colbert_jax.errors import UserError


def _source(name, count, documents=1, *, scores=False):
    return ListSource(
        {
            "query": f"{name}/{i}",
            "documents": [f"{name}/{i}/{j}" for j in range(documents)],
            "scores": [float(j) for j in range(documents)] if scores else None,
        }
        for i in range(count)
    )


def _encode(rows, documents):
    return {
        "query": np.array([row["query"] for row in rows]),
        "documents": np.array([row["documents"] for row in rows]).reshape(-1, documents),
    }


def _batches(
    sources,
    *,
    batch_size,
    seed=0,
    host=0,
    hosts=1,
    threads=0,
    workers=0,
    encode=_encode,
    max_documents=4,
):
    return make_batches(
        sources,
        encode=encode,
        batch_size=batch_size,
        max_documents=max_documents,
        seed=seed,
        process_index=host,
        process_count=hosts,
        workers=workers,
        threads=threads,
        prefetch=2 * threads,
    )


def _take(batches, count, state=None):
    iterator = iter(batches)
    try:
        if state is not None:
            iterator.set_state(state)
        return [batch["query"].tolist() for batch in itertools.islice(iterator, count)]
    finally:
        iterator.close()


def _names(batch):
    return {query.split("/")[0] for query in batch}


@st.composite
def mixtures(draw):
    batch_size = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, 25), min_size=1, max_size=3))
    sizes[0] += batch_size  # at least one fills a batch
    sources = {f"s{i}": _source(f"s{i}", size) for i, size in enumerate(sizes)}
    return sources, batch_size, draw(st.integers(0, 2**40))


# grain's shuffle walks through 65,536 values an epoch however short the range: few examples.
quick = settings(max_examples=12, deadline=None)


@quick
@given(mixtures())
def test_an_epoch_has_every_row_once_but_the_remainder(mixture):
    sources, batch_size, seed = mixture
    per_epoch = batches_per_epoch(sources, batch_size)
    batches = _take(_batches(sources, batch_size=batch_size, seed=seed), 2 * per_epoch)
    for epoch in range(2):
        part = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        rows = list(itertools.chain(*part))
        assert len(set(rows)) == len(rows)
        found = Counter(row.split("/")[0] for row in rows)
        for name, source in sources.items():
            assert found[name] == len(source) // batch_size * batch_size


@quick
@given(mixtures())
def test_a_batch_is_of_one_source_and_sources_come_in_proportion_to_their_size(mixture):
    sources, batch_size, seed = mixture
    per_epoch = batches_per_epoch(sources, batch_size)
    batches = _take(_batches(sources, batch_size=batch_size, seed=seed), per_epoch)
    assert all(len(batch) == batch_size and len(_names(batch)) == 1 for batch in batches)
    found = Counter(_names(batch).pop() for batch in batches)
    assert found == Counter({name: len(source) // batch_size for name, source in sources.items()})


@quick
@given(mixtures(), st.integers(1, 4))
def test_hosts_have_disjoint_parts_that_make_up_the_global_batch(mixture, hosts):
    sources, batch_size, seed = mixture
    batch_size *= hosts
    sources = {**sources, "large": _source("large", 4 * batch_size)}
    whole = _take(_batches(sources, batch_size=batch_size, seed=seed), 4)
    parts = [
        _take(_batches(sources, batch_size=batch_size, seed=seed, host=host, hosts=hosts), 4)
        for host in range(hosts)
    ]
    assert all(len(batch) == batch_size // hosts for part in parts for batch in part)
    assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == whole


@quick
@given(mixtures(), st.integers(0, 8))
def test_a_restored_state_gives_the_batches_that_would_have_followed(mixture, done):
    sources, batch_size, seed = mixture
    batch_size *= 2
    sources = {**sources, "large": _source("large", 5 * batch_size)}
    whole = _take(_batches(sources, batch_size=batch_size, seed=seed), done + 3)
    iterator = iter(_batches(sources, batch_size=batch_size, seed=seed, threads=2))
    for _ in range(done):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    assert len(json.dumps(state)) < 100
    again = _batches(sources, batch_size=batch_size, seed=seed)
    assert _take(again, 3, state) == whole[done:]
    halves = [
        _take(_batches(sources, batch_size=batch_size, seed=seed, host=host, hosts=2), 3, state)
        for host in range(2)
    ]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole[done:]


def test_the_order_is_a_function_of_the_seed_alone():
    sources = {"a": _source("a", 60), "b": _source("b", 40)}
    first = _take(_batches(sources, batch_size=4, seed=1), 50)
    other_order = {"b": sources["b"], "a": sources["a"]}
    assert _take(_batches(other_order, batch_size=4, seed=1, threads=2), 50) == first
    assert _take(_batches(sources, batch_size=4, seed=2), 50) != first


def test_each_epoch_has_another_order_and_other_companions():
    batches = _take(_batches({"a": _source("a", 60)}, batch_size=4), 45)
    epochs = [batches[:15], batches[15:30], batches[30:]]
    together = [{frozenset(batch) for batch in epoch} for epoch in epochs]
    assert len(together[0] & together[1]) < 3 and len(together[1] & together[2]) < 3


def test_the_remainder_is_of_other_rows_in_each_epoch():
    batches = _take(_batches({"a": _source("a", 7)}, batch_size=4), 40)
    assert len(set(itertools.chain(*batches))) == 7


def test_sources_of_equal_length_have_unrelated_orders():
    sources = {name: _source(name, 64) for name in ("a", "b")}
    batches = _take(_batches(sources, batch_size=1), 64 * 2 * 3)
    epochs = {
        (name, epoch): tuple(
            query.split("/")[1]
            for (query,) in batches[epoch * 128 : (epoch + 1) * 128]
            if query.startswith(name)
        )
        for name in sources
        for epoch in range(3)
    }
    assert len(set(epochs.values())) == 6


def test_sources_alternate_rather_than_follow_one_another():
    sources = {name: _source(name, 100) for name in ("a", "b")}
    names = [_names(batch).pop() for batch in _take(_batches(sources, batch_size=2), 100)]
    changes = sum(one != other for one, other in itertools.pairwise(names))
    assert 25 < changes < 75


def test_documents_and_scores_are_cut_to_the_least_of_the_source():
    rows = [
        {
            "query": str(i),
            "documents": list("abcdef")[: 3 + i % 2],
            "scores": [2.0, 1.0, 0.0, 5.0][: 3 + i % 2],
        }
        for i in range(8)
    ]
    long = _source("long", 8, documents=6)
    seen = []

    def encode(batch, documents):
        seen.append((batch, documents))
        return {"query": np.zeros(len(batch))}

    iterator = iter(
        _batches({"scored": ListSource(rows), "long": long}, batch_size=4, encode=encode)
    )
    for _ in range(4):
        next(iterator)
    assert {documents for _, documents in seen} == {3, 4}
    for batch, documents in seen:
        assert all(len(row["documents"]) == documents for row in batch)
        if documents == 3:
            # Candidates beyond the number are drawn, each with its own score.
            teacher = {"a": 2.0, "b": 1.0, "c": 0.0, "d": 5.0}
            assert all(row["scores"] == [teacher[d] for d in row["documents"]] for row in batch)
        else:
            assert all(row["scores"] is None for row in batch)
    assert len(long[0]["documents"]) == 6


def test_prepared_rows_give_the_batches_of_rows_in_memory(tmp_path):
    on_disk = _prepared(tmp_path, "a", 50)
    in_memory = ListSource(on_disk.__getitems__(range(50)))
    batches = _batches({"a": on_disk}, batch_size=8, threads=2)
    assert _take(batches, 14) == _take(_batches({"a": in_memory}, batch_size=8), 14)


def _prepared(folder, name, count):
    path = folder / f"{name}.jsonl"
    path.write_text(
        "".join(
            json.dumps({"query": f"{name}/{i}", "document": f"{name}/{i}/0"}) + "\n"
            for i in range(count)
        )
    )
    builder = file_builder(str(path), folder / "prepared")
    assert isinstance(builder, TextBuilder)
    builder.prepare()
    return TextSource(builder.folder)


def test_worker_processes_give_the_batches_of_one_process_and_end_with_the_stream(tmp_path):
    sources = {"a": _prepared(tmp_path, "a", 40), "b": _source("b", 30)}
    expected = _take(_batches(sources, batch_size=4), 25)
    batches = _batches(sources, batch_size=4, workers=2, threads=1)
    first = [next(batches)["query"].tolist() for _ in range(7)]
    assert len(multiprocessing.active_children()) >= 2
    state = json.loads(json.dumps(batches.get_state()))
    batches.close()
    assert first == expected[:7] and state["next_index"] == 7
    # What two workers left is taken up by three.
    assert _take(_batches(sources, batch_size=4, workers=3), 18, state) == expected[7:]
    assert not multiprocessing.active_children()


def test_a_stream_may_be_set_back_while_it_runs():
    batches = _batches({"a": _source("a", 40)}, batch_size=4, threads=2)
    first = _take(batches, 6)
    batches.set_state({"next_index": 2})
    assert _take(batches, 4) == first[2:]
    assert batches.get_state()["next_index"] == 6


def test_a_position_in_other_sources_is_refused():
    state = _batches({"a": _source("a", 40)}, batch_size=4).get_state()
    _batches({"a": _source("a", 40)}, batch_size=4).set_state(state)
    for others in ({"a": _source("a", 41)}, {"b": _source("b", 40)}):
        with pytest.raises(UserError, match="other names or numbers of rows"):
            _batches(others, batch_size=4).set_state(state)
    # A checkpoint of before this was noted is taken as it is.
    _batches({"a": _source("a", 41)}, batch_size=4).set_state({"next_index": 3})


def test_an_error_in_a_worker_reaches_the_caller():
    batches = _batches({"a": _source("a", 20)}, batch_size=4, workers=1, encode=_fail)
    with pytest.raises(Exception, match="cannot be encoded"):
        next(batches)
    batches.close()


def _fail(rows, documents):
    raise UserError("this text cannot be encoded")


def test_scored_candidates_are_drawn_anew_each_epoch_where_there_are_too_many():
    source = _source("a", 8, documents=40, scores=True)
    seen = []

    def encode(rows, documents):
        seen.extend(rows)
        assert all(len(row["documents"]) == documents == 32 for row in rows)
        return {"query": np.array([row["query"] for row in rows])}

    def take(seed, host=0, hosts=1):
        seen.clear()
        batches = _batches(
            {"a": source},
            batch_size=8,
            seed=seed,
            host=host,
            hosts=hosts,
            encode=encode,
            max_documents=32,
        )
        _take(batches, 3)
        return {(epoch, row["query"]): row for epoch, row in zip(epochs(hosts), seen, strict=True)}

    def epochs(hosts):
        return [epoch for epoch in range(3) for _ in range(8 // hosts)]

    drawn = take(seed=1)
    assert len(drawn) == 24
    for row in drawn.values():
        places = [int(text.rsplit("/", 1)[1]) for text in row["documents"]]
        assert places == sorted(set(places))  # each once, in the order of the row
        assert row["scores"] == [float(place) for place in places]  # with its own score
    chosen = {key: tuple(row["documents"]) for key, row in drawn.items()}
    assert len({chosen[epoch, "a/0"] for epoch in range(3)}) == 3
    assert len({tuple(p.rsplit("/", 1)[1] for p in places) for places in chosen.values()}) == 24
    assert take(seed=1) == drawn and take(seed=2) != drawn
    assert take(seed=1, host=0, hosts=2) | take(seed=1, host=1, hosts=2) == drawn


def test_negatives_keep_their_order_and_the_first_are_used():
    source = _source("a", 8, documents=7)
    batch = next(_batches({"a": source}, batch_size=8))
    for query, documents in zip(batch["query"], batch["documents"], strict=True):
        assert documents.tolist() == [f"{query}/{i}" for i in range(4)]


def test_a_batch_is_one_read(monkeypatch):
    source = _source("a", 50)
    reads = []
    read = source.__getitems__
    monkeypatch.setattr(source, "__getitems__", lambda indices: reads.append(1) or read(indices))
    _take(_batches({"a": source}, batch_size=8), 5)
    assert len(reads) == 5


def test_a_source_smaller_than_a_batch_is_told_of(caplog):
    sources = {"tiny": _source("tiny", 3), "large": _source("large", 20)}
    with caplog.at_level("WARNING"):
        batches = _take(_batches(sources, batch_size=4), 10)
    assert "tiny has 3 rows" in caplog.text and "large" not in caplog.text
    assert set().union(*map(_names, batches)) == {"large"}


def test_sources_that_give_no_batch_at_all_are_refused():
    with pytest.raises(UserError, match=r"8 rows.*a has 7.*b has 2"):
        _batches({"a": _source("a", 7), "b": _source("b", 2)}, batch_size=8)
    with pytest.raises(UserError, match="none was given"):
        _batches({}, batch_size=8)


def test_a_batch_that_hosts_cannot_share_equally_is_refused():
    with pytest.raises(UserError, match="multiple of 3"):
        _batches({"a": _source("a", 20)}, batch_size=8, hosts=3)


def test_an_error_while_encoding_reaches_the_caller():
    def encode(rows, documents):
        raise UserError("this text cannot be encoded")

    iterator = iter(_batches({"a": _source("a", 20)}, batch_size=4, encode=encode, threads=2))
    with pytest.raises(UserError, match="cannot be encoded"):
        next(iterator)
    iterator.close()


def test_the_rows_that_a_step_is_said_to_have_are_those_of_its_batch():
    sources = {"a": _source("a", 30), "b": _source("b", 17)}
    for host in range(2):
        batches = _batches(sources, batch_size=4, seed=3, host=host, hosts=2)
        taken = [next(batches)["query"].tolist() for _ in range(25)]  # more than an epoch
        batches.close()
        for step, batch in enumerate(taken):
            name, rows = batches.origin(step)
            assert batch == [f"{name}/{row}" for row in rows]
            assert all(type(row) is int for row in rows)
