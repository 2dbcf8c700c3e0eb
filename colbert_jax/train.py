"""Training: a batch's loss, the step, the loop. Phases differ by config, data and loss only."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from colbert_jax.attention import AttentionForm
from colbert_jax.checkpoint import Checkpoints
from colbert_jax.colbert import ColbertConfig, Params, make_embed, scanned_params
from colbert_jax.cost import model_flops
from colbert_jax.errors import UserError
from colbert_jax.forms import Forms, untried
from colbert_jax.losses import contrastive_loss, distillation_loss
from colbert_jax.maxsim import maxsim_candidates, maxsim_global
from colbert_jax.meter import Meter
from colbert_jax.micro_batch import Encode, fit_lengths, make_encode, used_lengths
from colbert_jax.not_finite import Watch, judge
from colbert_jax.optimizer import build_optimizer
from colbert_jax.sharding import AXIS_RULES, batch_shards, global_batch, partition_spec
from colbert_jax.train_state import TrainState, save_state

Batch = dict[str, Any]  # {"query": tokens, "document": tokens, "scores": teacher's, if any}
Metrics = dict[str, Float[Array, ""]]
LossFn = Callable[[Params, Batch], tuple[Float[Array, ""], Metrics]]

# What the backward pass of the encoder is handed. "full": only the texts of a micro-batch, which it
# encodes again, keeping matrix products of that one. "names": matrix products of all texts. "none":
# every activation.
REMAT = ("full", "names", "none")


def build_step(
    config: Mapping[str, Any],
    model: ColbertConfig,
    sample: Mapping[str, Any] | None = None,
    forms: Forms | None = None,
) -> tuple[Callable[[TrainState, Batch], tuple[TrainState, Metrics]], optax.GradientTransformation]:
    """Builds the compiled training step of a run, and its optimiser.

    Args:
      config: the run's, as plain values.
      model: the model's shape.
      sample: lengths in tokens of some of its texts, "query" and "document", to fit the static
        lengths to; without, these are spread evenly.
      forms: of attention and MaxSim, from `choose_forms`; without, nothing was tried.
    """
    loss_fn = build_loss(config, model, sample, forms)
    optimizer, schedule = build_optimizer(
        config["optimizer"],
        total_steps=config["total_steps"],
        batch_size=config["input"]["batch_size"],
    )

    def count_flops(batch: Batch) -> Float[Array, ""]:
        lengths = used_lengths(batch["query"]), used_lengths(batch["document"])
        return model_flops(model, config["loss"]["kind"], *lengths)

    most = config["optimizer"]["max_skipped"]
    return make_train_step(loss_fn, optimizer, schedule, count_flops, most), optimizer


def build_loss(
    config: Mapping[str, Any],
    model: ColbertConfig,
    sample: Mapping[str, Any] | None = None,
    forms: Forms | None = None,
) -> LossFn:
    """Builds the function from parameters and a batch to the loss; arguments as `build_step`'s."""
    settings, forms = config["model"], forms or untried(config)
    keep_products = settings["remat"] != "none"

    def encode_of(side: str, attention: AttentionForm) -> Encode:
        embed = make_embed(
            model, settings["dtype"], settings["scan_layers"], keep_products, attention
        )
        lengths: int | tuple[int, ...] = settings["lengths"]
        if side == "query" and settings["do_query_expansion"]:
            lengths = 1  # all are of full length: others would be compiled and never used
        elif sample is not None:
            lengths = fit_lengths(sample[side], settings[f"{side}_length"], settings["lengths"])
        recompute = settings["remat"] == "full"
        return make_encode(embed, settings["micro_batch"], lengths, recompute, settings["dtype"])

    return make_loss_fn(
        config["loss"],
        encode_of("query", forms.query_attention),
        encode_of("document", forms.document_attention),
        (lambda params: scanned_params(model, params)) if settings["scan_layers"] else None,
        forms.maxsim_kernels,
    )


