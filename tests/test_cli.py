"""The programs' flags: real names and values only, one clear line and status 2 for the rest."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from colbert_jax import cli
from colbert_jax.data.corpora import CORPORA
from colbert_jax.errors import UserError

ROOT = Path(__file__).parents[1]
NAMES = ("pretrain", "supervised", "distill", "quickstart")


def config_of(name: str) -> ConfigDict:
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()


def program(name: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs a real program, as a user does."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / name), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=300,
    )


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The only line of a user's error."""
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert result.stdout == ""
    return lines[0]


# --- the real programs ---


def test_train_names_the_nearest_key_of_an_unknown_one() -> None:
    result = program("train.py", "--config=configs/quickstart.py", "--config.optimizer.lr=1e-3")
    line = one_line(result)
    assert "--config.optimizer.lr" in line and "--config.optimizer.learning_rate" in line


def test_train_ends_with_one_line_when_the_run_meets_a_users_error(tmp_path: Path) -> None:
    result = program(
        "train.py",
        f"--config={ROOT}/configs/pretrain.py",
        "--config.input.files=('missing.jsonl',)",
        f"--config.input.cache_dir={tmp_path}/cache",
        "--config.compilation_cache=",
        f"--workdir={tmp_path}/run",
        cwd=tmp_path,
    )
    assert "missing.jsonl cannot be read" in one_line(result)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny run by the real program, without --workdir, and what it said."""
    folder = tmp_path_factory.mktemp("cwd")
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    rows = [
        {"query": f"{one} {i}", "document": f"{one} {other} {i}"}
        for i, (one, other) in enumerate(zip(words, reversed(words), strict=True))
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "pairs.jsonl").write_text(text)
    result = program(
        "train.py",
        f"--config={ROOT}/configs/quickstart.py",
        "--config.input.files=('pairs.jsonl',)",
        "--config.input.cache_dir=cache",
        "--config.compilation_cache=compiled",
        "--config.input.batch_size=4",
        "--config.total_steps=2",
        "--config.evals.collections=()",
        "--config.evals.baselines=False",
        "--config.model.vocab_size=300",
        "--config.model.embedding_size=8",
        "--config.model.query_length=8",
        "--config.model.document_length=12",
        "--config.model.encoder.hidden_size=16",
        "--config.model.encoder.intermediate_size=16",
        "--config.model.encoder.num_hidden_layers=1",
        "--config.export=False",
        cwd=folder,
    )
    return folder, result


def test_train_takes_overrides_and_names_its_folder_by_the_config(
    trained: tuple[Path, Any],
) -> None:
    folder, result = trained
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "Metrics: runs/quickstart/metrics.jsonl" in result.stdout
    kept = json.loads((folder / "runs" / "quickstart" / "train_config.json").read_text())
    assert kept["total_steps"] == 2 and kept["model"]["encoder"]["hidden_size"] == 16
    assert kept["input"]["files"] == ["pairs.jsonl"] and kept["evals"]["collections"] == []
    assert kept["loss"]["masked_similarity"] is None


def test_the_compiled_step_is_kept(trained: tuple[Path, Any]) -> None:
    folder, _ = trained
    assert list((folder / "compiled").glob("jit_train_step-*"))


def test_export_writes_a_folder_once(trained: tuple[Path, Any]) -> None:
    folder, _ = trained
    arguments = ("--workdir=runs/quickstart", "--output=model")
    result = program("export.py", *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr
    files = {path.name for path in (folder / "model").iterdir()}
    assert {"README.md", "modules.json", "config.json", "model.safetensors"} <= files
    written = (folder / "model" / "model.safetensors").read_bytes()
    again = program("export.py", *arguments, cwd=folder)
    assert "model already holds something" in again.stderr.splitlines()[-1]
    assert again.returncode == 2 and "Traceback" not in again.stderr
    assert (folder / "model" / "model.safetensors").read_bytes() == written


# --- flags, in this process ---


def parse(*arguments: str, required: tuple[str, ...] = ("config",)) -> Any:
    """The flags of launch/train.py, parsed as `run_program` parses them; the config's value."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "A config.", flag_values=values)
    flags.DEFINE_string("workdir", None, "A folder.", flag_values=values)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cli.flags, "FLAGS", values)
        patched.setattr(sys, "argv", ["train.py", *arguments])  # where config_flags looks too
        cli._parse_flags(["train.py", *arguments], required)
    return values


