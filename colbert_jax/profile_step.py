"""Where the time of a training step goes: real steps on real input, traced, summed up by part.

A part is a `jax.named_scope` of the model, the loss or the update. XLA keeps the scopes that an
instruction was traced in as its `op_name`, the profiler names the instruction of everything that
it times, and the text of the compiled program joins the two.
"""

import contextlib
import dataclasses
import json
import logging
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData
from jax.sharding import Mesh
from ml_collections import ConfigDict

from colbert_jax.colbert import ColbertConfig
from colbert_jax.cost import encoder_flops
from colbert_jax.data.inputs import open_corpus, open_tokens
from colbert_jax.errors import UserError
from colbert_jax.forms import choose_forms
from colbert_jax.micro_batch import used_lengths
from colbert_jax.run import check_rows, check_settings, keep_compiled, open_training
from colbert_jax.sharding import global_batch, join_hosts, make_mesh
from colbert_jax.start import open_model, start_state
from colbert_jax.train import Batch, BatchIterator, Metrics, check_batch, collect_later
from colbert_jax.train_state import TrainState

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 2
ENCODER = ("embedding", "attention_global", "attention_local", "mlp", "projection")
PARTS = (*ENCODER, "maxsim", "loss", "optimizer")  # the scopes that the code names
OTHER = "other"  # instructions outside all of them

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_CALLED = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_DEVICE = re.compile(r"/device:(?:GPU|TPU):\d+$")

Task = tuple[Any, Any]  # of a thread pool: the kind of its number, and the number


class Span(NamedTuple):
    """Something that took time on one line of a trace: a thread, a stream or a core.

    Attributes:
      start: nanoseconds.
      end: nanoseconds.
      part: of the instruction that ran; "" where it is no instruction.
      runs: the pool's task that ran, where it was one.
      queues: the task that was given to a pool here, in no time.
    """

    start: float
    end: float
    part: str = ""
    runs: Task | None = None
    queues: Task | None = None


@dataclasses.dataclass(frozen=True)
class Profile:
    """Where the time of a step went.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      devices: that were traced, of this host.
      steps: that were traced.
      seconds: a step, by part; on a CPU summed over its threads, otherwise the mean of the devices.
      wall: seconds a step took.
      input_wait: of those, seconds that the host waited for the next batch.
      flops: that the model's arithmetic takes a step, "encoder" and "maxsim", on what `seconds` are
        of: one device, or the whole CPU.
      trace: the file that the figures were read from.
    """

    platform: str
    devices: int
    steps: int
    seconds: dict[str, float]
    wall: float
    input_wait: float
    flops: dict[str, float]
    trace: Path

    @property
    def traced(self) -> float:
        """Seconds a step of all parts together."""
        return sum(self.seconds.values())


def profile_step(
    config: ConfigDict, steps: int, folder: str | Path, as_json: bool = False
) -> Profile:
    """Runs and traces some steps of a run, and prints where their time went.

    Args:
      config: what a file in `configs/` makes.
      steps: how many to trace, after `WARM_UP_STEPS` that are not.
      folder: where the trace is added.
      as_json: whether to print one JSON object instead of a table.

    Returns:
      What was printed. Each host traces its own devices, and the first prints.

    Raises:
      UserError: anything in config, data or folder that the user has to mend.
    """
    if steps < 1:
        raise UserError(f"--steps={steps} leaves nothing to trace: give 1 or more.")
    plain = json.loads(config.to_json())
    keep_compiled(plain["compilation_cache"])
    join_hosts()
    check_settings(plain)
    mesh = make_mesh(**plain["mesh"])
    check_batch(plain, mesh)
    folder = open_folder(Path(folder))
    profile = measure(plain, mesh, steps, folder)
    if jax.process_index() == 0:
        print(json.dumps(profile_json(profile)) if as_json else profile_table(profile, folder))
    return profile


def open_folder(folder: Path) -> Path:
    """Makes the folder for traces, or takes one that is there; each of several hosts has its own.

    Raises:
      UserError: nothing can be written there.
    """
    if jax.process_count() > 1:
        folder = folder / f"host-{jax.process_index()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): choose another --workdir."
        ) from error
    return folder


