# Llama 3.1 8B on Dolly, for one trn1.32xlarge (32 cores, 21.50 USD an hour). Untried: no times were measured.
# MODEL_ID needs its licence accepted on the Hub, and HF_TOKEN.
# A core has 16 GiB. Weights, gradients and ZeRO-1's share of AdamW take about 9 GB of it (estimated), without activations.
# On one H100 or H200: BACKEND=torch NPROC_PER_NODE=1 TENSOR_PARALLEL_SIZE=1 LORA_R=16. Training all weights takes
# 145 GB there (18 bytes a parameter, estimated), more than the 80 or 141 GB that they have.
MODEL_ID ?= meta-llama/Llama-3.1-8B
INIT_WEIGHTS ?= pretrained
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
LEARNING_RATE ?= 2e-5
BF16 ?= 1
ZERO_1 ?= 1
LOGGING_STEPS ?= 10
# A checkpoint has 16.1 GB.
SAVE_STEPS ?= 25

INFERENCE_BATCH_SIZE ?= 1
INFERENCE_SEQUENCE_LENGTH ?= 2048
INFERENCE_TENSOR_PARALLEL_SIZE ?= 2
MAX_NEW_TOKENS ?= 512
# On Neuron the losses are measured on the host's CPU, and the instance is paid for meanwhile.
EVAL_MAX_DOCUMENTS ?= 4
