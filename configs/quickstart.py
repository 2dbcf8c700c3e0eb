"""A small ColBERT from nothing, on docstrings of the installed packages, in under 5 minutes.

    python launch/train.py --config=configs/quickstart.py

Two CPU cores are enough.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The config of the quickstart."""
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 250
    config.init_from = ""  # random weights
    config.init_revision = ""
    config.log_every_steps = 10
    config.export = True
    config.next_command = (  # printed at the end
        "python launch/train.py --config=configs/quickstart.py --config.total_steps=1000 "
        "--workdir=runs/quickstart-1000"
    )
    config.compilation_cache = "~/.cache/colbert_jax/compiled"  # of XLA's programs; "": none

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    config.input = ConfigDict()
    config.input.corpus = "docstrings"
    config.input.sources = ()  # top-level packages; () takes those of a plain install
    config.input.files = ()  # JSON Lines or Parquet files instead of the corpus
    config.input.revision = ""
    config.input.tokenized = False  # whether to read token ids that launch/prepare.py stored
    config.input.batch_size = 64  # pairs a step
    config.input.max_documents = 1  # the positive alone
    config.input.cache_dir = "~/.cache/colbert_jax"  # prepared corpora are kept here
    config.input.workers = 0  # processes that read and encode ahead, on each host; 0: none
    config.input.threads = 2

    config.model = ConfigDict()
    config.model.dtype = "float32"
    config.model.micro_batch = 0  # texts each device encodes at a time; 0: all
    config.model.lengths = 1  # static lengths that sorted texts are encoded in; 1: all full
    config.model.remat = "full"  # computed again in the backward pass; "names", "none": less
    config.model.scan_layers = False  # a loop over layers, compiled once, or one by one
    config.model.attention = "auto"  # the fused kernel of the backend where it has one; "xla": none
    config.model.embedding_size = 128
    config.model.query_length = 24  # tokens
    config.model.document_length = 128  # tokens
    config.model.query_prompt = ""
    config.model.document_prompt = ""
    config.model.do_query_expansion = False
    config.model.attend_to_expansion_tokens = False
    config.model.vocab_size = 8192
    config.model.encoder = ConfigDict()
    config.model.encoder.hidden_size = 128
    config.model.encoder.intermediate_size = 192
    config.model.encoder.num_hidden_layers = 3
    config.model.encoder.num_attention_heads = 2

    config.loss = ConfigDict()
    config.loss.kind = "contrastive"
    config.loss.temperature = 0.05
    config.loss.learn_temperature = False
    config.loss.normalize_scores = True  # in distillation
    config.loss.masked_similarity = placeholder(float)  # unset: never win; 0.0: as in PyLate
    config.loss.exchange = "gather"  # of documents between devices; "ring" holds fewer at a time

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0
    config.optimizer.max_skipped = 10  # steps in a row whose numbers are not finite; then it stops
    config.optimizer.gradient_of = "mean"

    config.checkpoint = ConfigDict({"every_steps": 100, "max_to_keep": 2})
    config.evals = ConfigDict()
    config.evals.collections = ("held_out",)  # or BEIR folders, "beir/NAME", "nanobeir"
    config.evals.every_steps = 0  # 0: at the end alone
    config.evals.best = ""  # of the measures, such as "nDCG@10": the checkpoint with the best stays
    config.evals.baselines = True  # whether to measure BM25 and the untrained model too
    return config