def measure(config: dict[str, Any], mesh: Mesh, steps: int, folder: Path) -> Profile:
    """Builds a run up to its first step, and traces steps.

    Args:
      config: the run's, as plain values.
      mesh: the mesh of the run.
      steps: how many to trace.
      folder: where the trace is added.

    Raises:
      UserError: data or model that cannot be used.
    """
    corpus = open_corpus(config["input"])
    check_rows(corpus, config["loss"]["kind"])
    with tempfile.TemporaryDirectory() as scratch:  # for the description that a run would keep
        model = open_model(config, Path(scratch), corpus, fresh=True)
    if config["input"]["tokenized"]:
        corpus = open_tokens(corpus, model.tokenizer)
    forms = choose_forms(config, model.config)
    batches, train_step, optimizer, like = open_training(config, corpus, model, mesh, forms)
    with contextlib.closing(batches), jax.set_mesh(mesh):
        state = start_state(config, model, optimizer, like)
        batch = global_batch(next(batches), mesh)
        compiled = compile_named(train_step, state, batch)
        warm = run_steps(compiled, state, batch, batches, mesh, WARM_UP_STEPS)
        logger.info("tracing %d step(s)", steps)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would time each of Python's calls, and slow the input
        with jax.profiler.trace(str(folder), profiler_options=options):
            ran = run_steps(compiled, warm.state, warm.batch, batches, mesh, steps)
    trace = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    times, devices = read_trace(trace, compiled.as_text() or "")
    local = len(mesh.local_devices)
    flops = part_flops(model.config, ran)
    return Profile(
        platform=mesh.devices.flat[0].platform,
        devices=devices or local,
        steps=steps,
        seconds={part: times[part] / 1e9 / steps / (devices or 1) for part in (*PARTS, OTHER)},
        wall=ran.wall / steps,
        input_wait=ran.input_wait / steps,
        flops={key: n / mesh.size * (1 if devices else local) for key, n in flops.items()},
        trace=trace,
    )


def compile_named(train_step: Any, state: TrainState, batch: Batch) -> jax.stages.Compiled:
    """The compiled step, whose instructions have the names that this code gives them.

    JAX's cache of programs takes two that differ by names alone for the same, so that a step which
    was compiled before a scope was added would come back without it.
    """
    option = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, option)
    jax.config.update(option, True)
    try:
        with collect_later():
            return train_step.lower(state, batch).compile()
    finally:
        jax.config.update(option, before)


class Ran(NamedTuple):
    """Some steps.

    Attributes:
      state: after them.
      batch: the next.
      batches: that were trained on.
      metrics: of each step.
      wall: seconds until the devices were done.
      input_wait: of those, seconds that the host was getting batches.
    """

    state: TrainState
    batch: Batch
    batches: list[Batch]
    metrics: list[Metrics]
    wall: float
    input_wait: float


def run_steps(
    compiled: jax.stages.Compiled,
    state: TrainState,
    batch: Batch,
    batches: BatchIterator,
    mesh: Mesh,
    count: int,
) -> Ran:
    """Trains for some steps as `train` does, getting the next batch while devices are at work."""
    start = time.perf_counter()
    waited = 0.0
    taken, metrics = [], []
    for step in range(count):
        taken.append(batch)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, values = compiled(state, batch)
            asked = time.perf_counter()
            batch = global_batch(next(batches), mesh)
            waited += time.perf_counter() - asked
        metrics.append(values)
    jax.block_until_ready((state, metrics))
    return Ran(state, batch, taken, metrics, time.perf_counter() - start, waited)


def part_flops(model: ColbertConfig, ran: Ran) -> dict[str, float]:
    """FLOPs that a step asks of all devices for "encoder" and "maxsim", as `model_flops` counts.

    Texts count with the tokens that they have, whatever they were padded to.
    """
    whole = encoder = 0.0
    for batch, metrics in zip(ran.batches, ran.metrics, strict=True):
        whole += float(metrics["model_flops"])
        for side in ("query", "document"):
            encoder += 3 * float(encoder_flops(model, used_lengths(batch[side])))
    steps = len(ran.metrics)
    return {"encoder": encoder / steps, "maxsim": (whole - encoder) / steps}


# --- the program: instructions to parts ---


def part_of(op_name: str) -> str | None:
    """The last scope in "jit(train_step)/transpose(jvp(mlp))/dot_general", if it has one."""
    found = [name for name in re.split(r"[/()]", op_name) if name in PARTS]
    return found[-1] if found else None


