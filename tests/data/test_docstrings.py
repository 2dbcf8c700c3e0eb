import gzip
import logging
import os
import subprocess
import sys

import pytest

from colbert_jax.data import docstrings
from colbert_jax.errors import UserError

ALPHA = '''\
"""The module's own docstring is no pair."""

def area(
    width: float,  # in metres
    height: float = 1.0,
) -> float:
    """Computes the area of
    a rectangle.  Both sides are in metres.

    Raises:
      ValueError: a side is negative.
    """
    return width * height

class Stack(list):
    """A stack that grows without bound."""

    def push(self, item):
        """Puts one item on the top."""
        self.append(item)

    async def pull(self):
        """Too short."""
        return self.pop()

if True:
    def undocumented(): return 1
'''

BETA = '''\
def surface(a, b):
    """computes the AREA of a rectangle."""
    return a * b

def leaking(x):
    """Returns the answer to everything.

    Example: returns the   answer
    to everything.
    """
'''


@pytest.fixture
def site(tmp_path):
    """A site-packages folder with two packages and files that cannot be read."""
    root = tmp_path / "site-packages"
    write(root, "alpha/__init__.py", ALPHA)
    write(root, "alpha/tests/test_area.py", 'def f():\n    """Tests are not read by this."""')
    write(root, "alpha/area_test.py", 'def f():\n    """Tests are not read by this."""')
    write(root, "alpha/_vendor/other.py", 'def f():\n    """Copies of others are not read."""')
    write(root, "alpha/broken.py", 'def f(:\n    """This file does not parse at all."""')
    write(root, "beta/inner/plane.py", BETA)
    (root / "beta" / "latin.py").write_bytes(b'def f():\n    """This is not UTF-8: \xe9."""')
    return root


def write(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text, encoding="utf-8")


def collect(site, **options):
    return docstrings.collect(("alpha", "beta", "absent"), roots=[site], processes=1, **options)


def extract(text):
    """{name: (query, document)} of one file."""
    return {name: (query, doc) for name, query, doc in docstrings.extract(text, "m")}


def test_pairs_hold_summary_name_signature_and_the_rest(site):
    area, stack, push = collect(site)[:3]
    assert area == docstrings.Pair(
        query="Computes the area of a rectangle.",
        document="alpha.area\n"
        "def area(width: float, height: float=1.0) -> float\n"
        "Both sides are in metres.\n"
        "Raises:\n  ValueError: a side is negative.",
        source="alpha",
        path="alpha/__init__.py",
        name="alpha.area",
    )
    assert (push.name, push.query) == ("alpha.Stack.push", "Puts one item on the top.")
    assert push.document == "alpha.Stack.push\ndef push(self, item)\nself.append(item)"
    assert stack.document.startswith("alpha.Stack\nclass Stack(list)\n")


def test_code_in_a_document_has_no_docstring_of_inner_definitions(site):
    stack = collect(site)[1]
    assert "def push(self, item):\n    self.append(item)" in stack.document
    assert "top" not in stack.document and "short" not in stack.document


def test_no_document_contains_its_summary(site):
    pairs = collect(site)
    assert "beta.inner.plane.leaking" not in {pair.name for pair in pairs}
    for pair in pairs:
        flat = " ".join(pair.document.split()).casefold()
        assert pair.query.casefold().rstrip(".") not in flat


def test_short_repeated_and_unreadable_text_gives_no_pair(site, caplog):
    with caplog.at_level(logging.INFO, logger="colbert_jax"):
        names = [pair.name for pair in collect(site)]
    # Left out: `pull` (two words), `surface` (a repeat but for letter case), `leaking`.
    assert names == ["alpha.area", "alpha.Stack", "alpha.Stack.push"]
    assert "3 pairs from 4 files, 2 of them unreadable" in caplog.text


@pytest.mark.parametrize(
    ("docstring", "query"),
    [
        ("One two three, four five", "One two three, four five"),
        ("One two three. Four five six seven.", ""),
        ("One two (e.g. Three) four five. Six.", "One two (e.g. Three) four five."),
        ("One two three four\nArgs:\n  x: five", "One two three four"),
        ("One two three four\n------------------\nFive", "One two three four"),
        ("One two - - 3 4 5", ""),
        ("x (`Tensor` of shape `(1, 2)`): One two three four", ""),
        (">>> one two three four", ""),
        ("Returns: one two three four", ""),
        ("word " * 65, ""),
    ],
)
def test_summary_is_one_sentence_with_enough_words(docstring, query):
    found = extract(f'def f(x):\n    """{docstring}"""\n')
    assert [pair[0] for pair in found.values()] == ([query] if query else [])


def test_lines_are_counted_as_the_parser_counts_them():
    # A form feed and U+2028 end a line for str.splitlines but not for the parser.
    text = 'a = "\u2028"\n\x0c\ndef f(x="é"): \r\n    """One two three four."""\r\n    return x\n'
    assert extract(text)["m.f"][1] == 'm.f\ndef f(x="é")\nreturn x'


@pytest.mark.parametrize("default", ["'ö'", "'#'"])
def test_one_line_definitions_keep_their_signature(default):
    found = extract(f'class C:\n  def f(self, é={default}): "One two three four."\n')
    assert found["m.C.f"][1] == f"m.C.f\ndef f(self, é={default})"


