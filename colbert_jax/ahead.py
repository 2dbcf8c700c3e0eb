"""A run's training step compiled for chips that need not be here, and what it would cost on them.

XLA for TPU (libtpu) compiles on any machine for a topology given by name. What comes out is the
program that a pod would run: it says how much memory a chip needs and what chips send each other.
Time is predicted by a roofline (`cost.py`), not measured.
"""

import concurrent.futures
import copy
import dataclasses
import difflib
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from colbert_jax import huggingface
from colbert_jax.colbert import ColbertConfig, DenseConfig
from colbert_jax.collectives import KINDS, Traffic, read_traffic
from colbert_jax.cost import CHIPS, Chip, Roofline, Work, roofline, step_work
from colbert_jax.errors import UserError
from colbert_jax.forms import choose_forms
from colbert_jax.modernbert import ModernBertConfig
from colbert_jax.run import check_settings
from colbert_jax.sharding import make_mesh
from colbert_jax.start import is_run, new_shape
from colbert_jax.train import abstract_batch, build_step, check_batch, collect_later
from colbert_jax.train_state import abstract_state

logger = logging.getLogger(__name__)

DOES_NOT_FIT_STATUS = 1
PAIRS = 235e6  # of nomic's unsupervised data, for the days that one epoch takes

# Shapes as the models' config.json on the hub have them, so that nothing has to be downloaded.
HUB_ENCODERS = {
    "answerdotai/ModernBERT-base": ModernBertConfig(),
    "answerdotai/ModernBERT-large": ModernBertConfig(
        hidden_size=1024, intermediate_size=2624, num_hidden_layers=28, num_attention_heads=16
    ),
}

# Slices of the kinds with two dimensions that libtpu lays out over hosts of 2 x 2 chips.
FLAT_SIZES = ("2x2", "2x4", "4x2", "4x4", "4x8", "8x4", "8x8", "8x16", "16x8", "16x16")
DEEP_SIZES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip.

    Attributes:
      total: what the program needs in all.
      arguments: state and batch.
      temporaries: what lives within the step.
      code: the program itself.
    """

    total: float
    arguments: float | None = None
    temporaries: float | None = None
    code: float | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What a step costs one chip.

    Attributes:
      topology: as asked for.
      chip: its kind, if it is one of `CHIPS`.
      mesh: sizes of the mesh axes.
      batch_size: queries of a step.
      memory: on one chip; None where XLA gave up without saying what it needs.
      capacity: bytes that a chip has; None where that is not known.
      fits: whether memory is no more than that; True where it is not known.
      work: FLOPs and memory traffic of one chip, from shapes.
      traffic: what it sends; None where the program did not compile.
      seconds: the roofline; None where the chip is not known or the program did not compile.
      compile_seconds: that tracing and XLA took.
      notes: what to know when reading the numbers.
    """

    topology: str
    chip: Chip | None
    mesh: dict[str, int]
    batch_size: int
    memory: Memory | None
    capacity: float | None
    fits: bool
    work: Work
    traffic: Traffic | None
    seconds: Roofline | None
    compile_seconds: float
    notes: tuple[str, ...]


def compile_ahead(
    config: ConfigDict, topology: str, as_json: bool = False, full_effort: bool = False
) -> int:
    """Compiles a run's step for a topology and prints what it costs.

    Args:
      config: what a file in `configs/` makes.
      topology: "v5e:4x4" and the like, or "local" for the devices at hand.
      as_json: whether to print one JSON object instead of a table.
      full_effort: whether XLA for TPU optimises as hard as it does for training, which takes
        several times as long; the memory that it arrives at differs by a few hundredths.

    Returns:
      The program's exit status: 0, or 1 where the step does not fit in memory.

    Raises:
      UserError: anything in config, mesh or topology that the user has to mend.
    """
    plain = json.loads(config.to_json())
    check_settings(plain)
    model_config(plain)
    if topology == "local":
        attempt = report_here
    else:
        check_topology(topology)
        attempt = report_apart
    logger.info("compiling for %s", topology)
    report = attempt(plain, topology, full_effort)
    print(json.dumps(report_json(report)) if as_json else report_table(report))
    if report.fits:
        return 0
    advice = find_advice(report, plain, lambda other: attempt(other, topology, full_effort))
    logger.error("error: %s", advice)
    return DOES_NOT_FIT_STATUS


def report_here(config: dict[str, Any], topology: str, full_effort: bool) -> Report:
    """Compiles in this process.

    Args:
      config: the run's, as plain values.
      topology: as in `compile_ahead`.
      full_effort: likewise; for "local" always.

    Raises:
      UserError: the mesh does not fit the topology, or the batch the mesh.
    """
    devices = topology_devices(topology)
    mesh = choose_mesh(config["mesh"], devices)
    check_batch(config, mesh)
    if topology == "local" or full_effort:
        return measure(config, model_config(config), mesh, topology)
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    report = measure(config, model_config(config), mesh, topology)
    note = "XLA compiled with least effort; --full_effort, minutes, does as training does."
    return dataclasses.replace(report, notes=(*report.notes, note))


