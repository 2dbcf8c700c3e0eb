"""PyLate's contestants, with PyLate's own code. Started by the harness in PyLate's environment.

A set-up is a JSON object with `kind` ("maxsim", "step" or "encode") and the fields that its class
reads. Nothing of colbert_jax is imported.
"""

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pylate import losses, models
from pylate.scores import ColBERTScores, _flash_backend, _lik_backend
from worker import serve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLIP_NORM = 1.0


def build(setup: dict[str, Any]) -> Any:
    """The contestant of a set-up."""
    torch.zeros(1, device=DEVICE)  # the accelerator's libraries, before anything is measured
    return {"maxsim": MaxSim, "step": Step, "encode": Encode}[setup["kind"]](setup)


def fused_maxsim() -> str | None:
    """The fused MaxSim that PyLate picks by itself on this machine, if it is installed."""
    if DEVICE != "cuda":
        return None
    available = {"flash": _flash_backend.is_available(), "lik": _lik_backend.is_available()}
    return next((name for name, there in available.items() if there), None)


def flash_attention(dtype: str) -> bool:
    """Whether FlashAttention is installed, and can be used."""
    importable = importlib.util.find_spec("flash_attn") is not None
    return DEVICE == "cuda" and dtype != "float32" and importable


class OnDevice:
    """What all have in common."""

    def __init__(self) -> None:
        name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
        platform = "gpu" if DEVICE == "cuda" else "cpu"
        self.facts: dict[str, Any] = {
            "platform": platform,
            "device": name,
            "maxsim": fused_maxsim() or "torch",
        }

    def load(self, setup: dict[str, Any]) -> models.ColBERT:
        """The model of a folder, with FlashAttention where the set-up and the machine have it."""
        options = {}
        if setup["flash"] and flash_attention(setup["dtype"]):
            options["model_kwargs"] = {"attn_implementation": "flash_attention_2"}
        model = models.ColBERT(setup["folder"], device=DEVICE, **options)
        self.facts["attention"] = model[0].auto_model.config._attn_implementation
        return model

    def device_peak(self) -> int | None:
        """Peak bytes on an accelerator, since the process began."""
        return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None

    def wait(self) -> None:
        """Waits for the accelerator."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()


class MaxSim(OnDevice):
    """Phase 2 of `CachedContrastive`: scores in chunks of queries, each with its own backward."""

    def __init__(self, setup: dict[str, Any]):
        super().__init__()
        self.chunk = setup["score_mini_batch"]
        self.facts["score_mini_batch"] = self.chunk
        dtype = getattr(torch, setup["dtype"])
        with np.load(setup["inputs"]) as arrays:
            self.query, self.document = (
                torch.from_numpy(arrays[name]).to(DEVICE, dtype).requires_grad_()
                for name in ("query", "doc")
            )
        self.mask = torch.ones(self.document.shape[:2], dtype=torch.bool, device=DEVICE)
        self.metric = ColBERTScores()

    def run(self) -> dict[str, float]:
        """Forward and backward."""
        self.query.grad = self.document.grad = None
        total = torch.zeros((), device=DEVICE)
        labels = torch.arange(len(self.query), device=DEVICE)
        documents, mask = self.document[:, None], self.mask[:, None]
        for begin in range(0, len(self.query), self.chunk):
            part = slice(begin, begin + self.chunk)
            scores = self.metric(self.query[part], documents, documents_mask=mask)
            loss = torch.nn.functional.cross_entropy(scores, labels[part], reduction="sum")
            loss.backward()
            total += loss.detach()
        self.wait()
        return {"loss": float(total) / len(self.query)}


class Step(OnDevice):
    """A step of PyLate's trainer: its loss, clipping, and Transformers' default AdamW."""

    def __init__(self, setup: dict[str, Any]):
        super().__init__()
        self.model = self.load(setup).train()
        if setup["dtype"] == "bfloat16":
            # As the trainer does with bf16=True: weights stay float32, the arithmetic is autocast.
            from accelerate import Accelerator

            Accelerator(mixed_precision="bf16", cpu=DEVICE == "cpu").prepare_model(self.model)
        self.pairs = setup["pairs"]
        self.loss = self._loss(setup)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=3e-4, weight_decay=0.0, fused=True
        )
        self.features = read_features(setup["inputs"])

    def _loss(self, setup: dict[str, Any]) -> torch.nn.Module:
        sizes = {"score_mini_batch_size": setup["score_mini_batch"]}
        self.facts |= sizes
        self.gradient_of = "mean"
        if setup["mini_batch"] is None:
            return losses.Contrastive(self.model, temperature=setup["temperature"], **sizes)
        self.gradient_of = "sum"  # that is what the cached loss back-propagates
        sizes["mini_batch_size"] = self.facts["mini_batch"] = setup["mini_batch"]
        return losses.CachedContrastive(self.model, temperature=setup["temperature"], **sizes)

    def run(self) -> dict[str, float]:
        """Forward, backward, update."""
        self.optimizer.zero_grad()
        # The model writes its output into the dictionaries, which would keep it alive.
        loss = self.loss([dict(side) for side in self.features])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.wait()
        scale = self.pairs if self.gradient_of == "sum" else 1
        return {"loss": float(loss), "grad_norm": float(norm) / scale}


class Encode(OnDevice):
    """A corpus to token embeddings on the host, by `encode`, which sorts and batches by itself."""

    def __init__(self, setup: dict[str, Any]):
        super().__init__()
        self.model = self.load(setup).to(getattr(torch, setup["dtype"]))
        self.texts = json.loads(Path(setup["texts"]).read_text(encoding="utf-8"))
        self.output = Path(setup["output"])
        self.batch_size = self.facts["batch_size"] = setup["batch_size"]

    def run(self) -> dict[str, float]:
        """Encodes all documents; the first pass keeps what is compared."""
        start = time.perf_counter()
        documents = self.model.encode(
            self.texts, is_query=False, batch_size=self.batch_size, show_progress_bar=False
        )
        took = time.perf_counter() - start
        if self.output.exists():
            return {}
        sums = np.stack([x.sum(axis=0, dtype=np.float64) for x in documents])
        np.savez(self.output, sums=sums, counts=[len(x) for x in documents])
        return {"first_seconds": took}


def read_features(path: str) -> list[dict[str, torch.Tensor]]:
    """Queries and documents as PyLate's collator gives them."""
    with np.load(path) as arrays:
        return [
            {
                name: torch.from_numpy(arrays[f"{side}_{name}"].astype(np.int64)).to(DEVICE)
                for name in ("input_ids", "attention_mask")
            }
            for side in ("query", "document")
        ]


if __name__ == "__main__":
    serve(build)