def make_loss_fn(
    config: Mapping[str, Any],
    encode_queries: Encode,
    encode_documents: Encode,
    arrange: Callable[[Params], Params] | None = None,
    kernels: bool = False,
) -> LossFn:
    """Makes the function from parameters and a batch of tokens to the loss.

    Each device encodes its share of the batch with parameters that are gathered once a step, and
    their gradient is summed over the devices once: nothing travels inside the loop over
    micro-batches, unless `tensor` splits the model itself.

    Args:
      config: `config.loss`: `kind` ("contrastive" or "distillation"), `temperature`,
        `normalize_scores`, `masked_similarity` as in `maxsim` (None, or 0.0 for PyLate's) and
        `exchange` as in `maxsim_global`.
      encode_queries: tokens to token embeddings, from `make_encode`.
      encode_documents: likewise.
      arrange: how the encoder wants the parameters, if not as they are kept; done once a step.
      kernels: as in `maxsim_global`.

    Returns:
      `loss_fn(params, batch) -> (loss, metrics)`. `batch["query"]` holds arrays `[B, S]`,
      `batch["document"]` arrays `[B, K, T]`: K documents a query, its own first, then its mined
      negatives; or its K candidates, with the teacher's `batch["scores"][B, K]`.
    """
    masked = config["masked_similarity"]
    batch_axes = AXIS_RULES["batch"]

    def share_loss(params: Params, batch: Batch, axes: tuple[str, ...]) -> Metrics:
        """What one device makes of its share: means over its queries, and sums of tokens."""
        query, document = batch["query"], batch["document"]
        count, per_query, length = document["input_ids"].shape
        flat = jax.tree.map(lambda x: x.reshape(count * per_query, length), document)
        queries, query_tokens = encode_queries(params["model"], query, axes)
        documents, document_tokens = encode_documents(params["model"], flat, axes)
        if config["kind"] == "contrastive":
            with jax.named_scope("maxsim"):
                scores = maxsim_global(
                    queries,
                    documents,
                    query["scoring_mask"],
                    flat["scoring_mask"],
                    masked,
                    axes,
                    config["exchange"],
                    kernels,
                )
            first = jax.lax.axis_index(axes) * count if axes else 0
            positives = (first + jnp.arange(count)) * per_query
            temperature = config["temperature"]
            if "log_temperature" in params["loss"]:
                temperature = jnp.exp(params["loss"]["log_temperature"])
            with jax.named_scope("loss"):
                loss, accuracy = contrastive_loss(scores, positives, temperature)
        else:
            candidates = documents.reshape(count, per_query, length, -1)
            with jax.named_scope("maxsim"):
                scores = maxsim_candidates(
                    queries, candidates, query["scoring_mask"], document["scoring_mask"], masked
                )
            with jax.named_scope("loss"):
                loss, accuracy = distillation_loss(
                    scores, batch["scores"], config["normalize_scores"]
                )
        real = query["attention_mask"].sum() + document["attention_mask"].sum()
        return {
            "loss": loss,
            "accuracy": accuracy,
            "tokens": real.astype(jnp.float32),
            "processed_tokens": (query_tokens + document_tokens).astype(jnp.float32),
        }

    def loss_fn(params: Params, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        if arrange is not None:
            params = params | {"model": arrange(params["model"])}
        if batch_shards() == 1:
            metrics = share_loss(params, batch, ())
        else:
            of_shares = jax.shard_map(
                lambda params, batch: jax.tree.map(
                    lambda x: x[None], share_loss(params, batch, batch_axes)
                ),
                in_specs=(PartitionSpec(), PartitionSpec(batch_axes)),
                out_specs=PartitionSpec(batch_axes),
                axis_names=set(batch_axes),
                check_vma=False,
            )(params, batch)
            metrics = {
                name: x.sum() if name.endswith("tokens") else x.mean()
                for name, x in of_shares.items()
            }
        metrics["real_tokens"] = metrics["tokens"] / metrics.pop("processed_tokens")
        return metrics["loss"], metrics

    return loss_fn


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    count_flops: Callable[[Batch], Float[Array, ""]],
    max_skipped: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the compiled `train_step(state, batch) -> (state, metrics)`; the state is donated.

    A step whose loss or gradient is not finite leaves parameters and moments as they are, and the
    learning rate where it was.

    Args:
      loss_fn: from `make_loss_fn`.
      optimizer: what becomes of the gradient.
      schedule: the learning rate, for the metrics.
      count_flops: what a batch asks for, the metric `model_flops`.
      max_skipped: steps in a row after which all are skipped.
    """

    def update(
        grads: Params, params: Params, opt_state: optax.OptState
    ) -> tuple[Params, optax.OptState]:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def keep(
        grads: Params, params: Params, opt_state: optax.OptState
    ) -> tuple[Params, optax.OptState]:
        return params, opt_state

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(grads)
            usable, skipped = judge(state.skipped, loss, grad_norm, max_skipped)
            # One branch for all: a choice for each parameter has XLA's CPU backend compile each
            # update twice, for either outcome, which is a fifth of the time of compilation.
            params, opt_state = jax.lax.cond(
                usable, update, keep, grads, state.params, state.opt_state
            )
            updates_made = state.step - state.skipped.in_all
            metrics |= {
                "grad_norm": grad_norm,
                "learning_rate": jnp.asarray(schedule(updates_made), jnp.float32),
                "skipped": skipped.in_all,
                "skipped_in_row": skipped.in_row,
                "stop": skipped.in_row >= max_skipped,
            }
        metrics["model_flops"] = count_flops(batch)
        if "log_temperature" in state.params["loss"]:
            metrics["temperature"] = jnp.exp(state.params["loss"]["log_temperature"])
        return TrainState(state.step + 1, params, opt_state, skipped), metrics

    return jax.jit(train_step, donate_argnums=0)


@contextlib.contextmanager
def collect_later() -> Iterator[None]:
    """Keeps Python's garbage collector off while a step is traced and lowered.

    That makes a million small objects, none of them garbage yet, and the collector looks at all
    of them again and again: a third of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def abstract_batch(config: Mapping[str, Any], mesh: Mesh) -> Batch:
    """Shapes and shardings of a run's global batch; nothing is read or allocated."""
    settings, count = config["model"], config["input"]["batch_size"]
    per_query = config["input"]["max_documents"]

    def of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        spec = partition_spec(("batch", *(None for _ in shape[1:])), shape, mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def tokens(*shape: int) -> dict[str, jax.ShapeDtypeStruct]:
        masks = {name: of(shape, jnp.bool_) for name in ("attention_mask", "scoring_mask")}
        return {"input_ids": of(shape, jnp.int32)} | masks

    batch: Batch = {
        "query": tokens(count, settings["query_length"]),
        "document": tokens(count, per_query, settings["document_length"]),
    }
    if config["loss"]["kind"] == "distillation":
        batch["scores"] = of((count, per_query), jnp.float32)
    return batch


def check_batch(config: Mapping[str, Any], mesh: Mesh) -> None:
    """Checks that a global batch splits evenly over the mesh and into micro-batches.

    Documents beyond a query's own need not: their last micro-batch is filled up.

    Raises:
      UserError: it does not, with the nearest setting that works.
    """
    size, shards = config["input"]["batch_size"], batch_shards(mesh)
    if size % shards:
        near = max(round(size / shards), 1) * shards
        raise UserError(
            f"config.input.batch_size={size} does not split over {shards} devices (data x fsdp): "
            f"the nearest that does is {near}."
        )
    micro_batch, queries = config["model"]["micro_batch"], size // shards
    if micro_batch and queries > micro_batch and queries % micro_batch:
        divisors = [n for n in range(1, queries + 1) if queries % n == 0]
        near = min(divisors, key=lambda n: abs(n - micro_batch))
        raise UserError(
            f"config.model.micro_batch={micro_batch} does not divide the {queries} queries of a "
            f"device: the nearest that does is {near}."
        )


class BatchIterator(Protocol):
    """What the loop needs of its input."""

    def __next__(self) -> Batch:
        """This host's slice of the next global batch, as numpy."""
        ...

    def get_state(self) -> dict:
        """The position as a small JSON object."""
        ...

    def origin(self, index: int) -> tuple[str, list[int]]:
        """The source of a batch, counted from 0, and which of its rows this host's are."""
        ...


def train(
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: BatchIterator,
    config: dict[str, Any],
    *,
    mesh: Mesh,
    meter: Meter,
    checkpoints: Checkpoints,
    evaluate: Callable[[int, Params], float | None],
    asked_to_stop: Callable[[int], bool] = lambda step: False,
) -> TrainState:
    """Runs the loop up to `config.total_steps`, or until it is asked to stop; saves the last step.

    Args:
      state: where to start; its step says how far an earlier run came.
      train_step: the compiled step.
      batches: the input, at the state's position.
      config: the run's, saved with each state.
      mesh: the mesh of the run.
      meter: takes the metrics.
      checkpoints: takes the states.
      evaluate: called as `evaluate(step, params)` after every step; decides itself what is due, and
        returns what the best checkpoint is chosen by, or None.
      asked_to_stop: called with the step after every one; true on all hosts after the same.

    Returns:
      The last state.

    Raises:
      NotFinite: too many steps in a row were skipped, since their numbers were not finite.
    """
    first, total_steps = int(state.step), config["total_steps"]
    watch = Watch(lambda step: batches.origin(step - 1)[0])
    with meter.running(first, total_steps):
        with meter.waiting():
            batch: Batch = global_batch(next(batches), mesh) if first < total_steps else {}
        for step in range(first + 1, total_steps + 1):
            with collect_later():  # the first call compiles
                state, metrics = train_step(state, batch)
            # Where a restored run stands: this step's batch was taken, the next was not.
            position = batches.get_state()
            if step < total_steps:  # read and sent to the devices while they are at this step
                with meter.waiting():
                    batch = global_batch(next(batches), mesh)
            watch.note(step, metrics, state)
            if meter.due(step):
                meter.note(step, metrics, pairs=len(jax.tree.leaves(batch)[0]))
            with meter.paused():
                # Whoever is asked to stop may have seconds left: no time to measure anything.
                stop = step < total_steps and asked_to_stop(step)
                value = None if stop else evaluate(step, state.params)
                best = checkpoints.is_best(value, config)
                if checkpoints.due(step) or best or stop or step == total_steps:
                    watch.look(state)
                    save_state(checkpoints, state, position, config, value)
            if stop:
                break
    checkpoints.wait()
    return state
