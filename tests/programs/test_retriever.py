"""A model is opened from wherever it is, or refused with one sentence."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_model import make_model, save_model

from colbert_jax import huggingface
from colbert_jax.checkpoint import Checkpoints
from colbert_jax.errors import UserError
from colbert_jax.huggingface.configs import write_json
from colbert_jax.programs.retriever import (
    ModelRequest,
    file_digest,
    open_output,
    open_retriever,
)
from colbert_jax.start import CONFIG_FILE

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def exported(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("exported") / "model", tokenizer_file)


@pytest.fixture(scope="module")
def run_folder(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that kept steps 1, 2 and 3, of which the second was the best."""
    folder = tmp_path_factory.mktemp("runs") / "some"
    folder.mkdir()
    config = {"loss": {"learn_temperature": False}, "evals": {"best": "x", "collections": []}}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    checkpoints = Checkpoints(folder)
    for step, value in ((1, 0.1), (2, 0.9), (3, 0.5)):
        model, params = make_model(tokenizer_file, seed=step)
        checkpoints.save(
            step,
            params={"model": jax.tree.map(jax.numpy.asarray, params), "loss": {}},
            optimizer={"step": np.int32(step)},
            input_state={},
            config=config,
            value=value,
        )
    checkpoints.close()
    (folder / "model").mkdir()
    huggingface.write_description(folder / "model", model)
    return folder


def refused(request: ModelRequest) -> str:
    with pytest.raises(UserError) as caught:
        open_retriever(request)
    message = str(caught.value)
    assert "\n" not in message
    return message


def same_weights(params: Any, expected: Any) -> bool:
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)


def test_an_exported_folder_is_opened_on_all_devices(exported: Path, tokenizer_file: Path) -> None:
    retriever = open_retriever(ModelRequest(str(exported), batch_size=2))
    assert retriever.name == str(exported)
    assert retriever.mesh.size == jax.device_count()
    assert retriever.encoder.block_size == 2 * jax.device_count()
    assert same_weights(retriever.params, make_model(tokenizer_file)[1])
    for leaf in jax.tree.leaves(retriever.params):
        assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8
    found = retriever.encoder.queries(retriever.params, ["copy a list"]).embeddings
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize(("step", "number"), [("latest", 3), ("best", 2), ("1", 1)])
def test_a_run_is_opened_at_the_step_asked_for(
    run_folder: Path, tokenizer_file: Path, step: str, number: int
) -> None:
    retriever = open_retriever(ModelRequest(str(run_folder), step=step, batch_size=1))
    assert retriever.name == f"{run_folder}, step {number}"
    assert same_weights(retriever.params, make_model(tokenizer_file, seed=number)[1])
    assert retriever.encoder.queries(retriever.params, ["x"]).embeddings.shape == (1, 12, 16)


@pytest.mark.parametrize("step", ["4", "nonsense", "-1", ""])
def test_a_step_that_is_not_there_is_refused(run_folder: Path, step: str) -> None:
    message = refused(ModelRequest(str(run_folder), step=step))
    assert "choose latest, best or one of 1, 2, 3" in message


def test_steps_are_of_runs_only(exported: Path) -> None:
    message = refused(ModelRequest(str(exported), step="best"))
    assert message.startswith("--step=best") and "is no run" in message


def test_lengths_are_changed_on_request_only(exported: Path) -> None:
    plain = open_retriever(ModelRequest(str(exported))).encoder.tokenizer.config
    assert (plain.query_length, plain.document_length) == (12, 40)
    request = ModelRequest(str(exported), query_length=7, document_length=100)
    changed = open_retriever(request).encoder.tokenizer.config
    assert changed == dataclasses.replace(plain, query_length=7, document_length=100)
    limit = huggingface.read_model(str(exported)).config.encoder.max_position_embeddings
    for name in ("query_length", "document_length"):
        request = dataclasses.replace(ModelRequest(str(exported)), **{name: limit + 1})
        message = refused(request)
        assert message.startswith(f"--{name}={limit + 1} is more than the {limit} tokens")


def test_arithmetic_in_bfloat16_is_near(exported: Path) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        retriever = open_retriever(ModelRequest(str(exported), dtype=dtype))
        found.append(retriever.encoder.queries(retriever.params, ["copy a list"]).embeddings)
    assert not np.array_equal(*found)
    np.testing.assert_allclose(*found, atol=0.05)


def test_another_model_has_another_fingerprint(
    exported: Path, run_folder: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    prints = [
        open_retriever(ModelRequest(str(exported))).fingerprint(),
        open_retriever(ModelRequest(str(run_folder), step="1")).fingerprint(),
        open_retriever(ModelRequest(str(run_folder), step="3")).fingerprint(),
        open_retriever(ModelRequest(str(exported), document_length=30)).fingerprint(),
    ]
    assert len(set(prints)) == 4
    again = save_model(tmp_path / "again", tokenizer_file)
    assert open_retriever(ModelRequest(str(again))).fingerprint() == prints[0]


# --- what is no model for this ---


def test_a_base_encoder_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(exported, folder)
    shutil.rmtree(folder / "1_Dense")
    for name in ("modules.json", "config_sentence_transformers.json"):
        (folder / name).unlink()
    message = refused(ModelRequest(str(folder)))
    assert "is a base encoder without a projection" in message and "--config.init_from" in message


def test_a_colbert_that_lost_its_projection_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lost"
    shutil.copytree(exported, folder)
    (folder / "modules.json").unlink()
    assert "its projection is lost" in refused(ModelRequest(str(folder)))


def test_another_architecture_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(exported, folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "bert"}))
    message = refused(ModelRequest(str(folder)))
    assert "describes a 'bert' model" in message and "config.json" in message
    for name in ("modules.json", "config_sentence_transformers.json"):  # as most are saved
        (folder / name).unlink()
    assert refused(ModelRequest(str(folder))) == message


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "model.safetensors", "1_Dense/model.safetensors"]
)
def test_what_a_folder_lacks_is_named(exported: Path, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "part"
    shutil.copytree(exported, folder)
    (folder / file).unlink()
    assert Path(file).name in refused(ModelRequest(str(folder)))
    (folder / file).write_bytes(b"damaged")
    assert str(folder) in refused(ModelRequest(str(folder)))


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_is_not_the_folder_one_stands_in(
    exported: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(exported)
    assert refused(ModelRequest(name)).startswith("No model is named")


@pytest.mark.parametrize("name", ["owner/model", "none", "/nowhere/at all", "a/b/c"])
def test_a_name_that_leads_nowhere_is_refused(name: str) -> None:
    message = refused(ModelRequest(name))
    assert f"{name!r} is neither a folder nor a model" in message


# --- files ---


def test_a_files_digest_is_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"bytes")
    assert file_digest(path) == hashlib.sha256(b"bytes").hexdigest()
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            file_digest(missing)


def test_json_is_for_people_to_read(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"é": [1]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert text == '{\n  "é": [\n    1\n  ]\n}\n'


def test_an_output_folder_is_tried_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_output(tmp_path / "a" / "b").is_dir()
    assert open_output(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"--output=.* cannot be written to .*choose another"):
            open_output(path)

    def full(**_: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(UserError, match="Read-only file system"):
        open_output(tmp_path / "a")
