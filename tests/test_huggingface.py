"""Folders in and out: what PyLate saves is read, what is written PyLate and Transformers load."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from reference.client import PyLateReference
from safetensors.numpy import load_file, save_file

from colbert_jax.colbert import ColbertConfig, DenseConfig, Params, init_params, make_embed
from colbert_jax.errors import UserError
from colbert_jax.huggingface import (
    Model,
    encoder_json,
    read_model,
    read_tokenizer,
    read_weights,
    save_model,
    weights,
)
from colbert_jax.modernbert import ModernBertConfig
from colbert_jax.tokenization import ColbertTokenizer, TokenizationConfig, train_tokenizer

TOLERANCE = 1e-4
SIZES = {"num_hidden_layers": 3, "config": {"local_attention": 16}}
SETTINGS = {
    "query_length": 24,
    "document_length": 60,
    "query_prefix": "[Query] ",
    "document_prefix": "[Doc] ",
    "attend_to_expansion_tokens": True,
    "skiplist_words": [".", ",", "the"],
    "prompts": {"query": "search_query: ", "document": "search_document: "},
}
DENSE: dict[str, list[dict[str, Any]]] = {
    "one": [{"in_features": 64, "out_features": 32}],
    "several": [
        {"in_features": 64, "out_features": 48, "activation": "GELU", "use_residual": True},
        {"in_features": 48, "out_features": 48, "bias": True, "use_residual": True},
        {"in_features": 48, "out_features": 40, "bias": True, "activation": "Tanh"},
        {"in_features": 40, "out_features": 32, "activation": "SiLU"},
    ],
}


@pytest.fixture(scope="module")
def sources(
    pylate: PyLateReference, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Models that PyLate saved, and an encoder with its head that Transformers saved."""
    root = tmp_path_factory.mktemp("sources")
    made = {"tokenizer_json": str(tokenizer_file)} | SIZES
    for name, dense in DENSE.items():
        settings = SETTINGS if name == "several" else {"do_query_expansion": False}
        pylate.call("make_model", folder=str(root / name), dense=dense, **made, **settings)
    pylate.call("make_model", folder=str(root / "default"), **made)
    pylate.call("make_encoder", folder=str(root / "base"), masked_lm=True, vocab_size=3333, **made)
    pylate.call("make_colbert", encoder=str(root / "base"), folder=str(root / "resized"))
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def folder(sources: dict[str, Path], tmp_path: Path) -> Path:
    """A model to damage."""
    return Path(shutil.copytree(sources["one"], tmp_path / "model"))


def load(folder: Path, **options: Any) -> tuple[Model, Params]:
    model = read_model(str(folder), **options)
    return model, read_weights(str(folder), model, seed=0)


def edit_json(path: Path, edit: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(edit(value) or value))