def program_parts(hlo: str) -> dict[str, str]:
    """The part of each instruction of a compiled program.

    A fusion or call that names no scope itself is of the part that most of the instructions in it
    name; one in which none does is of `OTHER`.

    Args:
      hlo: `compiled.as_text()`, of any platform.

    Returns:
      Parts by the instruction's name, as `instruction_key` has it.
    """
    named: dict[str, str | None] = {}
    called: dict[str, str] = {}
    within: dict[str, Counter[str]] = {}
    computation = ""
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            computation = head.group(1)
            within[computation] = Counter()
        elif computation and (found := _INSTRUCTION.match(line)):
            name = instruction_key(found.group(1))
            op_name = _OP_NAME.search(line)
            named[name] = part_of(op_name.group(1)) if op_name else None
            if part := named[name]:
                within[computation][part] += 1
            if callee := _CALLED.search(line):
                called[name] = callee.group(1)
    parts = {}
    for name, own in named.items():
        most = within.get(called.get(name, ""), Counter()).most_common(1)
        parts[name] = own or (most[0][0] if most else OTHER)
    return parts


def instruction_key(name: str) -> str:
    """An instruction's name as all platforms have it.

    A trace of a TPU has it with what follows ("%fusion.3 = f32[8] fusion(...)"), a GPU's kernel
    has neither dot nor dash ("loop_fusion_3").
    """
    found = re.match(r"%?([\w.\-]+)", name)
    return re.sub(r"[.\-]", "_", found.group(1)) if found else ""


# --- the trace: time by part ---


def read_trace(path: Path, hlo: str) -> tuple[dict[str, float], int]:
    """Sums up a trace.

    Args:
      path: an `.xplane.pb` that the profiler wrote.
      hlo: the text of the program that ran.

    Returns:
      Nanoseconds by part over all steps, threads and devices, and the number of GPUs or TPUs; 0
      where it was the CPU that worked.

    Raises:
      UserError: there is no instruction in it.
    """
    parts = program_parts(hlo)
    module = re.match(r"HloModule ([\w.\-]+)", hlo)
    data = ProfileData.from_file(str(path))
    devices = [plane for plane in data.planes if _DEVICE.match(plane.name)]
    if devices:
        lines = [
            [
                Span(event.start_ns, event.start_ns + event.duration_ns, event_part(event, parts))
                for event in line.events
            ]
            for plane in devices
            for line in instruction_lines(plane)
        ]
    else:
        name = module.group(1) if module else ""
        lines = [
            thread_spans(line.events, parts, name) for plane in data.planes for line in plane.lines
        ]
    times = time_by_part(lines)
    if not times:
        raise UserError(
            f"{path} holds nothing of the step: where the profiler needs a permission, as on some "
            "GPUs for performance counters, what it logged above says so."
        )
    return times, len(devices)


def instruction_lines(plane: Any) -> Iterator[Any]:
    """A device's lines that time instructions, each once; others sum them up or only wait."""
    lines = list(plane.lines)
    whole = [line for line in lines if line.name == "XLA Ops"]  # TPU: one for each core
    yield from whole or (line for line in lines if line.name.startswith("Stream"))  # GPU


def event_part(event: Any, parts: Mapping[str, str]) -> str:
    """The part of what a device did.

    It bears the instruction's name or, where a library's kernel did the work, has it as a property.
    """
    own = parts.get(instruction_key(event.name))
    return own or parts.get(instruction_key(str(dict(event.stats).get("hlo_op", ""))), OTHER)


def thread_spans(events: Iterable[Any], parts: Mapping[str, str], module: str) -> list[Span]:
    """What one thread of the host did for instructions.

    An instruction may leave its work to tasks of XLA's thread pool, which other threads run while
    and after it returns: without them a matrix product would seem to take no time.

    Args:
      events: of the thread's line.
      parts: by instruction.
      module: the program's name; instructions of other programs are of `OTHER`.
    """
    spans = []
    begun: list[tuple[float, Task]] = []
    for event in sorted(events, key=lambda event: event.start_ns):
        start, stats = event.start_ns, dict(event.stats)
        if "hlo_op" in stats:
            ours = stats.get("hlo_module") == module
            part = parts.get(instruction_key(str(stats["hlo_op"])), OTHER) if ours else OTHER
            spans.append(Span(start, start + event.duration_ns, part))
        elif event.name == "ThreadpoolListener::Record":
            spans.append(Span(start, start, queues=(stats.get("_pt"), stats.get("_p"))))
        elif event.name == "ThreadpoolListener::StartRegion":
            begun.append((start, (stats.get("_ct"), stats.get("_c"))))
        elif event.name == "ThreadpoolListener::StopRegion" and begun:
            since, task = begun.pop()
            spans.append(Span(since, start, runs=task))
    return spans


