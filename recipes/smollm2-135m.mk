# SmolLM2 135M on a small part of Dolly: a pretrained model through all six stages, on a laptop or on one GPU.
# Weights, gradients and AdamW take 2.4 GB (18 bytes a parameter, estimated), activations more.
# On one GPU of 80 GB (an H100) raise PER_DEVICE_TRAIN_BATCH_SIZE. MAX_STEPS=-1 trains on all of Dolly.
# No times were measured.
MODEL_ID ?= HuggingFaceTB/SmolLM2-135M
INIT_WEIGHTS ?= pretrained
DATASET ?= databricks/databricks-dolly-15k
# The last of the dataset's revisions: main moves, a commit does not.
DATASET_REVISION ?= bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a
PROMPTS ?= recipes/llama2-7b.prompts.jsonl
LOSS_ON ?= response
MAX_LENGTH ?= 512

NPROC_PER_NODE ?= 1
# 1,600 sequences of 512 tokens.
MAX_STEPS ?= 200
PER_DEVICE_TRAIN_BATCH_SIZE ?= 2
GRADIENT_ACCUMULATION_STEPS ?= 4
LEARNING_RATE ?= 1e-4
WARMUP_STEPS ?= 20
BF16 ?= 1
# Measuring the losses of 20 sequences reads as much as 10 micro-batches do.
EVAL_MAX_DOCUMENTS ?= 20

INFERENCE_SEQUENCE_LENGTH ?= 512
MAX_NEW_TOKENS ?= 128
