"""Whatever a model's folder holds, it gives a model that fits its weights or one sentence."""

import json
import shutil
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from fuzz_inputs import HUGE, bounded, damage, edits, places, put, values
from fuzz_readers import (
    JSON_FILES,
    TENSORS,
    check_model_folder,
    check_sentence,
    model_folder,
    scratch,
)
from hypothesis import given
from hypothesis import strategies as st

from colbert_jax import huggingface
from colbert_jax.errors import UserError
from colbert_jax.huggingface import weights as weight_files


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any) -> str:
        raise AssertionError("the program waits for an answer")

    monkeypatch.setattr("builtins.input", ask)


def fresh() -> Path:
    """A copy of the sound model, to damage."""
    folder = scratch() / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model_folder(), folder)
    return folder


def edit(name: str, path: tuple[Any, ...], new: Any) -> Path:
    folder = fresh()
    value = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(put(value, path, new)))
    return folder


def refused(folder: Path, *words: str) -> str:
    """The sentence that a folder is refused with, and it names all the words."""
    with pytest.raises(UserError) as caught:
        huggingface.read_weights(str(folder), huggingface.read_model(str(folder)), seed=0)
    check_sentence(caught.value)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def settings_there() -> st.SearchStrategy[tuple[str, tuple[Any, ...]]]:
    """A file of the sound model and a path to something in it."""
    return st.sampled_from(
        [
            (name, path)
            for name in JSON_FILES
            for path in places(json.loads((model_folder() / name).read_text()))
        ]
    )


hostile = st.one_of(
    values(4),
    st.sampled_from(HUGE),
    st.sampled_from([0, -1, 1, 2, 3, 10**12, 1.5, True, "8", [8], None, {}, "../x", "/x", "\0"]),
)


def test_the_sound_model_is_read() -> None:
    assert check_model_folder(fresh()) is not None


@bounded(250)
@given(st.deferred(settings_there), hostile)
def test_a_setting_of_any_value_gives_a_model_or_one_sentence(
    place: tuple[str, tuple[Any, ...]], new: Any
) -> None:
    check_model_folder(edit(*place, new))


KEYS = {
    "config.json": ["rope_parameters", "rope_theta", "auto_map", "tokenizer_class", "model_type"],
    "tokenizer_config.json": [
        "auto_map",
        "added_tokens_decoder",
        "chat_template",
        "extra_special_tokens",
        "fast_tokenizer_files",
        "init_inputs",
        "mask_token",
        "model_max_length",
        "post_processor",
        "tokenizer_class",
        "tokenizer_file",
        "tokenizer_object",
        "vocab",
        "vocab_file",
    ],
    "config_sentence_transformers.json": ["prompts", "skiplist_words", "query_length"],
    "1_Dense/config.json": ["activation_function", "bias", "use_residual"],
}


@bounded(100)
@given(st.sampled_from([(name, key) for name in KEYS for key in KEYS[name]]), hostile)
def test_a_setting_that_was_not_there_gives_a_model_or_one_sentence(
    place: tuple[str, str], new: Any
) -> None:
    name, key = place
    folder = fresh()
    fields = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(fields | {key: new}))
    check_model_folder(folder)


@bounded(100)
@given(st.sampled_from(JSON_FILES + TENSORS), edits)
def test_damaged_files_give_a_model_or_one_sentence(
    name: str, changes: list[tuple[str, float, int]]
) -> None:
    folder = fresh()
    (folder / name).write_bytes(damage((folder / name).read_bytes(), changes))
    check_model_folder(folder)


def header_of(folder: Path, name: str) -> tuple[dict[str, Any], bytes]:
    data = (folder / name).read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_tensors(folder: Path, name: str, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + data)


DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I8",
    "U64",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "C64",
]


@bounded(150)
@given(
    st.sampled_from(TENSORS),
    st.integers(0, 30),
    st.sampled_from(["dtype", "shape", "data_offsets", "name"]),
    st.one_of(
        hostile,
        st.sampled_from(DTYPES),
        st.lists(st.sampled_from([0, 1, 4, 8, -1, *HUGE]), max_size=4),
    ),
)
def test_a_header_of_any_values_gives_a_model_or_one_sentence(
    file: str, index: int, part: str, new: Any
) -> None:
    folder = fresh()
    header, data = header_of(folder, file)
    names = [name for name in header if name != "__metadata__"]
    name = names[index % len(names)]
    if part == "name":
        header[str(new)] = header.pop(name)
    else:
        header[name][part] = new
    write_tensors(folder, file, header, data)
    check_model_folder(folder)