def time_by_part(lines: Iterable[Iterable[Span]]) -> dict[str, float]:
    """Nanoseconds by part: what spans took themselves, tasks counted for who queued them.

    Tasks that no instruction queued are not counted: they start programs and wait for them.
    """
    times: dict[str, float] = defaultdict(float)
    tasks: dict[Task, float] = defaultdict(float)
    queued_by: dict[Task, Span] = {}
    for line in lines:
        for span, own, around in self_times(line):
            if span.part:
                times[span.part] += own
            elif span.runs:
                tasks[span.runs] += own
            elif span.queues and around:
                queued_by[span.queues] = around
    for task, own in tasks.items():
        by = queued_by.get(task)
        while by and by.runs:  # a task that a task queued
            by = queued_by.get(by.runs)
        if by:
            times[by.part] += own
    return times


def self_times(line: Iterable[Span]) -> Iterator[tuple[Span, float, Span | None]]:
    """What each span took without those within it, and the innermost span around it.

    Of two that overlap, the later counts as within the earlier for as long as both last, so that
    all together never take longer than their line.

    Args:
      line: spans of one line, in any order.
    """
    spans = sorted(line, key=lambda span: (span.start, -span.end))
    own = [span.end - span.start for span in spans]
    around: list[int | None] = []
    still: list[int] = []  # those that have begun and not ended, the innermost last
    for index, span in enumerate(spans):
        while still and spans[still[-1]].end <= span.start:
            still.pop()
        around.append(still[-1] if still else None)
        if still:
            own[still[-1]] -= min(span.end, spans[still[-1]].end) - span.start
        still.append(index)
    for span, time_, outer in zip(spans, own, around, strict=True):
        yield span, time_, None if outer is None else spans[outer]


# --- what is printed ---


def profile_json(profile: Profile) -> dict[str, Any]:
    """A profile as plain values; times are in seconds a step."""
    cpu, wall = profile.platform == "cpu", profile.wall
    shares = {part: time_ / profile.traced for part, time_ in profile.seconds.items()}
    rates = {}
    for name, parts in (("encoder", ENCODER), ("maxsim", ("maxsim",))):
        # Threads work at the same time: of a CPU's step, parts have taken their share.
        took = sum(shares[part] * wall if cpu else profile.seconds[part] for part in parts)
        rates[name] = profile.flops[name] / took if took else None
    return {
        "platform": profile.platform,
        "devices": profile.devices,
        "steps": profile.steps,
        "seconds_are": "thread-seconds" if cpu else "device-seconds, mean of the devices",
        "seconds": profile.seconds,
        "shares": shares,
        "traced": profile.traced,
        "wall": wall,
        "input_wait": profile.input_wait,
        "flops_per_second": rates,
        "trace": str(profile.trace),
    }


def profile_table(profile: Profile, folder: Path) -> str:
    """A profile as a table, and how to look at the trace in `folder`."""
    values = profile_json(profile)
    cpu = profile.platform == "cpu"
    unit = "thread-ms/step" if cpu else "ms/step"
    head = f"{'part':16}  {unit:>14}   share"
    rows = [
        f"{part:16}  {1e3 * time_:14,.2f}  {values['shares'][part]:6.1%}"
        for part, time_ in profile.seconds.items()
    ]
    rule = "-" * len(head)
    total = f"{'traced':16}  {1e3 * profile.traced:14,.2f}  {1:6.1%}"
    busy = profile.traced / profile.wall
    at_work = f"{busy:.2f} threads at work" if cpu else f"devices at work for {busy:.0%} of it"
    rates = values["flops_per_second"]
    lines = [
        f"{profile.steps} step(s) on {profile.devices} {profile.platform} device(s)",
        head,
        rule,
        *rows,
        rule,
        total,
        f"{'wall':16}  {1e3 * profile.wall:14,.2f}  {at_work}",
        f"{'input wait':16}  {1e3 * profile.input_wait:14,.2f}  of the wall, while devices work",
        "",
        f"FLOP/s of the model: encoder {_giga(rates['encoder'])}, MaxSim {_giga(rates['maxsim'])}.",
        *(["Thread-ms are of all threads together, also while they wait for each other."] * cpu),
        f'"{OTHER}" is what lies outside all parts.',
        f"Trace: {profile.trace}",
        f"Look at it with xprof (pip install xprof && xprof --logdir={folder}), or open the "
        ".trace.json.gz beside it in ui.perfetto.dev.",
    ]
    return "\n".join(lines)


def _giga(rate: float | None) -> str:
    return "-" if rate is None else f"{rate / 1e9:,.1f} G"
