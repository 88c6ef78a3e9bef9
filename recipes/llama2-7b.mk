# Llama 2 7B on Dolly, as in the tutorial of optimum-neuron, on one trn1.32xlarge (32 cores, 21.50 USD an hour).
# There training takes 43 minutes (15.5 USD), compiling before it about 40, compiling for inference about 25.
# All six stages the first time: about 2 hours, 40 to 45 USD (estimated). Take a gp3 volume with 1,000 MB/s.
# This is the ungated copy; MODEL_ID=meta-llama/Llama-2-7b-hf needs its licence accepted on the Hub and HF_TOKEN.
MODEL_ID ?= philschmid/Llama-2-7b-hf
DATASET ?= databricks/databricks-dolly-15k
# The last of the dataset's revisions: main moves, a commit does not.
DATASET_REVISION ?= bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a
PROMPTS ?= recipes/llama2-7b.prompts.jsonl
LOSS_ON ?= all
MAX_LENGTH ?= 2048

NPROC_PER_NODE ?= 32
TENSOR_PARALLEL_SIZE ?= 8
NUM_TRAIN_EPOCHS ?= 3
PER_DEVICE_TRAIN_BATCH_SIZE ?= 1
GRADIENT_ACCUMULATION_STEPS ?= 16
GRADIENT_CHECKPOINTING ?= 1
LEARNING_RATE ?= 5e-5
BF16 ?= 1
ZERO_1 ?= 1
LOGGING_STEPS ?= 10
# Three checkpoints of 13.5 GB; a step takes half a minute, so that at most 11 minutes are lost.
SAVE_STEPS ?= 25

INFERENCE_BATCH_SIZE ?= 1
INFERENCE_SEQUENCE_LENGTH ?= 2048
INFERENCE_TENSOR_PARALLEL_SIZE ?= 2
MAX_NEW_TOKENS ?= 512
# On Neuron the losses are measured on the host's CPU, and the instance is paid for meanwhile: about 3 minutes and
# 1 USD for 4 sequences, 2.3 hours and 50 USD for the default of 200 (estimated).
EVAL_MAX_DOCUMENTS ?= 4
DO_SAMPLE ?= 1
TEMPERATURE ?= 0.9
TOP_K ?= 50
TOP_P ?= 0.9