@pytest.mark.parametrize("shape", [[0], [0, 10**18], [10**18, 0], [2**32, 2**32], [0] * 40, []])
def test_a_tensor_of_an_absurd_shape_is_refused(shape: list[int]) -> None:
    folder = fresh()
    header, _ = header_of(folder, "1_Dense/model.safetensors")
    header["linear.weight"] |= {"shape": shape, "data_offsets": [0, 0]}
    write_tensors(folder, "1_Dense/model.safetensors", header, b"")
    refused(folder, "1_Dense")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_of_any_type_gives_a_model_or_one_sentence(dtype: str) -> None:
    folder = fresh()
    header, _ = header_of(folder, "1_Dense/model.safetensors")
    for size in (16, 32, 64, 128, 256):
        header["linear.weight"] |= {"dtype": dtype, "data_offsets": [0, size]}
        write_tensors(folder, "1_Dense/model.safetensors", header, bytes(size))
        check_model_folder(folder)


# --- sizes ---

SIZES = [
    ("config.json", name)
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "global_attn_every_n_layers",
        "local_attention",
        "max_position_embeddings",
    )
] + [
    ("1_Dense/config.json", "in_features"),
    ("1_Dense/config.json", "out_features"),
    ("config_sentence_transformers.json", "query_length"),
    ("config_sentence_transformers.json", "document_length"),
]


@pytest.mark.parametrize("name, key", SIZES, ids=lambda part: part)
@pytest.mark.parametrize("size", [10**12, 10**30, 2**31, 0, -1, True, 8.0, "8", [8]], ids=str)
def test_an_absurd_size_takes_no_memory(name: str, key: str, size: Any) -> None:
    folder = edit(name, (key,), size)
    tracemalloc.start()
    try:
        check_model_folder(folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100 << 20


@pytest.mark.parametrize("layers", [10**9, 10**12])
def test_absurdly_many_layers_take_no_memory_without_their_kinds_too(layers: int) -> None:
    folder = edit("config.json", ("num_hidden_layers",), layers)
    fields = json.loads((folder / "config.json").read_text())
    del fields["layer_types"]
    (folder / "config.json").write_text(json.dumps(fields))
    refused(folder, "num_hidden_layers")


# --- tokenizers ---

SPECIAL = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}]


def test_a_vocabulary_with_holes_is_refused() -> None:
    vocabulary = json.loads((model_folder() / "tokenizer.json").read_text())["model"]["vocab"]
    vocabulary[max(vocabulary, key=lambda word: vocabulary[word])] = 10**9
    refused(edit("tokenizer.json", ("model", "vocab"), vocabulary), "ids")


def test_a_vocabulary_without_a_token_for_the_unknown_is_refused() -> None:
    model = {"type": "WordLevel", "vocab": {"[CLS]": 0, "a": 1}, "unk_token": "[UNK]"}
    folder = edit("tokenizer.json", ("model",), model)
    check_model_folder(folder)
    fields = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(fields | {"added_tokens": []}))
    check_model_folder(folder)


def test_special_tokens_that_leave_no_room_for_a_text_are_refused() -> None:
    folder = fresh()
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["post_processor"]["single"] = SPECIAL * 10 + fields["post_processor"]["single"]
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    refused(folder, "query_length")


def test_special_tokens_that_the_vocabulary_lacks_are_refused() -> None:
    special = {"[CLS]": {"id": "[CLS]", "ids": [10**6], "tokens": ["[CLS]"]}}
    fields = json.loads((model_folder() / "tokenizer.json").read_text())
    special = fields["post_processor"]["special_tokens"] | special
    refused(edit("tokenizer.json", ("post_processor", "special_tokens"), special), "ids")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_tokenizer_is_not_run_and_nobody_is_asked(name: str) -> None:
    folder = fresh()
    mark = folder / "was_run"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: ...\n")
    code = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"], "AutoConfig": "own.Own"}}
    for file in {name, "tokenizer_config.json"}:
        fields = json.loads((folder / file).read_text()) | code | {"tokenizer_class": "Own"}
        (folder / file).write_text(json.dumps(fields))
    fields = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    (folder / "config.json").write_text(json.dumps(fields))
    try:
        huggingface.read_tokenizer(str(folder))
    except UserError as error:
        check_sentence(error)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["BertJapaneseTokenizer", "ByT5Tokenizer", "CanineTokenizer"])
