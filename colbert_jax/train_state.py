"""The state of training: made, laid out over the devices, saved and restored."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from colbert_jax.checkpoint import Checkpoints
from colbert_jax.colbert import ColbertConfig, Params, param_axes, param_shapes
from colbert_jax.not_finite import Skipped, none_skipped
from colbert_jax.sharding import replicated, tree_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """All that a step changes.

    Attributes:
      step: number of steps made, those that were skipped among them, int32.
      params: `{"model": ..., "loss": ...}`, float32; "loss" holds the log temperature where it is
        learned and is empty otherwise.
      opt_state: the optimiser's, float32.
      skipped: how many steps changed nothing, since their numbers were not finite.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    skipped: Skipped


def abstract_state(
    config: ColbertConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    learn_temperature: bool = False,
) -> TrainState:
    """Shapes and shardings of a state; nothing is allocated.

    The optimiser's moments are laid out as the parameters they belong to.
    """
    loss_shapes: Params = {}
    loss_axes: Params = {}
    if learn_temperature:
        loss_shapes = {"log_temperature": jax.ShapeDtypeStruct((), jnp.float32)}
        loss_axes = {"log_temperature": ()}
    shapes = {"model": param_shapes(config), "loss": loss_shapes}
    axes = {"model": param_axes(config), "loss": loss_axes}
    shardings = tree_shardings(axes, shapes, mesh)
    opt_shapes = jax.eval_shape(optimizer.init, shapes)
    opt_shardings = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        opt_shapes,
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )

    def with_sharding(shape: jax.ShapeDtypeStruct, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    count = with_sharding(jax.ShapeDtypeStruct((), jnp.int32), replicated(mesh))
    return TrainState(
        step=count,
        params=jax.tree.map(with_sharding, shapes, shardings),
        opt_state=jax.tree.map(with_sharding, opt_shapes, opt_shardings),
        skipped=Skipped(in_all=count, in_row=count),
    )


def init_state(
    make_params: Callable[[], Params], optimizer: optax.GradientTransformation, like: TrainState
) -> TrainState:
    """A state at step 0, born with the shardings of `like`.

    Args:
      make_params: returns the whole `params` tree; traced, so that no device holds it unsplit.
      optimizer: initialises its state from the parameters.
      like: the abstract state.
    """

    def make() -> TrainState:
        params = make_params()
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, params, optimizer.init(params), none_skipped())

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, like))()


def place_state(
    params: Params, optimizer: optax.GradientTransformation, like: TrainState
) -> TrainState:
    """A state at step 0 from parameters on the host, each host placing its own shards.

    Parameters that are placed as wanted already are taken over.
    """

    def place(x: Any, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == abstract.sharding:
            return x
        host = np.asarray(x)
        return jax.make_array_from_callback(abstract.shape, abstract.sharding, lambda i: host[i])

    placed = jax.tree.map(place, params, like.params)
    shardings = jax.tree.map(lambda x: x.sharding, like.opt_state)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(placed)
    step = jax.device_put(jnp.zeros((), jnp.int32), like.step.sharding)
    skipped = jax.device_put(none_skipped(), like.step.sharding)
    return TrainState(step, placed, opt_state, skipped)


def restore_state(checkpoints: Checkpoints, like: TrainState) -> tuple[TrainState, dict]:
    """The newest whole checkpoint's state, in the layout of `like`, and the input's position."""
    params, restored, input_state = checkpoints.restore(
        params=like.params, optimizer=_beside_params(like)
    )
    skipped = Skipped(**restored["skipped"])
    return TrainState(restored["step"], params, restored["state"], skipped), input_state


def _beside_params(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds under "optimizer"."""
    skipped = {"in_all": state.skipped.in_all, "in_row": state.skipped.in_row}
    return {"step": state.step, "state": state.opt_state, "skipped": skipped}


def save_state(
    checkpoints: Checkpoints,
    state: TrainState,
    input_state: dict,
    config: dict,
    value: float | None = None,
) -> None:
    """Starts saving a state with the input's position, the run's config and its worth, if known."""
    checkpoints.save(
        int(state.step),
        params=state.params,
        optimizer=_beside_params(state),
        input_state=input_state,
        config=config,
        value=value,
    )
