# Qwen3 0.6B on part of Dolly, on a laptop with 16 GB of free memory or on one GPU.
# Weights, gradients and AdamW take 10.7 GB (18 bytes a parameter, estimated). The logits of a
# micro-batch come on top: 151,936 entries in float32 are 0.3 GB for 512 tokens, and there are several copies.
# On one GPU of 80 GB (an H100) raise PER_DEVICE_TRAIN_BATCH_SIZE and MAX_LENGTH. MAX_STEPS=-1 trains on all of Dolly.
# No times were measured.
MODEL_ID ?= Qwen/Qwen3-0.6B
INIT_WEIGHTS ?= pretrained
DATASET ?= databricks/databricks-dolly-15k
# The last of the dataset's revisions: main moves, a commit does not.
DATASET_REVISION ?= bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a
PROMPTS ?= recipes/llama2-7b.prompts.jsonl
LOSS_ON ?= response
MAX_LENGTH ?= 512

NPROC_PER_NODE ?= 1
# 800 sequences of 512 tokens.
MAX_STEPS ?= 100
PER_DEVICE_TRAIN_BATCH_SIZE ?= 1
GRADIENT_ACCUMULATION_STEPS ?= 8
GRADIENT_CHECKPOINTING ?= 1
LEARNING_RATE ?= 2e-5
WARMUP_STEPS ?= 10
BF16 ?= 1
# A checkpoint has 7.2 GB: weights and AdamW's moments. A hundred steps need none.
SAVE_STEPS ?= 0
EVAL_MAX_DOCUMENTS ?= 20

INFERENCE_SEQUENCE_LENGTH ?= 512
MAX_NEW_TOKENS ?= 128