def edit_tensors(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check_same(pylate: PyLateReference, folder: Path, texts: list[str]) -> None:
    """PyLate's embeddings of PyLate's tokens, and of its `encode`, are ours."""
    model, params = load(folder)
    embed = jax.jit(make_embed(model.config))
    for is_query in (True, False):
        named = {"folder": str(folder), "texts": texts, "is_query": is_query}
        tokens = pylate.call("tokenize", **named)
        batch = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        theirs = pylate.call("token_embeddings", folder=str(folder), **batch)
        ours = np.asarray(embed(params, batch["input_ids"], batch["attention_mask"] == 1))
        difference = np.abs(ours - theirs).max()
        print(f"largest difference of an embedding: {difference:.1e}")
        assert difference <= TOLERANCE

        tokenizer, side = model.tokenizer, "query" if is_query else "document"
        prompt = getattr(tokenizer.config, f"{side}_prompt")
        own = tokenizer.queries(texts) if is_query else tokenizer.documents(texts)
        ours = np.asarray(embed(params, own["input_ids"], own["attention_mask"]))
        encoded = pylate.call("encode", **named, prompt=prompt)
        for row, mask, array in zip(ours, own["scoring_mask"], encoded, strict=True):
            np.testing.assert_allclose(row[mask], array, atol=TOLERANCE, rtol=0)


# Reading.


@pytest.mark.parity
@pytest.mark.parametrize("name", ["default", "one", "several", "resized"])
def test_a_folder_of_pylate_gives_its_embeddings(
    pylate: PyLateReference, sources: dict[str, Path], real_texts: list[str], name: str
) -> None:
    check_same(pylate, sources[name], real_texts[:24])


@pytest.mark.parity
def test_an_older_config_gives_the_same_embeddings(
    pylate: PyLateReference, folder: Path, real_texts: list[str]
) -> None:
    def age(fields: dict[str, Any]) -> None:
        assert fields.pop("layer_types") and fields.pop("rope_parameters")
        fields |= {
            "global_rope_theta": 700.0,
            "local_rope_theta": 90.0,
            "global_attn_every_n_layers": 2,
        }

    edit_json(folder / "config.json", age)
    encoder = read_model(str(folder)).config.encoder
    assert (encoder.global_rope_theta, encoder.local_rope_theta) == (700.0, 90.0)
    assert [encoder.is_global(i) for i in range(3)] == [True, False, True]
    check_same(pylate, folder, real_texts[:24])


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_half_precision_are_read_and_exported_in_float32(
    pylate: PyLateReference, folder: Path, tmp_path: Path, real_texts: list[str], dtype: str
) -> None:
    half = transformers.AutoModel.from_pretrained(str(folder), dtype=dtype)
    half.save_pretrained(str(folder))
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    model, params = load(folder)
    expected = half.state_dict()["layers.1.mlp.Wo.weight"].float().numpy().T
    np.testing.assert_array_equal(params["encoder"]["layers"][1]["mlp"]["wo"], expected)
    save_model(tmp_path / "export", model, params, "")
    check_same(pylate, tmp_path / "export", real_texts[:24])


@pytest.mark.parity
def test_a_base_encoder_is_read_without_its_head_and_gets_a_projection(
    pylate: PyLateReference, sources: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    base = sources["base"]
    names = load_file(base / "model.safetensors").keys()
    assert any(n.startswith("model.layers.") for n in names) and "head.dense.weight" in names
    with caplog.at_level(logging.INFO):
        model, params = load(base, embedding_size=48)
    assert "a new one (64 -> 48) is drawn" in caplog.text
    assert params["projection"][0]["kernel"].shape == (64, 48)
    ids = np.arange(40)[None] + 300
    mask = np.ones_like(ids)
    theirs = pylate.call("automodel", folder=str(base), input_ids=ids, attention_mask=mask)
    # The encoder by itself: an identity for a projection.
    bare = ColbertConfig(model.config.encoder, (DenseConfig(64, 64),))
    ours = make_embed(bare)(params | {"projection": {0: {"kernel": np.eye(64)}}}, ids, mask == 1)
    hidden = theirs["last_hidden_state"]
    expected = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=0)


def test_a_vocabulary_larger_than_the_tokenizers_is_cut_to_it(sources: dict[str, Path]) -> None:
    model, params = load(sources["base"])
    tensors = load_file(sources["base"] / "model.safetensors")
    table = tensors["model.embeddings.tok_embeddings.weight"]
    rows = model.tokenizer.vocab_size
    assert model.config.encoder.vocab_size == rows < 3333 == len(table)
    np.testing.assert_array_equal(params["encoder"]["tok_embeddings"], table[:rows])


@pytest.mark.parity
def test_rows_of_new_markers_are_near_the_mean_of_the_old(
    pylate: PyLateReference, tokenizer_file: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    pylate.call("make_encoder", folder=str(base), tokenizer_json=str(tokenizer_file), **SIZES)
    old = load_file(base / "model.safetensors")["embeddings.tok_embeddings.weight"]
    model, params = load(base)
    table = params["encoder"]["tok_embeddings"]
    np.testing.assert_array_equal(table[: len(old)], old)
    assert len(table) == len(old) + 2 == model.tokenizer.vocab_size
    away = np.abs(table[len(old) :] - old.mean(axis=0))
    assert 0 < away.max() < 1e-3 < old.std()
    assert not np.array_equal(table[-1], table[-2])
    assert np.array_equal(load(base)[1]["encoder"]["tok_embeddings"], table)  # by the seed
    other = read_weights(str(base), model, seed=1)["encoder"]["tok_embeddings"]
    assert not np.array_equal(other, table)


def test_overrides_go_over_the_folders_settings(sources: dict[str, Path]) -> None:
    model = read_model(str(sources["several"]), overrides={"query_length": 7, "query_prompt": "q"})
    config = model.tokenizer.config
    assert (config.query_length, config.document_length, config.query_prompt) == (7, 60, "q")
    assert config.document_prompt == "search_document: "


@pytest.mark.parametrize(
    ("sbert", "lowered"), [({"do_lower_case": True}, True), ({}, False), (None, True)]
)
def test_lower_case_is_what_its_own_file_says_if_there_is_one(
    folder: Path, sbert: dict[str, Any] | None, lowered: bool
) -> None:
    edit_json(folder / "config_sentence_transformers.json", lambda x: x | {"do_lower_case": True})
    path = folder / "sentence_bert_config.json"
    path.unlink()
    if sbert is not None:
        path.write_text(json.dumps(sbert))
    for tokenizer in (read_model(str(folder)).tokenizer, read_tokenizer(str(folder))):
        assert tokenizer.config.do_lower_case is lowered


# Writing.


@pytest.mark.parity
@pytest.mark.parametrize("name", ["default", "several", "one"])
def test_an_export_is_the_same_model_to_pylate(
    pylate: PyLateReference,
    sources: dict[str, Path],
    tmp_path: Path,
    real_texts: list[str],
    name: str,
) -> None:
    export, again = tmp_path / "export", tmp_path / "again"
    model, params = load(sources[name])
    save_model(export, model, params, "A card.")
    described, expected = (pylate.call("describe", folder=str(f)) for f in (export, sources[name]))
    for found in (described, expected):  # Transformers' older and newer tokenizer files
        found["files"] = [f for f in found["files"] if f.endswith((".safetensors", "e.json"))]
    assert described == expected
    for is_query in (True, False):
        pairs = [
            pylate.call("encode", folder=str(f), texts=real_texts[:24], is_query=is_query)
            for f in (export, sources[name])
        ]
        for ours, theirs in zip(*pairs, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)

    # Weights come back bit for bit, from our folder and from the one PyLate makes of it.
    pylate.call("roundtrip", folder=str(export), output=str(again))
    for folder in (export, again):
        other, read = load(folder)
        assert other.config == model.config
        assert other.tokenizer.config == model.tokenizer.config
        jax.tree.map(np.testing.assert_array_equal, read, params)
        for side in ("queries", "documents"):
            batches = [getattr(m.tokenizer, side)(real_texts) for m in (model, other)]
            jax.tree.map(np.testing.assert_array_equal, *batches)


@pytest.mark.parity
def test_scores_of_an_export_are_those_of_the_source(
    pylate: PyLateReference, sources: dict[str, Path], tmp_path: Path, real_texts: list[str]
) -> None:
    model, params = load(sources["default"])
    save_model(tmp_path / "export", model, params, "")
    scores = []
    for folder in (sources["default"], tmp_path / "export"):
        queries, documents = (
            np.stack(
                pylate.call(
                    "encode", folder=str(folder), texts=texts, is_query=is_query, padded=True
                )
            )
            for texts, is_query in ((real_texts[:5], True), (real_texts[5:25], False))
        )
        scores.append(pylate.call("colbert_scores", queries=queries, documents=documents))
    difference = np.abs(scores[0] - scores[1]).max()
    print(f"largest difference of a score: {difference:.1e}")
    assert difference <= TOLERANCE


@pytest.mark.parity
def test_transformers_opens_an_export(
    pylate: PyLateReference, sources: dict[str, Path], tmp_path: Path
) -> None:
    export = tmp_path / "export"
    model, params = load(sources["base"])
    save_model(export, model, params, "")
    ids = np.arange(40)[None] + 300
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    older = pylate.call("automodel", folder=str(export), **batch)
    assert older["missing_keys"] == older["unexpected_keys"] == []
    newer, info = transformers.AutoModel.from_pretrained(str(export), output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        hidden = newer.eval()(**tensors).last_hidden_state.numpy()
    np.testing.assert_allclose(hidden, older["last_hidden_state"], atol=TOLERANCE, rtol=0)
    source = pylate.call("automodel", folder=str(sources["base"]), **batch)
    np.testing.assert_allclose(hidden, source["last_hidden_state"], atol=TOLERANCE, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(export))
    assert len(tokenizer) == newer.config.vocab_size == model.config.encoder.vocab_size
    assert tokenizer.pad_token == tokenizer.mask_token == "[MASK]"


def test_an_export_keeps_what_the_source_config_says(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sources["base"], tmp_path / "model"))
    unknown = {"a_field_of_tomorrow": [1, {"x": 2}]}
    edit_json(folder / "config.json", lambda fields: fields | unknown)
    model, params = load(folder)
    save_model(tmp_path / "export", model, params, "")
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "export")
    )
    assert after == before | {"vocab_size": model.tokenizer.vocab_size}


