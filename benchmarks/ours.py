"""Our contestants: MaxSim forward and backward, a whole training step, encoding a corpus.

Started by the harness. A set-up is a JSON object with `kind` ("maxsim", "step" or "encode") and the
fields that its class reads.
"""

import functools
import json
import runpy
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from worker import serve

from colbert_jax import huggingface, maxsim, rates, train
from colbert_jax.colbert import make_embed
from colbert_jax.forms import choose_forms, maxsim_runs
from colbert_jax.retrieval.encode import Encoder
from colbert_jax.sharding import global_batch, make_mesh
from colbert_jax.train_state import abstract_state, place_state
from colbert_jax.trial import fastest
from colbert_jax.xla_flags import find_platform, set_flags

PRETRAIN = Path(__file__).resolve().parents[1] / "configs" / "pretrain.py"


def build(setup: dict[str, Any]) -> Any:
    """The contestant of a set-up."""
    set_flags(find_platform())  # as the programs do
    jax.devices()  # the accelerator's libraries, before anything is measured
    return {"maxsim": MaxSim, "step": Step, "encode": Encode}[setup["kind"]](setup)


class OnDevice:
    """What all have in common."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {
            "platform": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
        }

    def compile(self, function: Any, *inputs: Any) -> Any:
        """Compiles, and says how long it took and what the program asks for in bytes."""
        start = time.perf_counter()
        compiled = function.lower(*inputs).compile()
        used = compiled.memory_analysis()
        total = used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes
        self.facts |= {
            "compile_seconds": time.perf_counter() - start,
            "temporary_bytes": used.temp_size_in_bytes,
            # A donated argument and the output that takes its place are counted once.
            "compiled_bytes": total - used.alias_size_in_bytes,
        }
        return compiled

    def device_peak(self) -> int | None:
        """Peak bytes on an accelerator, since the process began."""
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


class MaxSim(OnDevice):
    """Scores of all pairs, their cross-entropy, and its gradient."""

    def __init__(self, setup: dict[str, Any]):
        super().__init__()
        with np.load(setup["inputs"]) as arrays:
            embeddings = [jnp.asarray(arrays[name], setup["dtype"]) for name in ("query", "doc")]
        masks = [jnp.ones(x.shape[:2], bool) for x in embeddings]
        self.inputs = (*embeddings, *masks)
        score = maxsim.maxsim_all_pairs
        if setup["naive"]:
            score = maxsim.maxsim_all_pairs_reference
        elif jax.default_backend() == "gpu":
            lengths = (x.shape[1] for x in embeddings)
            runs = maxsim_runs(*lengths, embeddings[0].shape[2], setup["dtype"], None)
            best, _ = fastest("MaxSim", runs)
            score = functools.partial(score, kernels=best == "kernels")

        def loss(queries, documents, query_mask, document_mask):
            scores = score(queries, documents, query_mask, document_mask)
            return jnp.mean(jax.nn.logsumexp(scores, axis=1) - jnp.diagonal(scores))

        self.program = self.compile(jax.jit(jax.value_and_grad(loss, (0, 1))), *self.inputs)

    def run(self) -> dict[str, float]:
        """Forward and backward."""
        value, _ = jax.block_until_ready(self.program(*self.inputs))
        return {"loss": float(value)}


class Step(OnDevice):
    """A training step as `configs/pretrain.py` has it, with the set-up's values."""

    def __init__(self, setup: dict[str, Any]):
        super().__init__()
        model = huggingface.read_model(setup["folder"])
        self.dtype, self.matmul_flops = setup["dtype"], None
        config = step_config(setup)
        forms = choose_forms(config, model.config)
        step, optimizer = train.build_step(config, model.config, forms=forms)
        self.mesh = make_mesh(devices=jax.devices()[:1])
        batch = global_batch(read_batch(setup["inputs"]), self.mesh)
        with jax.set_mesh(self.mesh), naive_maxsim() if setup["naive"] else nullcontext():
            state = abstract_state(model.config, optimizer, self.mesh)
            self.program = self.compile(step, state, batch)
            if setup["naive"]:
                return  # only its memory is asked for
            weights = huggingface.read_weights(setup["folder"], model, seed=0)
            params = {"model": weights, "loss": {}}
            self.batch, self.state = batch, place_state(params, optimizer, state)

    def run(self) -> dict[str, float]:
        """Forward, backward, update."""
        with jax.set_mesh(self.mesh):
            self.state, metrics = jax.block_until_ready(self.program(self.state, self.batch))
        names = ("loss", "grad_norm", "tokens", "real_tokens", "model_flops")
        numbers = {name: float(metrics[name]) for name in names}
        if self.matmul_flops is None:  # in the first pass, which nothing runs beside
            self.matmul_flops = rates.measure_flops(self.dtype)
        return numbers | {"matmul_flops": self.matmul_flops}


