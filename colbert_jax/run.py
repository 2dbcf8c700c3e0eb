"""A run, read top to bottom: one phase from its config to an exported model."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from colbert_jax.attention import ATTENTION
from colbert_jax.checkpoint import Checkpoints, config_leaves, read_config
from colbert_jax.colbert import Params, make_embed, param_shapes
from colbert_jax.data.encode import make_encode, sample_lengths
from colbert_jax.data.inputs import Corpus, open_corpus, open_tokens
from colbert_jax.data.pipeline import Batches, batches_per_epoch, make_batches
from colbert_jax.errors import Interrupted, UserError
from colbert_jax.evals import Evals, check_evals, open_collections
from colbert_jax.export import export_run
from colbert_jax.forms import Forms, choose_forms
from colbert_jax.huggingface import Model
from colbert_jax.interruption import LOCK_FILE, hold_workdir, stop_notice
from colbert_jax.meter import Meter
from colbert_jax.metric_log import MetricLog, draw_curves
from colbert_jax.not_finite import FOLDER, NotFinite, keep_steps
from colbert_jax.rates import Rates, peak_rates
from colbert_jax.report import write_report
from colbert_jax.results import Results, results_table, write_json
from colbert_jax.sessions import note_session
from colbert_jax.sharding import join_hosts, lost_host, make_mesh
from colbert_jax.start import CONFIG_FILE, is_run, open_model, start_state
from colbert_jax.train import REMAT, Batch, Metrics, build_step, check_batch, train
from colbert_jax.train_state import TrainState, abstract_state, restore_state, save_state

logger = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: str | Path) -> Results:
    """Trains, evaluates and exports one phase; goes on where an earlier run in `workdir` stopped.

    Args:
      config: what a file in `configs/` makes.
      workdir: the run's folder.

    Returns:
      The content of `<workdir>/results.json`.

    Raises:
      UserError: anything in config, data or folders that the user has to mend.
      Interrupted: it was asked to stop before its last step, and has saved what it had done.
    """
    plain = json.loads(config.to_json())
    keep_compiled(plain["compilation_cache"])
    join_hosts()
    check_settings(plain)
    check_evals(plain["evals"])
    mesh = make_mesh(**plain["mesh"])
    check_batch(plain, mesh)
    workdir = open_workdir(workdir)
    with hold_workdir(workdir), stop_notice() as asked_to_stop:
        return run_phase(config, plain, workdir, mesh, asked_to_stop)


def run_phase(
    config: ConfigDict,
    plain: dict[str, Any],
    workdir: Path,
    mesh: Mesh,
    asked_to_stop: Callable[[int], bool],
) -> Results:
    """The phase from text to export, in a folder that nobody else uses; `plain` is its config."""
    # Text, and how it becomes tokens.
    corpus = open_corpus(plain["input"])
    check_rows(corpus, plain["loss"]["kind"])
    collections = open_collections(plain["evals"]["collections"], corpus)
    checkpoints = Checkpoints(workdir, **plain["checkpoint"])
    resumed = checkpoints.latest_step()
    if resumed is None:
        write_json(workdir / CONFIG_FILE, plain)
    else:
        check_resume(workdir, plain)
    model = open_model(plain, workdir, corpus, fresh=resumed is None)
    if config.input.tokenized:
        corpus = open_tokens(corpus, model.tokenizer)

    # The batches, the model, the loss, the step.
    forms = choose_forms(plain, model.config, workdir)
    batches, train_step, optimizer, like = open_training(plain, corpus, model, mesh, forms)
    embed = make_embed(model.config, config.model.dtype, attention=forms.document_attention)
    with jax.set_mesh(mesh):
        if resumed is None:
            state = start_state(plain, model, optimizer, like)
        else:
            state, input_state = restore_state(checkpoints, like)
            resumed = int(state.step)  # before the newest, where that one is damaged
            batches.set_state(input_state)
            write_json(workdir / CONFIG_FILE, plain)  # only now is it sure to fit the checkpoint
        peak = peak_rates(config.model.dtype)
        facts = describe(config, model, corpus, mesh.size, workdir, resumed, peak)
        if int(state.step) < config.total_steps:
            note_session(workdir, resumed or 0, mesh.size, peak, facts)

        log = MetricLog(workdir, resume_step=resumed)
        meter = Meter(log, config.log_every_steps, peak.flops * mesh.size)

        # How well it ranks, before, during and after.
        encodes = (embed, model.tokenizer, mesh)
        evals = Evals(plain["evals"], collections, encodes, workdir, log, resumed is not None)
        value = evals.before(resumed, config.total_steps, state.params["model"])
        if resumed is not None:
            checkpoints.rate(resumed, value, plain)

        def evaluate(step: int, params: Params) -> float | None:
            return evals.during(step, params["model"], last=step == config.total_steps)

        try:
            state = train(
                state,
                train_step,
                batches,
                plain,
                mesh=mesh,
                meter=meter,
                checkpoints=checkpoints,
                evaluate=evaluate,
                asked_to_stop=asked_to_stop,
            )
            if (step := int(state.step)) < config.total_steps:
                raise Interrupted(
                    f"Stopped after step {step} as asked, which is saved in {workdir}: start the "
                    "same command to go on."
                )
            if collections and "trained" not in evals.results:
                evals.finish(int(state.step), state.params["model"])
        except NotFinite as failure:
            raise keep_failure(failure, batches, workdir, plain) from failure
        finally:
            batches.close()
            if not lost_host(sys.exception()):  # for which closing would wait
                checkpoints.close()
            log.close()
    if jax.process_index() == 0:
        draw_curves(workdir)
        finish(config, int(state.step), workdir, evals.results)
    return evals.results


class Training(NamedTuple):
    """What a run trains with.

    Attributes:
      batches: its input, from the first batch on.
      train_step: `train_step(state, batch) -> (state, metrics)`, not compiled yet.
      optimizer: initialises the state.
      like: shapes and layout of the state.
    """

    batches: Batches
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    optimizer: optax.GradientTransformation
    like: TrainState


def open_training(
    config: dict[str, Any], corpus: Corpus, model: Model, mesh: Mesh, forms: Forms
) -> Training:
    """The batches of a corpus, of text or of tokens, and the step that trains a model on them."""
    settings, encode = config["input"], make_encode(model.tokenizer)
    batches = make_batches(
        corpus.sources,
        encode=encode,
        batch_size=settings["batch_size"],
        max_documents=settings["max_documents"],
        seed=config["seed"],
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=settings["workers"],
        threads=settings["threads"],
    )
    sample = None
    if config["model"]["lengths"] > 1:
        sample = sample_lengths(corpus.sources, encode, settings["max_documents"])
    train_step, optimizer = build_step(config, model.config, sample, forms)
    like = abstract_state(model.config, optimizer, mesh, config["loss"]["learn_temperature"])
    return Training(batches, train_step, optimizer, like)


def keep_failure(
    failure: NotFinite, batches: Batches, workdir: Path, config: dict[str, Any]
) -> UserError:
    """Keeps the state and the batches of steps that stop a run; returns what to tell the user.

    What an earlier stop at the same step left is replaced. The run's own checkpoints stay as they
    are: from the newest of them the same command goes on.
    """
    folder = workdir / FOLDER / f"step-{failure.first}"
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    multihost_utils.sync_global_devices("what an earlier stop left is gone")
    named = sorted({batches.origin(i)[0] for i in range(failure.first - 1, failure.last)})
    try:
        kept = Checkpoints(folder)
        save_state(kept, failure.state, batches.get_state(), config)
        kept.close()
        keep_steps(failure, batches, folder)
        hint = f"look at them with launch/train.py --config=... --replay={folder}"
    except (OSError, UserError) as error:
        hint = f"they could not be kept in {folder} ({error})"
    return UserError(
        f"{workdir}: steps {failure.first} to {failure.last} (batches of {', '.join(named)}) had "
        f"no finite loss and gradient, the last a loss of {failure.values['loss']:.4g} and a "
        f"gradient's norm of {failure.values['grad_norm']:.4g}, and were skipped: {hint}, and go "
        "on from the newest checkpoint with a lower config.optimizer.learning_rate or in float32."
    )


def keep_compiled(folder: str) -> None:
    """Has JAX keep compiled programs in a folder, for a run that goes on or is like an earlier one.

    A folder that is chosen already, by `JAX_COMPILATION_CACHE_DIR` say, stays. One that cannot be
    written is warned about and does no harm.
    """
    if folder and not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


def open_workdir(workdir: str | Path) -> Path:
    """Makes the run's folder, or opens an earlier run's.

    Raises:
      UserError: the folder holds something that is no run.
    """
    workdir = Path(workdir)
    there = {item.name for item in workdir.iterdir()} if workdir.is_dir() else set()
    # The lock is the first that a run makes: a kill soon after leaves it with other beginnings.
    foreign = bool(there) and LOCK_FILE not in there and not is_run(workdir)
    # Only the first host looks: to a later one, what the first has just begun looks foreign.
    if workdir.is_file() or (foreign and jax.process_index() == 0):
        raise UserError(f"{workdir} holds something that is no run: choose another --workdir.")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{workdir} cannot be made ({error.strerror}): choose another --workdir."
        ) from error
    return workdir


def check_settings(config: dict[str, Any]) -> None:
    """Raises `UserError` where a value is none of those to choose from."""
    if config["optimizer"]["max_skipped"] < 1:
        raise UserError(
            f"config.optimizer.max_skipped={config['optimizer']['max_skipped']}: a run has to stop "
            "some time when its numbers are not finite; give 1 or more."
        )
    choices = (
        ("loss", "kind", ("contrastive", "distillation")),
        ("loss", "exchange", ("gather", "ring")),
        ("model", "dtype", ("float32", "bfloat16")),
        ("model", "remat", REMAT),
        ("model", "attention", ATTENTION),
    )
    for section, key, known in choices:
        if config[section][key] not in known:
            raise UserError(
                f"config.{section}.{key} is {config[section][key]!r}: choose one of "
                f"{', '.join(known)}."
            )


def check_resume(workdir: Path, config: dict[str, Any]) -> None:
    """Compares a config with the one that the run was started with.

    What decides the weights' shapes or which rows come when must be the same; how they are read and
    computed may change, and so may all else, which is logged.

    Raises:
      UserError: naming the first value that must not change.
    """
    started = config_leaves(read_config(workdir / CONFIG_FILE))
    free = {"input.cache_dir", "input.threads", "input.workers", "input.tokenized"}
    how = ("dtype", "micro_batch", "lengths", "remat", "scan_layers", "attention")
    free |= {f"model.{key}" for key in how}
    for key, value in config_leaves(config).items():
        was = started.get(key)
        if value == was:
            continue
        if key.startswith(("input.", "model.", "seed", "loss.kind")) and key not in free:
            raise UserError(
                f"{workdir} was started with config.{key}={was!r}, not {value!r}: use the config "
                "that the run was started with, or another --workdir."
            )
        logger.info("config.%s was %r, is now %r", key, was, value)


def check_rows(corpus: Corpus, kind: str) -> None:
    """Raises `UserError` where a source's rows are not what the loss needs."""
    for name, source in corpus.sources.items():
        if kind == "distillation" and not source.has_scores:
            raise UserError(
                f"Source {name} has no teacher's scores, which config.loss.kind='distillation' "
                "needs: give rows with query, documents and scores."
            )
        if kind == "contrastive" and source.has_scores:
            raise UserError(
                f"Source {name} has candidates with scores, not positives: train on it with "
                "configs/distill.py."
            )