def test_documents_are_capped():
    rest = "word " * 5000
    document = extract(f'def f():\n    """One two three four.\n\n    {rest}\n    """\n')["m.f"][1]
    assert 1000 < len(document) <= docstrings.MAX_DOCUMENT_CHARACTERS


def test_pairs_do_not_depend_on_the_number_of_processes(site):
    for number in range(40):  # more files than one worker is handed at a time
        write(
            site, f"alpha/part{number}.py", f'def f():\n    """Does the thing number {number}."""'
        )
    assert collect(site) == docstrings.collect(("alpha", "beta"), roots=[site], processes=2)
    assert len(collect(site)) == 43


def test_progress_counts_files(site):
    calls = []
    collect(site, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_no_pairs_at_all_is_the_users_error(site):
    with pytest.raises(UserError, match="absent"):
        docstrings.collect(("absent",), roots=[site], processes=1)


def pair(path, number):
    return docstrings.Pair(f"query {number}", f"document {number}", "p", path, f"{path}.f{number}")


def test_split_keeps_files_whole_and_holds_out_the_share_asked_for():
    pairs = [pair(f"p/{number // 3}.py", number) for number in range(6000)]
    train, held_out = docstrings.split(pairs, held_out_percent=10)
    assert not {p.path for p in train} & {p.path for p in held_out}
    assert sorted(train + held_out, key=lambda p: int(p.query.split()[1])) == pairs
    assert 500 < len(held_out) < 700
    assert docstrings.split(pairs, 0) == (pairs, [])
    assert docstrings.split(pairs, 100) == ([], pairs)


def test_a_files_side_does_not_depend_on_other_files():
    pairs = [pair(f"p/{number}.py", number) for number in range(300)]
    held_out = docstrings.split(pairs, 10)[1]
    assert docstrings.split(held_out, 10)[1] == held_out
    # Known hashes: another hash would move files of an older split into training.
    assert [p.path for p in held_out[:3]] == ["p/12.py", "p/24.py", "p/25.py"]


def test_held_out_collection_asks_a_fixed_choice_of_the_queries():
    pairs = [pair("p/0.py", number) for number in range(50)]
    documents, queries, qrels = docstrings.held_out_collection(pairs, max_queries=20)
    assert len(documents) == 50 and len(queries) == 20 and qrels.keys() == queries.keys()
    for query_id, judged in qrels.items():
        ((document_id, relevance),) = judged.items()
        assert relevance == 1 and query_id != document_id
        number = queries[query_id].removeprefix("query ")
        assert documents[document_id] == f"document {number}"
    assert docstrings.held_out_collection(pairs[::-1], 20)[1] == queries
    assert len(docstrings.held_out_collection(pairs)[1]) == 50


def test_documents_of_one_name_get_ids_of_their_own():
    twins = [
        docstrings.Pair(f"query {number}", f"document {number}", "p", "p/a.py", "p.a.f")
        for number in range(3)
    ]
    documents, _, qrels = docstrings.held_out_collection(twins)
    assert list(documents) == ["p.a.f", "p.a.f#2", "p.a.f#3"]
    assert qrels["q:p.a.f#2"] == {"p.a.f#2": 1}


def load(cache, site, **options):
    return docstrings.load_or_collect(
        cache, ("alpha", "beta"), roots=[site], processes=1, **options
    )


def fail(*_):
    raise AssertionError("the cache was not used")


def test_cache_is_used_until_a_file_changes(site, tmp_path):
    cache = tmp_path / "new" / "cache"
    pairs = load(cache, site)
    assert pairs == collect(site)
    assert load(cache, site, progress=fail) == pairs
    assert len(list(cache.iterdir())) == 1  # no temporary file stays
    os.utime(site / "alpha" / "__init__.py", (1, 1))
    with pytest.raises(AssertionError, match="the cache was not used"):
        load(cache, site, progress=fail)


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "rows", "fingerprint"])
def test_damaged_cache_is_made_anew_and_said_so(site, tmp_path, caplog, damage):
    pairs = load(tmp_path / "cache", site)
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    rows = gzip.decompress(whole).splitlines(keepends=True)
    path.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "noise": b"not gzip",
            "empty": b"",
            "rows": gzip.compress(b"".join(rows[:-1])),
            "fingerprint": gzip.compress(rows[0].replace(b": ", b": 1", 1) + b"".join(rows[1:])),
        }[damage]
    )
    with caplog.at_level(logging.WARNING, logger="colbert_jax"):
        assert load(tmp_path / "cache", site) == pairs
    assert str(path) in caplog.text and "damaged" in caplog.text
    assert path.read_bytes() == whole


def test_a_cache_folder_that_cannot_be_made_is_the_users_error(site, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        load(tmp_path / "file" / "cache", site)


def test_workers_do_not_import_jax():
    program = "import sys, colbert_jax.data.docstrings; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_default_packages_are_installed_and_documented():
    # Two small packages of the default list, from this interpreter's own site-packages.
    packages = ("absl", "optax")
    assert set(packages) <= set(docstrings.DEFAULT_PACKAGES)
    sources = [pair.source for pair in docstrings.collect(packages, processes=1)]
    assert sources.count("absl") > 100 and sources.count("optax") > 100
