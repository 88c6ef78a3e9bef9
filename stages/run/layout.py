"""The contract between stages: every file, folder and column that one writes and another reads.

    data               train/ [validation/] held_out.jsonl, tokenizer/ prompt.json
    train              shards/ (of the model, or of an adapter with adapter_config.json)
                       metrics.jsonl [tracker.json], config.json generation_config.json,
                       tokenizer/ prompt.json
    consolidate        *.safetensors, config.json generation_config.json, the tokenizer's files,
                       prompt.json [adapter/]
    compile-inference  the backend's compiled model, the tokenizer's files, prompt.json
    eval               answers.jsonl [comparison.jsonl]

Every stage also publishes manifest.json. Standard library only.
"""

from __future__ import annotations

MANIFEST_FILE = "manifest.json"
HISTORY_FOLDER = ".history"  # in outputs/RUN: STAGE/*.json, the manifests of what was replaced

# The data stage's splits: folders that `datasets.load_from_disk` reads.
TRAIN_SPLIT = "train"
VALIDATION_SPLIT = "validation"
# Columns of a split, each int32 [MAX_LENGTH] per sequence.
SEQUENCE_COLUMNS = ("input_ids", "labels", "position_ids")
IGNORED_LABEL = -100  # a label that the loss leaves out; torch.nn.CrossEntropyLoss's ignore_index

PROMPT_FILE = "prompt.json"
TOKENIZER_FOLDER = "tokenizer"
# Everything that AutoTokenizer reads, as far as a model has it.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)

# A model folder in the Hugging Face layout.
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
PICKLED_WEIGHTS = "pytorch_model*.bin"  # weights of a model that has no safetensors

SHARDS_FOLDER = "shards"
ADAPTER_FOLDER = "adapter"  # what LoRA trained, as peft reads it
ADAPTER_CONFIG = "adapter_config.json"  # of peft; in the shards and in the adapter's folder
CHECKPOINTS_FOLDER = "checkpoints"
METRICS_FILE = "metrics.jsonl"
STOP_FILE = "stop"  # in the work folder of a training that is to end: the error, and why
REHEARSAL_FOLDER = "rehearsal"  # in outputs/RUN
REHEARSAL_REPORT = "report.json"  # in it: what was compared, and the seconds that it took
RECORD_FILE = "record.jsonl"  # a rehearsal's training: figures and digests of tensors, step by step
PRECOMPILE_FILE = "precompile.json"
ANSWERS_FILE = "answers.jsonl"
HELD_OUT_FILE = "held_out.jsonl"  # some of the held-out examples, as questions with their answers
COMPARISON_FILE = "comparison.jsonl"  # their answers by the base and the fine-tuned model
