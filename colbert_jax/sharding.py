"""The device mesh, and the one table that lays logical axes on it.

Parameters and activations name their axes by meaning (`batch`, `embed`, `heads`, ...); the table
`AXIS_RULES` says over which mesh axes each is split. One device is a mesh of shape (1, 1, 1), so
the same program runs there and on a pod.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from colbert_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

AXIS_RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # pairs of a global batch
    # Rows of the embedding table. Split over `tensor`, their gradient would be summed over devices
    # inside the loop over micro-batches, a pattern that XLA for TPU has compiled wrongly
    # (openxla/xla issue 49143).
    "vocab": (),
    "embed": ("fsdp",),  # hidden size in parameters: sharded storage, gathered for use
    "heads": ("tensor",),  # attention heads
    "mlp": ("tensor",),  # intermediate size
    "proj": (),  # token embedding size, 128: too small to split
    "seq": (),
    None: (),
}

Axes = tuple[str | None, ...]


def join_hosts() -> None:
    """Joins this process to the others of a run, where the environment names them.

    `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`
    must be set before any device is touched; without the first, the process runs alone, or, with
    `COLBERT_JAX_HOSTS=auto`, joins those that JAX finds by itself on TPU pods, GKE and Slurm.

    Raises:
      UserError: the address is set and the numbers are not, or JAX finds no hosts.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        _join_found_hosts(os.environ.get("COLBERT_JAX_HOSTS", ""))
        return
    try:
        count, index = (int(os.environ[k]) for k in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    except (KeyError, ValueError) as error:
        raise UserError(
            "JAX_COORDINATOR_ADDRESS is set: set JAX_NUM_PROCESSES and JAX_PROCESS_ID too, each to "
            "a whole number."
        ) from error
    jax.distributed.initialize(address, count, index)


def _join_found_hosts(how: str) -> None:
    if how not in ("", "auto"):
        raise UserError(f"COLBERT_JAX_HOSTS={how} is not known: set it to auto, or not at all.")
    if how == "auto":
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise UserError(
                "COLBERT_JAX_HOSTS=auto, but JAX finds no TPU pod, GKE or Slurm here "
                f"({str(error).rstrip('.')}): set JAX_COORDINATOR_ADDRESS instead."
            ) from error


def lost_host(error: BaseException | None) -> str:
    """What JAX says where another host of the run is gone; empty if that is not what happened.

    Other errors may have followed it while the run was closing what it had open.
    """
    while error is not None:
        # By its text: JAX raises a ValueError where a step is run at once, and another type later.
        if re.search(r"\bGloo .+ failed: ", str(error)):
            return str(error)
        error = error.__cause__ or error.__context__
    return ""


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Makes the mesh with axes `data`, `fsdp` and `tensor`.

    Args:
      data: size of the data axis; -1 takes all devices that the other two leave.
      fsdp: size of the axis over which parameters and optimiser state are split too.
      tensor: size of the axis over which heads and hidden units are split.
      devices: the devices to use; all of `jax.devices()` by default.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    if data == -1:
        data = len(devices) // max(fsdp * tensor, 1)
    if min(data, fsdp, tensor) < 1 or data * fsdp * tensor != len(devices):
        raise UserError(
            f"The mesh (data={data}, fsdp={fsdp}, tensor={tensor}) does not fit {len(devices)} "
            f"device(s): choose config.mesh sizes whose product is {len(devices)}, or data=-1."
        )
    # Auto axes leave the layout of intermediate values to the compiler; under the default
    # Explicit axes each broadcast of a vmapped MaxSim would need a reshard by hand.
    return jax.make_mesh((data, fsdp, tensor), MESH_AXES, (AxisType.Auto,) * 3, devices=devices)


def partition_spec(axes: Axes, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of an array `x[*shape]` whose axes carry these logical names.

    An axis whose size the mesh does not divide stays whole, so that a vocabulary of odd size or a
    batch of one still runs. Inside a `shard_map` its own mesh axes are split already.
    """
    sizes = dict(mesh.shape) | dict.fromkeys(mesh.manual_axes, 1)
    entries: list[tuple[str, ...] | None] = []
    for name, size in zip(axes, shape, strict=True):
        mesh_axes = tuple(a for a in AXIS_RULES[name] if sizes[a] > 1)
        divides = size % math.prod(sizes[a] for a in mesh_axes) == 0
        entries.append(mesh_axes if mesh_axes and divides else None)
    return PartitionSpec(*entries)


def tree_shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """A tree of `NamedSharding` for a tree of arrays (or shapes) and its tree of logical axes."""
    return jax.tree.map(
        lambda x, names: NamedSharding(mesh, partition_spec(names, x.shape, mesh)), shapes, axes
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the layout of an activation inside `jit`; does nothing outside a mesh.

    Left alone, the compiler may follow an `fsdp`-split parameter and split activations by hidden
    size, which trades one gather of a parameter for many of activations.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


def on_each_device(
    function: Callable[..., jax.Array], inputs: Sequence[Axes], output: Axes
) -> Callable[..., jax.Array]:
    """Has every device of the current mesh run a function on its own part, with no exchange.

    For kernels, which the compiler does not split over a mesh; an axis that does not divide by it
    stays whole, and all compute the same. Inside a `shard_map`, its mesh axes are split already.

    Args:
      function: from arrays `x[*axes]` to one array.
      inputs: logical names of the axes of each argument.
      output: likewise of the result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function

    def run(*arrays: jax.Array) -> jax.Array:
        shape = jax.eval_shape(function, *arrays).shape
        return jax.shard_map(
            function,
            in_specs=tuple(
                partition_spec(axes, x.shape, mesh) for axes, x in zip(inputs, arrays, strict=True)
            ),
            out_specs=partition_spec(output, shape, mesh),
            axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
            check_vma=False,
        )(*arrays)

    return run


def batch_shards(mesh: Mesh | AbstractMesh | None = None) -> int:
    """Over how many devices a mesh, by default the current one, splits a batch; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in AXIS_RULES["batch"])


def platform() -> str:
    """What is compiled for: "cpu", "gpu" or "tpu"; the current mesh's, or the default backend's.

    The two differ where a step is compiled ahead of time for devices that are not here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def global_batch(batch: Any, mesh: Mesh) -> Any:
    """Turns each host's slice of a batch into global arrays split over `data` and `fsdp`.

    Args:
      batch: a tree of numpy arrays `x[local_batch, ...]`.
      mesh: the mesh of the run.

    Returns:
      A tree of `jax.Array` of shape `x[batch, ...]`, the first axis over all hosts.
    """

    def place(x: np.ndarray) -> jax.Array:
        shape = (x.shape[0] * jax.process_count(), *x.shape[1:])
        spec = partition_spec(("batch", *(None for _ in x.shape[1:])), shape, mesh)
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x, shape)

    return jax.tree.map(place, batch)


def put_whole(x: Any, mesh: Mesh) -> jax.Array:
    """An array that every host has, whole on every device; one on the devices stays as it is."""
    return _put(x, mesh, PartitionSpec())


def put_batch(x: Any, mesh: Mesh) -> Any:
    """An array `x[batch, ...]` that every host has whole, split over `data` and `fsdp`.

    One that is on the devices already stays as it is, and None stays None.
    """
    if x is None:
        return None
    return _put(x, mesh, partition_spec(("batch", *(None for _ in x.shape[1:])), x.shape, mesh))


def _put(x: Any, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    if isinstance(x, jax.Array):
        return x
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])