QUICKSTART = f"--config={ROOT}/configs/quickstart.py"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((QUICKSTART, "--config.total_stepz=3"), r"nearest is --config\.total_steps\.$"),
        ((QUICKSTART, "--config.optimizer=3"), r"--config\.optimizer: the config has no such key"),
        ((QUICKSTART, "--config.batch_size=3"), r"nearest is --config\.input\.batch_size\.$"),
        ((QUICKSTART, "--noconfig.exports"), r"nearest is --config\.export\.$"),
        ((QUICKSTART, "--config.qqqq", "3"), r"the config has no such key; the nearest is"),
        (
            ("--config", QUICKSTART.split("=")[1], "--config.loss.lr=3"),
            r"nearest is --config\.",
        ),
        ((QUICKSTART, "--config.total_steps=many"), r"total_steps=many: invalid literal"),
        ((QUICKSTART, "--config.total_steps=1.5"), r"total_steps"),
        ((QUICKSTART, "--config.optimizer.learning_rate=fast"), r"learning_rate"),
        ((QUICKSTART, "--config.export=perhaps"), r"export"),
        ((QUICKSTART, "--config.mesh.data=(1,)"), r"data"),
        (("--workdir=x",), r"--config is missing: see train\.py --help"),
        (("--config.seed=1",), r"--config is missing: see train\.py --help"),
        ((), r"--config is missing"),
        (("--config=none/such.py",), r"there is no file none/such\.py; configs/ holds some"),
        (("--config=none/such.py", "--config.seed=1"), r"there is no file none/such\.py"),
        ((f"--config={ROOT}/configs",), r"there is no file"),
        ((QUICKSTART, "--workdirr=x"), r"workdirr.*Did you mean: workdir"),
        ((QUICKSTART, "--verbose=x"), r"Unknown command line flag 'verbose'"),
        ((QUICKSTART, "stray"), r"'stray' is not a flag: flags are written --name=value"),
    ],
)
def test_flags_that_cannot_be_used_are_the_users_error(
    arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("def get_config():\n    return 1 / 0\n", "fails .ZeroDivisionError: division by zero"),
        ("def get_config(:\n", "fails .SyntaxError"),
        ("import no_such_module_anywhere\n", "no_such_module_anywhere"),
        ("x = 1\n", "get_config"),
        ("def get_config():\n    return {'seed': 0}\n", "no ConfigDict"),
    ],
)
@pytest.mark.parametrize("override", [(), ("--config.seed=1",)])
def test_a_config_file_that_fails_is_the_users_error(
    override: tuple[str, ...], text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        parse(f"--config={tmp_path}/broken.py", *override)
    assert "broken.py" in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_reach_the_config_with_their_types() -> None:
    values = parse(
        QUICKSTART,
        "--config.total_steps=7",
        "--config.optimizer.learning_rate=1",
        "--config.loss.masked_similarity=0.0",
        "--noconfig.export",
        "--config.input.files=('a.jsonl','b.parquet')",
        "--config.mesh.data=-1",
        "--workdir=here",
    )
    config = values["config"].value
    assert config.total_steps == 7 and config.optimizer.learning_rate == 1.0
    assert config.loss.masked_similarity == 0.0 and config.export is False
    assert config.input.files == ("a.jsonl", "b.parquet") and config.mesh.data == -1
    assert values["workdir"].value == "here"


def test_a_users_error_is_one_line_on_stderr_and_status_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli._fail(UserError("the file is missing: give another."))
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.err == "error: the file is missing: give another.\n" and captured.out == ""


# --- the configs ---


def written(value: Any) -> str:
    """A value as an override spells it."""
    return "0.5" if value is None else str(value)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_can_be_overridden(name: str) -> None:
    config = config_of(name)
    keys = cli.leaf_names(config)
    cli.check_keys(config, keys)
    flat = {key: _get(config, key) for key in keys}
    arguments = [f"--config.{key}={written(value)}" for key, value in flat.items()]
    parsed = parse(f"--config={ROOT}/configs/{name}.py", *arguments)["config"].value
    changed = {key for key in keys if _get(parsed, key) != flat[key]}
    assert changed == {"loss.masked_similarity"}


def _get(config: ConfigDict, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_small_and_alike(name: str) -> None:
    config = config_of(name)
    keys = cli.leaf_names(config)
    assert len(keys) == len(set(keys)) <= 60
    assert {"input.batch_size", "total_steps", "seed", "init_from"} <= set(keys)
    assert json.loads(config.to_json())["total_steps"] == config.total_steps
    # Only starting from nothing takes more than the phases have.
    extra = set(keys) - set(cli.leaf_names(config_of("pretrain")))
    if name != "quickstart":
        assert not extra
    assert set(cli.leaf_names(config_of("pretrain"))) <= set(keys)


RECIPE: dict[str, dict[str, Any]] = {
    "pretrain": {
        "init_from": "answerdotai/ModernBERT-base",
        "total_steps": 14_587,
        "input.corpus": "nomic_unsupervised",
        "input.batch_size": 16_384,
        "input.max_documents": 1,
        "loss.kind": "contrastive",
        "loss.temperature": 0.02,
        "optimizer.learning_rate": 3e-4,
        "optimizer.gradient_of": "sum",
        "model.document_length": 187,
        "evals.every_steps": 500,
    },
    "supervised": {
        "total_steps": 26_497,
        "input.corpus": "nomic_supervised",
        "input.batch_size": 64,
        "input.max_documents": 11,
        "loss.kind": "contrastive",
        "loss.temperature": 0.2,
        "optimizer.learning_rate": 8e-6,
        "model.document_length": 519,
        "evals.every_steps": 1500,
    },
    "distill": {
        "total_steps": 5_000,
        "input.corpus": "ms_marco_distillation",
        "input.batch_size": 128,
        "input.max_documents": 32,
        "loss.kind": "distillation",
        "loss.normalize_scores": True,
        "optimizer.learning_rate": 4e-6,
        "model.document_length": 519,
        "evals.every_steps": 400,
    },
}


@pytest.mark.parametrize("name", ["pretrain", "supervised"])
def test_a_phase_trains_on_every_source_of_its_corpus(name: str) -> None:
    config = config_of(name)
    known = [source.name for source in CORPORA[config.input.corpus].sources]
    assert list(config.input.sources) == known


EVERY_PHASE: dict[str, Any] = {
    "model.query_length": 39,
    "model.query_prompt": "search_query: ",
    "model.document_prompt": "search_document: ",
    "model.embedding_size": 128,
    "model.dtype": "bfloat16",
    "model.do_query_expansion": True,
    "model.attend_to_expansion_tokens": False,
    "loss.learn_temperature": False,
    "optimizer.warmup_steps": 0,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 1.0,
    "optimizer.max_skipped": 10,
}


@pytest.mark.parametrize("name", RECIPE)
def test_the_phases_have_the_recipes_values(name: str) -> None:
    config = config_of(name)
    expected = EVERY_PHASE | RECIPE[name]
    assert {key: _get(config, key) for key in expected} == expected


def test_an_epoch_of_each_phase_is_its_number_of_steps() -> None:
    for name, rows in (("pretrain", 238_998_494), ("supervised", 1_695_819), ("distill", 640_000)):
        config = config_of(name)
        assert config.total_steps == rows // config.input.batch_size


def test_the_sources_are_the_recipes() -> None:
    unsupervised = config_of("pretrain").input.sources
    assert len(unsupervised) == len(set(unsupervised)) == 29
    assert {"reddit_title_body", "paq", "s2orc_abstract_body", "squad", "ccnews"} <= set(
        unsupervised
    )
    supervised = config_of("supervised").input.sources
    assert len(supervised) == len(set(supervised)) == 10
    assert {"msmarco_distillation_simlm_rescored_reranked_min15", "reddit_triples"} <= set(
        supervised
    )