class Encode(OnDevice):
    """A corpus to token embeddings on the host, as `launch/search.py` encodes it for an index."""

    def __init__(self, setup: dict[str, Any]):
        super().__init__()
        model = huggingface.read_model(setup["folder"])
        mesh = make_mesh(devices=jax.devices()[:1])
        embed = make_embed(model.config, setup["dtype"])
        self.encoder = Encoder(embed, model.tokenizer, mesh, setup["batch_size"])
        params = huggingface.read_weights(setup["folder"], model, seed=0)
        self.params = self.encoder.place(params)
        self.texts = json.loads(Path(setup["texts"]).read_text(encoding="utf-8"))
        self.output = Path(setup["output"])
        self.facts["batch_size"] = setup["batch_size"]

    def run(self) -> dict[str, float]:
        """Encodes all documents; the first pass, which compiles, keeps what is compared."""
        start = time.perf_counter()
        documents, padded = self.encode()
        took = time.perf_counter() - start
        if self.output.exists():
            return {}
        sums = np.stack([x.sum(axis=0, dtype=np.float64) for x in documents])
        np.savez(self.output, sums=sums, counts=[len(x) for x in documents])
        return {"first_seconds": took, "padded_tokens": padded}

    def encode(self) -> tuple[list[np.ndarray], int]:
        """The `[token, dim]` that MaxSim may use of each document, and the tokens worked on."""
        documents: list[Any] = [None] * len(self.texts)
        padded = 0
        for block in self.encoder.documents(self.params, self.texts):
            padded += block.mask.size
            mask = np.asarray(block.mask)[: len(block.positions)]
            rows = np.asarray(block.embeddings)[: len(block.positions)][mask]
            parts = np.split(rows, mask.sum(axis=1).cumsum()[:-1])
            for position, part in zip(block.positions, parts, strict=True):
                documents[position] = part
        return documents, padded


def naive_maxsim() -> Any:
    """Puts the definition of MaxSim, all similarities at once, in the place of ours."""

    def all_at_once(queries, documents, query_mask, document_mask, masked, *_):
        return maxsim.maxsim_all_pairs_reference(
            queries, documents, query_mask, document_mask, masked
        )

    return mock.patch.object(train, "maxsim_global", all_at_once)


def step_config(setup: dict[str, Any]) -> dict[str, Any]:
    """The config of phase 1 with the set-up's values, as plain values."""
    config = runpy.run_path(str(PRETRAIN))["get_config"]()
    config.input.batch_size = setup["pairs"]
    for name in ("dtype", "micro_batch", "query_length", "document_length"):
        config.model[name] = setup[name]
    for name in ("lengths", "remat", "scan_layers"):
        if setup.get(name) is not None:
            config.model[name] = setup[name]
    if setup["naive"]:
        config.model.update(micro_batch=0, lengths=1, remat="none")
    config.loss.masked_similarity = setup["masked_similarity"]
    plain: dict[str, Any] = config.to_dict()
    return plain


def read_batch(path: str) -> dict[str, Any]:
    """The batch as the training loop gets it."""
    with np.load(path) as arrays:
        sides = {
            side: {
                name: arrays[f"{side}_{name}"]
                for name in ("input_ids", "attention_mask", "scoring_mask")
            }
            for side in ("query", "document")
        }
    sides["document"] = {name: x[:, None] for name, x in sides["document"].items()}
    return sides


if __name__ == "__main__":
    serve(build)