def report_apart(config: dict[str, Any], topology: str, full_effort: bool) -> Report:
    """Compiles in a process of its own, which libtpu ends where it meets what it does not expect.

    Arguments and errors are those of `report_here`; `UserError` also where the process ends.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(report_here, config, topology, full_effort).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                f"XLA's compiler for --topology={topology} ended before it was done; its last "
                "lines stand above. Where they name no cause, it may lack memory: try "
                "--config.model.lengths=1."
            ) from error


def model_config(config: dict[str, Any]) -> ColbertConfig:
    """The shape of the model that a run starts from, without its weights or tokenizer.

    Raises:
      UserError: the starting point is neither here nor one whose shape is known.
    """
    settings, init_from = config["model"], config["init_from"]
    if not init_from:
        return new_shape(settings, settings.get("vocab_size", 0))
    if init_from in HUB_ENCODERS:
        encoder = HUB_ENCODERS[init_from]
        projection = DenseConfig(encoder.hidden_size, settings["embedding_size"])
        return ColbertConfig(encoder, (projection,))
    if Path(init_from).is_dir():
        folder = str(Path(init_from) / "model") if is_run(init_from) else init_from
        return huggingface.read_model(folder, embedding_size=settings["embedding_size"]).config
    raise UserError(
        f"config.init_from={init_from!r} is no folder here, and a model of that name is not "
        f"known: for the shape, give --config.init_from={' or '.join(HUB_ENCODERS)}."
    )


def check_topology(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """Reads "v5e:4x4". libtpu may end the process over a name that it does not know.

    Returns:
      The kind of chip, and how many there are along each dimension.

    Raises:
      UserError: no such slice, with the nearest that exists.
    """
    name, _, size = topology.partition(":")
    if name not in CHIPS:
        near = difflib.get_close_matches(name, CHIPS, n=1, cutoff=0.3) or ["v5e"]
        raise UserError(
            f"--topology={topology}: there is no kind of chip {name!r}, the nearest is {near[0]}; "
            f"write local or KIND:SIZE, such as {', '.join(map(_example, CHIPS.values()))}."
        )
    chip = CHIPS[name]
    extents = tuple(int(n) for n in size.split("x")) if re.fullmatch(r"\d+(x\d+)*", size) else ()
    if chip.dimensions == 2 and size in FLAT_SIZES:
        return chip, extents
    deep = len(extents) == chip.dimensions == 3 and 0 < math.prod(extents) <= chip.chips
    if deep and extents[0] % 2 == extents[1] % 2 == 0:
        return chip, extents
    known = FLAT_SIZES if chip.dimensions == 2 else DEEP_SIZES
    wanted = math.prod(extents) or 1
    near_size = min(known, key=lambda s: abs(math.log(_chips(s) / wanted)))
    raise UserError(
        f"--topology={topology}: {name} has no slice of size {size!r}; the nearest is "
        f"{name}:{near_size} ({_chips(near_size)} chips), others are {', '.join(known)}."
    )


def _example(chip: Chip) -> str:
    return f"{chip.name}:{'4x4' if chip.dimensions == 2 else '2x2x2'}"


def _chips(size: str) -> int:
    return math.prod(int(n) for n in size.split("x"))


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a topology, which need not exist; those at hand for "local".

    Raises:
      UserError: no such topology, or no libtpu to compile for it.
    """
    if topology == "local":
        return jax.devices()
    chip, extents = check_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology} needs libtpu, which compiles for TPUs on any machine: "
            "pip install -e '.[tpu]'."
        )
    # libtpu asks the cloud's metadata server what it runs on, unless it is told, and lets one
    # process at a time have it, which compiling need not heed; JAX would look for TPUs to run on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", accelerator_type(chip, extents))
    jax.config.update("jax_platforms", "cpu")
    options = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def accelerator_type(chip: Chip, extents: Sequence[int]) -> str:
    """A slice's name in the cloud; v4 and v5p count TensorCores, of which a chip has two."""
    prefix = {"v5e": "v5litepod"}.get(chip.name, chip.name)
    return f"{prefix}-{math.prod(extents) * (2 if chip.dimensions == 3 else 1)}"


