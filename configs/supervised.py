"""Phase 2 of ColBERT-Zero (arXiv 2602.16609): supervised contrastive training.

    python launch/train.py --config=configs/supervised.py --config.init_from=runs/pretrain \
        --workdir=runs/supervised

With mined negatives, ten sources; 32 GH200-hours in the paper. On your own data:
--config.input.files="('triples.jsonl',)" --config.total_steps=N, one
{"query": ..., "document": ..., "negative": [...]} a line.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

SOURCES = (
    "medi_sts_wiki_rephrasal",
    "fever_hn_mine",
    "msmarco_distillation_simlm_rescored_reranked_min15",
    "reddit_triples",
    "medi_sts_flickr_sampled",
    "nq_cocondensor_hn_mine_reranked_min15",
    "nli_simcse_50negs_fixed",
    "medi_supernli_sampled",
    "hotpotqa_hn_mine_shuffled",
    "medi_sts_stackexchange_dupe",
)


def get_config() -> ConfigDict:
    """The config of phase 2."""
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 26_497  # one epoch of 1,695,819 rows
    config.init_from = "runs/pretrain"  # a run's folder, a Hugging Face folder or a hub name
    config.init_revision = ""  # of a hub name; "" is the newest
    config.log_every_steps = 10
    config.export = True  # when the last step is done, to <workdir>/export-<step>
    config.next_command = ""  # printed at the end
    config.compilation_cache = "~/.cache/colbert_jax/compiled"  # of XLA's programs; "": none

    # Devices along each axis; their product is the number of devices, -1 is all that are left.
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    config.input = ConfigDict()
    config.input.corpus = "nomic_supervised"
    config.input.sources = SOURCES
    config.input.files = ()  # local JSON Lines or Parquet files, each a source, go before corpus
    config.input.revision = ""  # of the hub's data set; "" is the newest
    config.input.tokenized = False  # whether to read token ids that launch/prepare.py stored
    config.input.batch_size = 64  # queries a step, over all devices
    config.input.max_documents = (
        11  # the positive and at most 10 mined negatives; a split's fewest decide
    )
    config.input.cache_dir = "~/.cache/colbert_jax"  # prepared corpora are kept here
    config.input.workers = 0  # processes that read and encode ahead, on each host; 0: none
    config.input.threads = 8  # that read and tokenize ahead, on each host

    config.model = ConfigDict()
    config.model.dtype = "bfloat16"  # of the arithmetic; parameters stay float32
    config.model.micro_batch = 16  # texts each device encodes at a time; 0: all
    config.model.lengths = 8  # static lengths that sorted texts are encoded in; 1: all full
    config.model.remat = "full"  # computed again in the backward pass; "names", "none": less
    config.model.scan_layers = True  # a loop over layers, compiled once, or one by one
    config.model.attention = "auto"  # the fused kernel of the backend where it has one; "xla": none
    config.model.embedding_size = 128  # of the projection that a base encoder gets
    config.model.query_length = 32 + 7  # tokens; the prompt takes the 7
    config.model.document_length = 512 + 7  # tokens
    config.model.query_prompt = "search_query: "
    config.model.document_prompt = "search_document: "
    config.model.do_query_expansion = True
    config.model.attend_to_expansion_tokens = False

    config.loss = ConfigDict()
    config.loss.kind = "contrastive"
    config.loss.temperature = 0.2
    config.loss.learn_temperature = False
    config.loss.normalize_scores = True  # min-max of the student's scores, in distillation
    config.loss.masked_similarity = placeholder(float)  # unset: never win; 0.0: as in PyLate
    config.loss.exchange = "gather"  # of documents between devices; "ring" holds fewer at a time

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 8e-6  # peak; linear to 0 at total_steps
    config.optimizer.warmup_steps = 0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0
    config.optimizer.max_skipped = 10  # steps in a row whose numbers are not finite; then it stops
    config.optimizer.gradient_of = "mean"  # clip that of the loss itself

    config.checkpoint = ConfigDict({"every_steps": 1500, "max_to_keep": 3})
    config.evals = ConfigDict()
    config.evals.collections = ()  # BEIR folders, "beir/NAME", or "nanobeir" as in the paper
    config.evals.every_steps = 1500  # 0: at the end alone
    config.evals.best = ""  # of the measures, such as "nDCG@10": the checkpoint with the best stays
    config.evals.baselines = False  # whether to measure BM25 and the untrained model too
    return config