@pytest.mark.parity
def test_a_model_of_our_own_making_is_read_by_pylate(
    pylate: PyLateReference, tmp_path: Path, real_texts: list[str]
) -> None:
    settings = TokenizationConfig(query_length=20, document_length=50, query_prompt="query: ")
    trained = train_tokenizer(real_texts, 800, words_only=True)
    special = dict(cls=trained.cls_token_id, sep=trained.sep_token_id, pad=trained.pad_token_id)
    tokenizer = ColbertTokenizer(trained, settings)
    encoder = ModernBertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        global_attn_every_n_layers=2,
        local_attention=12,
        global_rope_theta=900.0,
        local_rope_theta=70.0,
    )
    config = ColbertConfig(encoder, (DenseConfig(64, 32),))
    fields = encoder_json(encoder, **special)
    model = Model(config, tokenizer, fields, "fresh")
    params = jax.tree.map(lambda x: 5 * x, init_params(config, 0))
    save_model(tmp_path / "export", model, params, "A card.")
    assert (tmp_path / "export" / "README.md").read_text() == "A card."
    assert read_model(str(tmp_path / "export")).config == config
    check_same(pylate, tmp_path / "export", real_texts[:24])


# What cannot be used is refused, in one sentence that names it.


def check_refused(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(folder)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    for word in words:
        assert word in message


def test_a_colbert_without_its_projection_is_refused(folder: Path) -> None:
    edit_json(folder / "modules.json", lambda modules: modules[:1])
    check_refused(folder, str(folder), "modules.json", "projection")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", ""])
def test_a_projection_that_lacks_a_file_is_refused(folder: Path, name: str) -> None:
    if name:
        (folder / "1_Dense" / name).unlink()
    else:
        shutil.rmtree(folder / "1_Dense")
    check_refused(folder, str(folder / "1_Dense"), name)


@pytest.mark.parametrize("part", ["", "1_Dense"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_weights_cut_short_are_refused(folder: Path, part: str, keep: float) -> None:
    path = folder / part / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    check_refused(folder, str(path), "cannot be read")


@pytest.mark.parametrize(
    "name",
    ["embeddings.tok_embeddings.weight", "layers.2.attn_norm.weight", "layers.0.attn.Wqkv.weight"],
)
def test_a_missing_tensor_is_refused(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    check_refused(folder, str(folder), name)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("", "layers.1.mlp.Wi.weight"),
        ("", "layers.0.attn.Wo.weight"),
        ("", "final_norm.weight"),
        ("", "embeddings.tok_embeddings.weight"),
        ("1_Dense", "linear.weight"),
    ],
)
@pytest.mark.parametrize("axis", [0, -1], ids=["first_axis", "last_axis"])
def test_a_tensor_of_another_shape_is_refused(
    folder: Path, part: str, name: str, axis: int
) -> None:
    def cut(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = np.ascontiguousarray(np.delete(tensors[name], 0, axis))

    edit_tensors(folder / part, cut)
    check_refused(folder, str(folder / part), name)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("", "layers.0.attn_norm.weight"),
        ("", "layers.3.mlp.Wo.weight"),
        ("", "layers.1.attn.Wqkv.bias"),
        ("", "adapter.weight"),
        ("1_Dense", "linear.bias"),
    ],
)
def test_a_tensor_of_no_known_use_is_refused(folder: Path, part: str, name: str) -> None:
    edit_tensors(folder / part, lambda t: t.update({name: np.ones(64, np.float32)}))
    check_refused(folder, str(folder / part), name)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "bert"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"norm_bias": True},
        {"hidden_activation": "relu"},
        {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        {"num_attention_heads": 5},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_another_architecture_is_refused(folder: Path, fields: dict[str, Any]) -> None:
    edit_json(folder / "config.json", lambda old: old | fields)
    ((name, value),) = fields.items()
    said = name if isinstance(value, list) else str(value)
    check_refused(folder, str(folder / "config.json"), said)


@pytest.mark.parametrize("part", ["", "1_Dense"])
def test_pickled_weights_are_refused(folder: Path, part: str) -> None:
    path = folder / part / "model.safetensors"
    torch.save({k: torch.from_numpy(v) for k, v in load_file(path).items()}, path.parent / "x.bin")
    path.unlink()
    (path.parent / "x.bin").rename(path.parent / "pytorch_model.bin")
    check_refused(folder, str(path.parent), "safetensors")


@pytest.mark.parametrize("path", ["../x", "/", "1_Dense/../../x"])
def test_a_module_outside_of_the_folder_is_refused(folder: Path, path: str) -> None:
    shutil.copytree(folder / "1_Dense", folder.parent / "x")
    edit_json(folder / "modules.json", lambda modules: [modules[0], modules[1] | {"path": path}])
    check_refused(folder, "modules.json", path, "outside")


def test_a_shard_outside_of_the_folder_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    index = {"weight_map": {"final_norm.weight": "../x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_refused(folder, "model.safetensors.index.json", "../x.safetensors", "outside")


def test_weights_in_shards_are_read(folder: Path) -> None:
    _, expected = load(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, some in shards.items():
        save_file({name: tensors[name] for name in some}, folder / shard)
    weight_map = {name: shard for shard, some in shards.items() for name in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1], expected)


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
@pytest.mark.parametrize(
    "name", ["config.json", "config_sentence_transformers.json", "1_Dense/config.json"]
)
def test_a_damaged_config_is_refused(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    check_refused(folder, str(folder / name))


@pytest.mark.parametrize("content", ["", "{", "{}", "3", "[3]"])
def test_a_damaged_list_of_modules_is_refused(folder: Path, content: str) -> None:
    (folder / "modules.json").write_text(content)
    check_refused(folder, "modules.json")


@pytest.mark.parametrize(
    "fields",
    [{"in_features": 32}, {"activation_function": "torch.nn.Mish"}, {"out_features": None}],
    ids=lambda fields: next(iter(fields)),
)
def test_a_projection_that_does_not_fit_is_refused(folder: Path, fields: dict[str, Any]) -> None:
    edit_json(folder / "1_Dense" / "config.json", lambda old: old | fields)
    check_refused(folder, str(folder / "1_Dense" / "config.json"))


def test_a_name_that_the_hub_cannot_deliver_is_refused() -> None:
    with pytest.raises(UserError, match="nobody/nothing-of-this-name"):
        read_model("nobody/nothing-of-this-name")


# Saving leaves a whole folder or none.


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_output_that_holds_something_is_refused_and_left_alone(
    sources: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    output = tmp_path / "export"
    kept = output / "kept.txt" if kind == "folder" else output
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("keep me")
    before = contents(tmp_path)
    model, params = load(sources["one"])
    with pytest.raises(UserError, match="already holds something"):
        save_model(output, model, params, "")
    assert contents(tmp_path) == before


def test_an_empty_output_folder_is_filled(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    model, params = load(sources["one"])
    save_model(tmp_path / "export", model, params, "")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (tmp_path / "export" / "1_Dense" / "model.safetensors").is_file()


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk", "stop"])
def test_a_save_that_fails_leaves_nothing(
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    model, params = load(sources["one"])
    saved = weights.save_file

    def fail(tensors: Any, path: Path, **options: Any) -> None:
        saved(tensors, path, **options)
        if path.parent.name == "1_Dense":
            raise error

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(type(error)):
        save_model(tmp_path / "deep" / "export", model, params, "")
    assert not contents(tmp_path)
    assert not list((tmp_path / "deep").iterdir())


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    shutil.copytree(next(iter(sources.values())), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2000}))
    check_refused(folder, "tokenizer.json", "2000 rows", "config.json")


def test_prompts_that_we_have_no_use_for_are_written_back(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    shutil.copytree(next(iter(sources.values())), folder)
    path = folder / "config_sentence_transformers.json"
    settings = json.loads(path.read_text())
    settings["prompts"] = {"query": "q: ", "document": "d: ", "title": "t: "}
    settings["default_prompt_name"] = "title"
    path.write_text(json.dumps(settings))
    model = read_model(str(folder))
    save_model(tmp_path / "export", model, read_weights(str(folder), model, 0), "A card.")
    written = json.loads((tmp_path / "export" / "config_sentence_transformers.json").read_text())
    assert written["prompts"] == settings["prompts"]
    assert written["default_prompt_name"] == "title"