def test_a_tokenizer_of_another_kind_gives_a_model_or_one_sentence(name: str) -> None:
    folder = edit("tokenizer_config.json", ("tokenizer_class",), name)
    check_model_folder(folder)


@pytest.mark.parametrize("name", ["", ".", "..", "a\0b", "\ud800", "x" * 5_000, 3, None, ["a"]])
def test_a_shard_of_any_name_is_refused(name: Any) -> None:
    folder = fresh()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(folder)


@pytest.mark.parametrize("weights", [None, [], 3, "a", ["a"], {}])
def test_a_list_of_shards_that_is_none_is_refused(weights: Any) -> None:
    folder = fresh()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    refused(folder)


@pytest.mark.parametrize("name", ["\0", "\ud800", "x" * 5_000, "a/" * 3_000, "model.safetensors"])
@pytest.mark.parametrize("module", [0, 1])
def test_a_module_of_no_possible_folder_is_refused(module: int, name: str) -> None:
    refused(edit("modules.json", (module, "path"), name))


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("depth", [900, 990, 100_000])
def test_however_deep_a_file_it_is_one_sentence(name: str, depth: int) -> None:
    folder = fresh()
    (folder / name).write_text('{"model_type": ' + "[" * depth + "]" * depth + "}")
    check_model_folder(folder)


# --- what lies outside of the folder ---


OPENED: list[str] | None = None  # by Python; None while nobody listens


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    if OPENED is not None and event in ("open", "os.listdir", "os.scandir"):
        OPENED.append(str(arguments[0]))


sys.addaudithook(audit)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are opened, by Python and by safetensors, as long as the test runs."""
    names: list[str] = []
    real = weight_files.safe_open

    def safe_open(path: Any, **options: Any) -> Any:
        names.append(str(path))
        return real(path, **options)

    monkeypatch.setattr(weight_files, "safe_open", safe_open)
    monkeypatch.setattr(sys.modules[__name__], "OPENED", names)
    return names


OUTSIDE = ("../outside", "{root}/outside", "1_Dense/../../outside", "./../outside/../outside")


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("place", ["transformer", "dense", "shard", "tokenizer"])
def test_nothing_outside_of_the_folder_is_read(path: str, place: str, opened: list[str]) -> None:
    outside = scratch() / "outside"
    if not outside.exists():
        shutil.copytree(model_folder(), outside)
        shutil.copy(outside / "tokenizer.json", outside / "tokenizer.4.0.0.json")
        shutil.copytree(model_folder() / "1_Dense", outside / "1_Dense", dirs_exist_ok=True)
    path = path.format(root=scratch())
    if place == "transformer":
        folder = edit("modules.json", (0, "path"), path)
    elif place == "dense":
        folder = edit("modules.json", (1, "path"), f"{path}/1_Dense")
    elif place == "shard":
        folder = fresh()
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"embeddings.tok_embeddings.weight": f"{path}/model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        folder = fresh()
        fields = json.loads((folder / "tokenizer_config.json").read_text())
        names = {
            "fast_tokenizer_files": [f"{path}/tokenizer.4.0.0.json"],
            "tokenizer_file": f"{path}/tokenizer.json",
            "vocab_file": f"{path}/tokenizer.json",
            "gguf_file": f"{path}/tokenizer.json",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(fields | names))
    opened.clear()
    if place == "tokenizer":
        check_model_folder(folder)
    else:
        refused(folder)
    read = [Path(name).resolve() for name in opened]
    assert any(name.is_relative_to(folder) for name in read)
    assert not [name for name in read if name.is_relative_to(outside)]


def test_reading_writes_nothing() -> None:
    folder = fresh()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    check_model_folder(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
