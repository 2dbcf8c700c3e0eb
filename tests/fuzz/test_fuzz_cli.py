"""Whatever overrides are written, a config keeps its keys and types, or one line says why."""

from pathlib import Path
from typing import Any

import pytest
from fuzz_inputs import any_text, bounded, values
from fuzz_readers import check_sentence
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from test_cli import parse as parse_flags

from colbert_jax import cli
from colbert_jax.errors import UserError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"


def parse(*arguments: str) -> ConfigDict:
    """The config of launch/train.py."""
    return parse_flags(*arguments)["config"].value


PLAIN = parse(f"--config={QUICKSTART}")
KEYS = cli.leaf_names(PLAIN)


def get(config: ConfigDict, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value


def check(*arguments: str) -> ConfigDict | None:
    """Overrides give a config of the same keys and types, or one sentence."""
    try:
        config = parse(f"--config={QUICKSTART}", *arguments)
    except UserError as error:
        check_sentence(error)
        return None
    assert cli.leaf_names(config) == KEYS
    for key in KEYS:
        before, after = get(PLAIN, key), get(config, key)
        assert type(after) is type(before) or (before is None and type(after) is float), key
    return config


# What the operating system can hand over: no zero bytes.
word = any_text.map(lambda text: text.replace("\0", ""))
section = st.sampled_from(["input", "model", "model.encoder", "optimizer", "loss", "mesh"])
key = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from(KEYS),
    section,
    word,
    st.builds("{}.{}".format, section, word),
    st.builds("{}{}".format, st.sampled_from(KEYS), st.sampled_from([".", ".x", "[0]", "()", " "])),
    st.sampled_from(["", ".", "..", "__class__", "update", "a" * 10_000, "a." * 1_000, "\n"]),
)
written = st.one_of(
    word,
    st.builds(repr, values(4)),
    st.sampled_from(
        ["", "None", "1e999", "-1", "1_0", "(1,", "('a',)", "((),)", "(1, 2)", "'a', 'b'", "{1}"]
    ),
    st.sampled_from(["{}", "b'a'", "lambda: 0", "'\\N{x}'", "\\", "'", "True", "\ud800"]),
    st.sampled_from(["0x" + "f" * 5_000, "9" * 5_000, "(" * 100, "(" * 2_000, "-" * 20_000]),
)
flag = st.one_of(
    st.builds("--config.{}={}".format, key, written),
    st.builds("--config.{}={}".format, st.sampled_from(KEYS), written),
    st.builds("--config.{}={}".format, st.sampled_from(KEYS), written),
    st.builds("-config.{}={}".format, key, written),
    st.builds("--noconfig.{}".format, key),
    st.builds("--config.{}".format, key),
    st.builds("--workdir={}".format, word),
    st.builds("--config={}".format, word),
    st.builds("--{}".format, word.filter(lambda text: not text.startswith("help"))),
    word,
    st.sampled_from(
        ["--", "-", "--config", "--config.", "--config.=", "--flagfile", "--undefok=x"]
    ),
)


@bounded(250)
@given(st.lists(flag, min_size=1, max_size=3))
def test_overrides_give_a_config_of_the_same_types_or_one_sentence(arguments: list[str]) -> None:
    check(*arguments)


@pytest.mark.parametrize("key", ["total_steps", "optimizer.learning_rate", "input.files"])
@pytest.mark.parametrize("text", ["(" * 5_000, "-" * 50_000 + "1", "[" * 50_000, "9" * 50_000])
def test_a_value_that_no_parser_takes_is_one_sentence(key: str, text: str) -> None:
    check(f"--config.{key}={text}")
