# A tiny Llama from random weights learns the shipped questions and answers by heart: the whole run in minutes on a CPU.
MODEL_ID ?= data/demo/model
INIT_WEIGHTS ?= random
DATASET ?= data/demo/demo.jsonl
PROMPTS ?= data/demo/prompts.jsonl
LOSS_ON ?= response
MAX_LENGTH ?= 256

NPROC_PER_NODE ?= 1
NUM_TRAIN_EPOCHS ?= 35
PER_DEVICE_TRAIN_BATCH_SIZE ?= 4
LEARNING_RATE ?= 2e-3
WARMUP_STEPS ?= 20
BF16 ?= 1
LOGGING_STEPS ?= 50
EVAL_STEPS ?= 200
SAVE_STEPS ?= 200

INFERENCE_SEQUENCE_LENGTH ?= 256
MAX_NEW_TOKENS ?= 128
