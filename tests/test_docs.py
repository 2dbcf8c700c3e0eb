"""What the documentation says is there: pages, links, files, flags, keys, messages, commands.

Run as a program, this file takes command lines as JSON on standard input, has each read by the
program that it names, and prints what is wrong with it.
"""

import ast
import contextlib
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from functools import cache, reduce
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from documented import PAGES, ROOT, Command, commands, text_of

FOLDERS = ("launch", "configs", "colbert_jax", "benchmarks", "tests", "docs")
PHASES = ("pretrain", "supervised", "distill")

# Flags that a page mentions and that are another program's.
FOREIGN = {
    "build-arg": "docker",
    "direct_num_workers": "Beam",
    "direct_running_mode": "Beam",
    "environment_config": "Beam",
    "environment_type": "Beam",
    "flink_master": "Beam",
    "region": "Beam",
    "sdk_container_image": "Beam",
    "spark_master_url": "Beam",
    "strict": "mkdocs",
    "temp_location": "Beam",
}


# --- the site ---


def build(folder: Path, site: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as it is built from the repository."""
    folder = tmp_path_factory.mktemp("site")
    status, said = build(ROOT, folder)
    assert status == 0, said
    return folder


def test_the_strict_build_makes_every_page(site: Path) -> None:
    made = {path.stem for path in site.glob("*.html")}
    assert {Path(page).stem for page in PAGES[1:]} <= made  # the README is none of the site's


@pytest.mark.parametrize(
    ("page", "added", "named"),
    [
        ("index.md", "[a page](nowhere.md)", "nowhere.md"),
        ("index.md", "[a place](faq.md#nowhere)", "#nowhere"),
        ("index.md", "[a place](#nowhere)", "#nowhere"),
        ("unlisted.md", "# A page that no menu has", "unlisted.md"),
    ],
)
def test_the_build_fails_over_what_leads_nowhere(
    page: str, added: str, named: str, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / page).open("a", encoding="utf-8") as file:
        file.write(f"\n{added}\n")
    status, said = build(tmp_path, tmp_path / "site")
    assert status != 0 and "Aborted with 1 warnings" in said
    assert named in said.partition("WARNING")[2]


def test_a_reader_fetches_nothing_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"")
    pages = site.rglob("*.html")
    found = {address for page in pages for address in loaded.findall(page.read_text("utf-8"))}
    assert any(address.endswith(".css") for address in found)  # it does look
    assert not [address for address in found if re.match(r"(https?:)?//", address)]
    styles = "".join(path.read_text("utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//[^)]*", styles)


# --- what pages mention ---


def test_links_of_the_readme_lead_somewhere() -> None:
    links = [
        link for link in re.findall(r"\]\(([^)\s#]+)", text_of("README.md")) if ":" not in link
    ]
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).exists()] == []


@cache
def names_of_files() -> set[str]:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {path.name for path in [*paths, *ROOT.iterdir()]}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    text = text_of(page)
    below = re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./-]*", text)
    assert [path for path in below if not (ROOT / path.rstrip(".")).exists()] == []
    named = re.findall(r"(?<![\w/.*-])[\w.-]+\.(?:py|sh|sbatch|yaml|yml|toml)\b", text)
    assert sorted(set(named) - names_of_files()) == []


@cache
def config_of(name: str) -> dict[str, Any]:
    """The values of a config by their dotted names."""
    from colbert_jax.cli import leaf_names

    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    return {key: reduce(getattr, key.split("."), config) for key in leaf_names(config)}


@cache
def config_keys() -> set[str]:
    """Dotted names of all configs' values, and of what holds some of them."""
    parts = [
        key.split(".") for path in (ROOT / "configs").glob("*.py") for key in config_of(path.stem)
    ]
    return {".".join(name[:length]) for name in parts for length in range(1, len(name) + 1)}


@pytest.mark.parametrize("page", PAGES)
def test_config_keys_that_a_page_names_exist(page: str) -> None:
    named = re.findall(r"(?<![\w.])config\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)", text_of(page))
    assert sorted(set(named) - config_keys() - {"json"}) == []  # config.json is a file


def test_the_recipes_table_has_the_configs_values() -> None:
    rows = re.findall(r"^\| `config\.([\w.]+)` \| (.+) \|$", text_of("docs/recipe.md"), re.M)
    assert len(rows) >= 15
    for key, values in rows:
        for name, shown in zip(PHASES, values.split(" | "), strict=True):
            value = config_of(name)[key]
            same = (
                shown == value if isinstance(value, str) else float(shown.replace(",", "")) == value
            )
            assert same, f"{name}: {key}"


def test_what_a_phase_costs_is_steps_times_what_a_step_costs() -> None:
    cost = re.compile(r"^\| (Phase (\d).*?) \| [\d,]+ \| .+? \| ([\d.]+) s \| ([\d.]+) \|$", re.M)
    rows = cost.findall(text_of("docs/recipe.md"))
    assert len(rows) >= 3
    for title, phase, seconds, hours in rows:
        assert re.search(rf"^\| {title} \|.* {seconds} s, ", text_of("docs/scaling.md"), re.M)
        steps = config_of(PHASES[int(phase) - 1])["total_steps"]
        assert float(hours) == round(steps * float(seconds) / 3600, 1), title


# --- messages ---


@cache
def messages() -> frozenset[str]:
    """What a user may be told, with … for every value, as far as one expression says it."""
    found = set()
    for path in [*(ROOT / "colbert_jax").rglob("*.py"), *(ROOT / "launch").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                found |= set(_written(node.args[0]))
    return frozenset(found)


def _written(node: ast.expr) -> list[str]:
    """The texts that an expression may make, or their beginnings."""
    if isinstance(node, ast.IfExp):
        return _written(node.body) + _written(node.orelse)
    if isinstance(node, ast.BinOp):
        return _written(node.left)
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return ["".join(p.value if isinstance(p, ast.Constant) else "…" for p in parts)]  # type: ignore[misc]


def test_messages_that_the_faq_quotes_are_messages() -> None:
    quoted = re.findall(r"^error: (.+)$", text_of("docs/faq.md"), re.M)
    assert len(quoted) >= 40 and len(set(quoted)) == len(quoted)
    assert [quote for quote in quoted if not any(m.startswith(quote) for m in messages())] == []
    assert [quote for quote in quoted if not re.search(r"[a-z]{3}", quote)] == []


# --- commands ---


READ = "the flags are read"


def read_flags(program: str, arguments: list[str]) -> tuple[str, list[str]]:
    """Has a program read its flags, as it does when it is started, and no more.

    Returns:
      What it says is wrong, or nothing; and the names of its flags.
    """
    import argparse

    from absl import app, flags

    known: set[str] = set()
    before, said = set(flags.FLAGS), io.StringIO()
    run, parse_args = app.run, argparse.ArgumentParser.parse_args

    def read_absl(main: Any, flags_parser: Any) -> None:
        for name in set(flags.FLAGS) - before:
            known.update((name, f"no{name}") if flags.FLAGS[name].boolean else (name,))
        flags_parser(sys.argv)
        sys.exit(READ)

    def read_argparse(self: argparse.ArgumentParser, args: Any = None) -> None:
        known.update(o.lstrip("-") for action in self._actions for o in action.option_strings)
        parse_args(self, args)
        sys.exit(READ)

    app.run, argparse.ArgumentParser.parse_args = read_absl, read_argparse  # type: ignore
    sys.argv = [program, *arguments]
    sys.path.insert(0, str((ROOT / program).parent))
    ended: Any = "it reads no flags"
    try:
        with contextlib.redirect_stderr(said):
            runpy.run_path(str(ROOT / program), run_name="__main__")
    except SystemExit as end:
        ended = end.code
    finally:
        app.run, argparse.ArgumentParser.parse_args = run, parse_args  # type: ignore
        del sys.path[0]
        flags.FLAGS.unparse_flags()
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
    return "" if ended == READ else f"{said.getvalue()}{ended}", sorted(known)


# Commands that no page should show, and what of each is wrong.
WRONG = (
    (Command("", "launch/export.py", ("--workdir=a", "--output=b", "--steps=3")), "'steps'"),
    (Command("", "launch/export.py", ("--workdir=a",)), "--output is missing"),
    (
        Command("", "launch/train.py", ("--config=configs/distill.py", "--config.sead=1")),
        "--config.sead: the config has no such key",
    ),
    (Command("", "benchmarks/maxsim.py", ("--pears=3",)), "--pears"),
)


class Read(NamedTuple):
    """What is wrong with each command, and the names of all programs' flags."""

    said: dict[Command, str]
    known: set[str]


@pytest.fixture(scope="module")
def read() -> Read:
    """What programs find in command lines; one process reads all, since each imports JAX."""
    bare = [Command("", f"launch/{path.name}", ()) for path in (ROOT / "launch").glob("*.py")]
    asked = [*commands(), *(command for command, _ in WRONG), *bare]
    done = subprocess.run(
        [sys.executable, __file__],
        cwd=ROOT,
        input=json.dumps([(command.program, command.arguments) for command in asked]),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    said = {command: wrong for command, (wrong, _) in zip(asked, answers, strict=True)}
    return Read(said, {name for _, known in answers for name in known})


def test_programs_of_the_commands_exist() -> None:
    assert len(commands()) >= 30
    assert [command for command in commands() if not (ROOT / command.program).is_file()] == []


def test_commands_give_flags_that_their_programs_take(read: Read) -> None:
    assert {command: read.said[command] for command in commands() if read.said[command]} == {}


@pytest.mark.parametrize(("command", "wrong"), WRONG)
def test_what_a_program_does_not_take_is_found(command: Command, wrong: str, read: Read) -> None:
    assert wrong in read.said[command]


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_a_page_names_exist(page: str, read: Read) -> None:
    scripts = [p.read_text("utf-8") for p in (ROOT / "launch").iterdir() if p.suffix != ".py"]
    flag = re.compile(r"(?<![\w-])--([a-z][\w-]*)")
    named = set(flag.findall(text_of(page)))
    known = read.known | set(flag.findall("\n".join(scripts))) | FOREIGN.keys()
    assert sorted(named - known) == []


if __name__ == "__main__":
    answers = [read_flags(program, list(words)) for program, words in json.load(sys.stdin)]
    print(json.dumps(answers))