def choose_mesh(sizes: dict[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """The mesh over the devices, or over the first of them where its sizes ask for fewer."""
    count = math.prod(sizes.values())
    return make_mesh(**sizes, devices=devices[:count] if 0 < count < len(devices) else devices)


def measure(config: dict[str, Any], model: ColbertConfig, mesh: Mesh, topology: str) -> Report:
    """Compiles the step and puts together what it costs.

    Args:
      config: the run's, as plain values.
      model: the model's shape.
      mesh: of the topology's devices.
      topology: its name, for the report.
    """
    device = mesh.devices.flat[0]
    chip = next((c for c in CHIPS.values() if c.kind == device.device_kind), None)
    sizes = dict(mesh.shape)
    work = step_work(config, model, sizes, device.platform)
    start = time.perf_counter()
    compiled, wanted = compile_step(config, model, mesh)
    took = time.perf_counter() - start
    memory = traffic = seconds = None
    if compiled is not None:
        memory = program_memory(compiled)
        traffic = read_traffic(compiled.as_text() or "")
        if chip is not None:
            seconds = roofline(work, traffic.bytes_by_kind(), chip, slice_extents(mesh, chip))
    elif wanted:
        memory = Memory(wanted)
    capacity = chip.hbm_bytes if chip else device_memory(device)
    within = memory is None or capacity is None or memory.total <= capacity
    return Report(
        topology=topology,
        chip=chip,
        mesh=sizes,
        batch_size=config["input"]["batch_size"],
        memory=memory,
        capacity=capacity,
        fits=compiled is not None and within,
        work=work,
        traffic=traffic,
        seconds=seconds,
        compile_seconds=took,
        notes=notes(config, traffic),
    )


def device_memory(device: jax.Device) -> float | None:
    """Bytes that a device at hand can give; processors share the machine's."""
    if device.platform == "cpu":
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        return pages * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count() if pages else None
    return (device.memory_stats() or {}).get("bytes_limit")


def compile_step(
    config: dict[str, Any], model: ColbertConfig, mesh: Mesh
) -> tuple[jax.stages.Compiled | None, float | None]:
    """The compiled step; or None and, if XLA says so, the bytes that it would have needed."""
    with jax.set_mesh(mesh):
        forms = choose_forms(config, model)
    train_step, optimizer = build_step(config, model, forms=forms)
    state = abstract_state(model, optimizer, mesh, config["loss"]["learn_temperature"])
    batch = abstract_batch(config, mesh)
    with jax.set_mesh(mesh), collect_later():
        lowered = train_step.lower(state, batch)  # type: ignore[attr-defined]
        try:
            return lowered.compile(), None
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None, wanted_bytes(str(error))


def wanted_bytes(message: str) -> float | None:
    """What XLA says that a program needs, in bytes, when it gives up over memory."""
    patterns = (r"required[^()]*\(([\d.]+)([KMGT])i?B?\)", r"[Uu]sed ([\d.]+)([KMGT])i?B? of")
    for pattern in patterns:
        if found := re.search(pattern, message):
            return float(found.group(1)) * 2 ** (10 * (1 + "KMGT".index(found.group(2))))
    return None


def program_memory(compiled: jax.stages.Compiled) -> Memory | None:
    """What a compiled program needs on one device; donated arguments are its outputs too."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    code = stats.generated_code_size_in_bytes
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Memory(arguments + temporaries + code + new, arguments, temporaries, code)


def slice_extents(mesh: Mesh, chip: Chip) -> tuple[int, ...]:
    """How many chips of a mesh lie along each dimension of the torus."""
    coordinates = [device.coords[: chip.dimensions] for device in mesh.devices.flat]
    return tuple(max(along) - min(along) + 1 for along in zip(*coordinates, strict=True))


def notes(config: dict[str, Any], traffic: Traffic | None) -> tuple[str, ...]:
    """What to know when reading a report."""
    found = ["Predicted by a roofline from shapes; nothing ran. Bytes to memory are an estimate."]
    if config["model"]["lengths"] > 1:
        found.append("All documents are taken to be of full length; real ones take less.")
    if traffic is not None and traffic.unknown_loops:
        found.append(f"{traffic.unknown_loops} loop(s) of unknown length counted as one turn.")
    return tuple(found)


def find_advice(
    report: Report, config: dict[str, Any], attempt: Callable[[dict[str, Any]], Report]
) -> str:
    """One sentence: what does not fit, and the first of some changes that does.

    Args:
      report: of what does not fit.
      config: the run's, as plain values.
      attempt: compiles another config.
    """
    memory, capacity = report.memory, report.capacity
    needs = f"{_gib(memory.total)} GiB" if memory else "more memory"
    has = f"of which a device has {_gib(capacity)}" if capacity else "than there is"
    tried = []
    for changes in smaller_steps(report, config):
        changed = copy.deepcopy(config)
        for key, value in changes.items():
            section, name = key.split(".")
            changed[section][name] = value
        flags = " ".join(f"--config.{key}={value}" for key, value in changes.items())
        logger.info("that does not fit; trying %s", flags)
        other = attempt(changed)
        if other.fits:
            total = f" ({_gib(other.memory.total)} GiB)" if other.memory else ""
            return f"the step needs {needs}, {has}: {flags} fits{total}."
        tried.append(flags)
    failed = f"{' and '.join(tried)} did not fit either: " if tried else ""
    return f"the step needs {needs}, {has}: {failed}take more devices."


def smaller_steps(report: Report, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Changes of a config that compute the same with less memory, the cheapest first."""
    shards = report.mesh["data"] * report.mesh["fsdp"]
    queries = report.batch_size // shards
    changes: dict[str, Any] = {}
    # Of a device's queries, which its halves must divide, or `check_batch` refuses them.
    micro_batch = min(config["model"]["micro_batch"] or queries, queries)
    for _ in range(3):
        if micro_batch % 2 == 0:
            micro_batch //= 2
            changes = changes | {"model.micro_batch": micro_batch}
            yield changes
    if report.mesh["data"] > 1:  # the same devices, which now share the state too
        changes = changes | {"mesh.data": 1, "mesh.fsdp": shards}
        yield changes
    gathers = config["loss"]["kind"] == "contrastive" and config["loss"]["exchange"] == "gather"
    if shards > 1 and gathers:
        yield changes | {"loss.exchange": "ring"}


def report_json(report: Report) -> dict[str, Any]:
    """A report as plain values: bytes, FLOPs and seconds of one chip."""
    chip, seconds, traffic = report.chip, report.seconds, report.traffic
    rate = report.batch_size / seconds.step if seconds else None
    return {
        "topology": report.topology,
        "chip": chip.name if chip else None,
        "mesh": report.mesh,
        "batch_size": report.batch_size,
        "fits": report.fits,
        "memory_bytes": dataclasses.asdict(report.memory) if report.memory else None,
        "hbm_bytes": report.capacity,
        "model_flops": report.work.model_flops,
        "hardware_flops": report.work.hardware_flops,
        "hbm_traffic_bytes": report.work.memory_bytes,
        "collective_bytes": traffic.bytes_by_kind() if traffic else None,
        "seconds": dataclasses.asdict(seconds) | {"step": seconds.step} if seconds else None,
        "mfu": report.work.model_flops / chip.flops / seconds.step if chip and seconds else None,
        "pairs_per_second": rate,
        "days_for_235m_pairs": PAIRS / rate / 86400 if rate else None,
        "compile_seconds": report.compile_seconds,
        "notes": list(report.notes),
    }


def report_table(report: Report) -> str:
    """A report as a table; "-" stands for what is not known."""
    values = report_json(report)
    mesh = ", ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    rows = [
        ("topology", f"{report.topology}, mesh {mesh}"),
        ("pairs of a step", f"{report.batch_size:,}"),
        *memory_rows(report),
        ("model FLOPs", _tera(report.work.model_flops)),
        ("hardware FLOPs", _tera(report.work.hardware_flops)),
    ]
    sent = values["collective_bytes"] or {}
    rows += [(f"{kind} sent", _mib(sent.get(kind))) for kind in KINDS]
    rows += time_rows(values)
    rows.append(("compiled in", f"{report.compile_seconds:.0f} s"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    head = "Per chip and step" + ("" if report.fits else ", DOES NOT FIT")
    return "\n".join([head, "-" * len(head), *lines, *report.notes])


def memory_rows(report: Report) -> list[tuple[str, str]]:
    """The rows about what a chip must hold."""
    memory, capacity = report.memory, report.capacity
    total = f"{_gib(memory.total)} GiB" if memory else "-"
    rows = [("memory", f"{total} of {_gib(capacity) if capacity else '-'}")]
    if memory and memory.arguments is not None:
        rows += [
            ("  state and batch", f"{_gib(memory.arguments)} GiB"),
            ("  within the step", f"{_gib(memory.temporaries or 0)} GiB"),
        ]
    return rows


def time_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows that follow from the chip's speed, from a report as plain values."""
    seconds = values["seconds"]
    if seconds is None:
        names = ("step at best", "  compute", "  memory", "  network", "pairs/s", "235M pairs")
        return [(name, "-") for name in names]
    return [
        ("step at best", f"{seconds['step']:.3f} s, MFU {values['mfu']:.0%}"),
        ("  compute", f"{seconds['compute']:.3f} s"),
        ("  memory", f"{seconds['memory']:.3f} s"),
        ("  network", f"{seconds['network']:.3f} s"),
        ("pairs/s", f"{values['pairs_per_second']:,.0f}"),
        ("235M pairs", f"{values['days_for_235m_pairs']:.2f} days"),
    ]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _mib(size: float | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.1f} MiB"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.3f} T"
