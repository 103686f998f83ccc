"""Document the names of all metrics and pictures, which metrics.csv, W&B and the dashboard share.

Names are ``group/name``; :data:`METRICS` and :data:`MEDIA` describe each one. A ``*`` stands for any text.
A row belongs to an optimizer step, counted as in ``checkpoints/step-N``: row N is the state after N steps,
and what the Nth step used (loss, learning rate, momentum, negatives).
"""

from fnmatch import fnmatchcase

STEP_AXIS = "trainer/global_step"
"""W&B's x axis: optimizer steps (the name Lightning's WandbLogger gives it)."""

GROUPS = {
    "train": "the step: loss, learning rate, logits",
    "mining": "the negatives: similarity, age, what each filter drops, recall of the search",
    "bank": "the memory bank: fill, age",
    "views": "the augmented views",
    "probe": "linear probe",
    "knn": "nearest-neighbour score",
    "stats": "collapse: rank, spread, uniformity",
    "perf": "throughput",
    "data": "files that could not be read",
    "system": "memory",
}
"""Groups of names, with a description."""

METRICS = {
    "train/loss": "the objective, nats",
    "train/lr": "learning rate that the step used, of the first parameter group",
    "train/momentum": "share of its old weights that the key network kept in the step",
    "train/accuracy": "share of queries closer to their key than to every negative",
    "train/positive_similarity": "cosine of query and key, mean",
    "train/negative_similarity": "cosine of query and negatives, mean over all the loss saw",
    "train/effective_negatives": "how many negatives carry a query's gradient: 1 / sum of squared shares",
    "train/neighbours": "nnclr, neighbour_info_nce: share of queries whose neighbour became a positive",
    "train/positives": "supcon: positives of a query",
    "train/skipped_steps": "steps skipped so far: a loss (16-mixed: gradient) was not finite, or no images",
    "mining/positive_similarity": "cosine of query and key, to read the mined ones against",
    "mining/similarity_mean": "cosine of query and mined negatives, mean",
    "mining/similarity_q*": "cosine of query and mined negatives, 10%, 50% and 90% quantiles",
    "mining/age_mean": "optimizer steps since the mined keys were written, mean",
    "mining/drop_*": "share of the admissible rows that this filter of the policy removed",
    "mining/recall": "share of the exact nearest rows that the approximate search found",
    "mining/nprobe": "lists that the search visits",
    "mining/same_label_rate": "share of the mined negatives with their query's label (where labels exist)",
    "bank/fill": "share of the slots that hold a key",
    "bank/admissible": "share of the slots that are young enough to be used",
    "bank/age_mean": "optimizer steps since the keys were written, mean",
    "bank/refused": "keys refused so far because they were not finite",
    "views/distance": "mean squared distance of an image's two views, over that of different images' views",
    "views/std": "standard deviation of the views' pixels, in units of data.std",
    "probe/top1": "linear probe, top-1 accuracy",
    "probe/*": "linear probe, other numbers: few labels, fine-tuning, baselines; NAME_*: the protocol NAME",
    "knn/top1": "nearest-neighbour vote, top-1 accuracy",
    "knn/*": "nearest-neighbour vote, other numbers",
    "stats/rankme": "effective rank of the embeddings in the bank (RankMe)",
    "stats/uniformity": "log mean Gaussian potential of the keys: 0 all equal, -4 spread over the sphere",
    "stats/std": "mean standard deviation of a key's dimensions times sqrt(d): 1 spread, 0 collapsed",
    "stats/attention_*": "attention protocol: share of a map on the masked thing, over the thing's area",
    "stats/*": "other statistics of features",
    "perf/images_per_s": "images (not views) a second, over all ranks",
    "perf/step_ms": "milliseconds of an optimizer step",
    "perf/data_wait": "share of that time spent waiting for the loader",
    "perf/share_*": "share of a step's time that this part takes (profile=true)",
    "data/unreadable": "distinct files that could not be read so far",
    "system/host_memory_mib": "most memory this process has held so far",
    "system/device_memory_mib": "most memory held on the accelerator so far, by torch",
}
"""Every scalar, with a description."""

MEDIA = {
    "views/grid": "images above the two views that the network sees",
    "views/attention": "what the encoder attends to in some images (logging.attention_every_epochs)",
    "mining/gallery": "query -> the hardest of its negatives, with similarities; a red frame: the same label",
    "mining/hardest": "the same as a table of files",
    "bank/map": "the bank's keys along their first two principal components, by class where labels exist",
    "probe/confusion": "linear probe on the test part: rows are true classes, columns predicted ones",
    "knn/confusion": "nearest-neighbour vote on the test part: rows are true classes, columns predicted ones",
}
"""Every picture and table on W&B, with a description."""


def describe(name: str) -> str | None:
    """Return the description of a metric or picture; None for a name that is not documented here."""
    known = METRICS | MEDIA
    matching = (text for pattern, text in known.items() if fnmatchcase(name, pattern))
    return known.get(name) or next(matching, None)