def describe(
    config: ConfigDict,
    model: Model,
    corpus: Corpus,
    devices: int,
    workdir: Path,
    resumed: int | None,
    peak: Rates,
) -> dict[str, Any]:
    """Logs what is about to run, and returns the sizes of model and data."""
    parameters = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(param_shapes(model.config)))
    rows = sum(len(source) for source in corpus.sources.values())
    batch_size = config.input.batch_size
    epoch = batches_per_epoch(corpus.sources, batch_size)
    logger.info(
        "%s: %s parameters on %d %s device(s); %s rows in %d source(s), %d batches of %d an epoch; "
        "%s of %d steps; MFU is a share of %.4g TFLOP/s a device (%s)",
        workdir,
        f"{parameters:,}",
        devices,
        jax.default_backend(),
        f"{rows:,}",
        len(corpus.sources),
        epoch,
        batch_size,
        "the first" if resumed is None else f"going on after {resumed}",
        config.total_steps,
        peak.flops / 1e12,
        peak.source,
    )
    return {
        "parameters": parameters,
        "embedding_size": model.config.embedding_size,
        "sources": {name: len(source) for name, source in corpus.sources.items()},
        "rows_per_epoch": rows,
        "batches_per_epoch": epoch,
    }


def finish(config: ConfigDict, step: int, workdir: Path, results: Results) -> None:
    """Exports, writes the report, and prints the results and what to try next."""
    output = workdir / f"export-{step}"
    if config.export and jax.process_count() > 1:
        print(f"Export it on one host: python launch/export.py --workdir={workdir} --output=...")
    elif config.export and not output.exists():
        export_run(workdir, output)
    try:
        report = str(write_report([workdir]))
    except UserError as error:  # an earlier phase's file, say; what was trained is safe
        report = f"none, since {str(error).rstrip('.')}"
    if results:
        print("\n" + results_table(results))
    print(f"\nMetrics: {workdir / 'metrics.jsonl'}, curves: {workdir / 'curves.png'}")
    print(f"Report: {report}")
    if output.exists():
        print(f"Exported for PyLate and Transformers: {output}")
    if config.next_command:
        print(f"Next: {config.next_command}")
