"""The README.md of an exported model: what it is, how it was trained, how to use it."""

from collections.abc import Mapping
from typing import Any

import yaml

from colbert_jax.huggingface import Model
from colbert_jax.results import results_table


def model_card(
    model: Model,
    config: Mapping[str, Any],
    step: int,
    results: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """Writes the card.

    Args:
      model: the description.
      config: the run's config as plain data.
      step: number of updates behind the weights.
      results: system -> measure -> value, as in `results.json`.
    """
    shape, tokens = model.config.encoder, model.tokenizer.config
    header = {
        "library_name": "PyLate",
        "pipeline_tag": "sentence-similarity",
        "tags": ["ColBERT", "PyLate", "sentence-transformers", "late-interaction", "colbert_jax"],
    }
    trained_on = list(config["input"]["files"]) or [config["input"]["corpus"]]
    trained_on = [str(name).rsplit("/", 1)[-1] if config["input"]["files"] else name
                  for name in trained_on]  # fmt: skip
    facts = [
        ("Starts from", config["init_from"] or "random weights"),
        ("Trained on", ", ".join(trained_on)),
        ("Loss", config["loss"]["kind"]),
        ("Updates", f"{step:,} of {config['input']['batch_size']:,} queries each"),
        ("Peak learning rate", f"{config['optimizer']['learning_rate']:g}"),
        ("Compute dtype", config["model"]["dtype"]),
        ("Encoder", f"ModernBERT, {shape.num_hidden_layers} layers of {shape.hidden_size}"),
        ("Token embedding", f"{model.config.embedding_size} numbers of length 1"),
        ("Query length", f"{tokens.query_length} tokens"),
        ("Document length", f"{tokens.document_length} tokens"),
    ]
    if tokens.query_prompt or tokens.document_prompt:
        prompts = f"`{tokens.query_prompt}` and `{tokens.document_prompt}`"
        facts.append(("Prompts (pass prompt_name)", prompts))
    if config["loss"]["kind"] == "contrastive":
        learned = "learned, from " if config["loss"]["learn_temperature"] else ""
        facts.append(("Temperature", f"{learned}{config['loss']['temperature']:g}"))
    parts = [
        "---\n" + yaml.safe_dump(header, sort_keys=False) + "---",
        "# A ColBERT model trained with colbert_jax",
        "It turns a text into one vector a token and ranks documents by MaxSim: the sum over query "
        "tokens of the largest dot product with any document token.",
        "## How it was trained",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in facts),
        "The whole config:",
        "```yaml\n" + yaml.safe_dump(dict(config), sort_keys=False) + "```",
    ]
    if results:
        parts += ["## Results", results_table(results, markdown=True)]
    names = [
        f', prompt_name="{side}"' if prompt else ""
        for side, prompt in (("query", tokens.query_prompt), ("document", tokens.document_prompt))
    ]
    parts += [
        "## Use it",
        "```python\n"
        "from pylate import models, rank\n\n"
        'model = models.ColBERT("path/to/this/folder")\n'
        f'queries = model.encode(["a question"], is_query=True{names[0]})\n'
        f'documents = model.encode([["a text", "another"]], is_query=False{names[1]})\n'
        "print(rank.rerank([[0, 1]], queries, documents))\n"
        "```",
    ]
    return "\n\n".join(parts) + "\n"
