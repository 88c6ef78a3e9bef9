"""Every setting, declared once: type, default, unit, bounds, help and the stages that it affects.

The make variable, the environment variable and the click option of a setting are its field's name
in capitals (`learning_rate` -> `LEARNING_RATE`). `make help`, docs/settings.md, the options of the
stage scripts, the checks and the provenance that decides what is stale all come from this class.

The road of one setting: `make train LEARNING_RATE=1e-4` exports it (Makefile); stale.py reads it to
say what is stale; the stage's click option reads it again (cli.py); `Settings` reaches
`backend.train`, which starts the workers with `environment()`; each worker reads it a last time
and hands it to the optimizer. Standard library only: make imports this at every start.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from stages.run.cache_url import check_cache_url
from stages.run.errors import InputError
from stages.run.gates import parse_gates, unasked_answers, unnamed_tasks
from stages.run.machines import check_machine, check_machines
from stages.run.push_target import check_hub_repo, check_push_target, overwrites
from stages.run.recipe import RECIPES, read_recipe
from stages.run.server_address import check_host, check_url
from stages.run.setting import as_text, parse, setting, variable
from stages.run.sizes import parse_duration, parse_size
from stages.run.task_names import task_names

_MODEL = "precompile train"
# Names of variables that hold a secret, or belong to one.
SECRET = re.compile(r"(HF|AWS|MLFLOW|TRACKIO|WANDB)_\w+|\w*(TOKEN|SECRET|PASSWORD|API_KEY)")


@dataclass(frozen=True)
class Settings:
    """The settings of one run. `Settings.read` makes them from text and reports all problems."""

    # What runs where.
    backend: str = setting(
        "auto",
        "Backend of the stages; auto: neuron (optimum-neuron) on Trainium 1 and Inferentia 2, else "
        "torch.",
        "precompile train consolidate compile-inference eval",
        choices=("auto", "torch", "neuron"),
    )
    device: str = setting(
        "auto",
        "Device of the torch backend; auto: the fastest that is here. neuron is Trainium 2 and 3.",
        "compile-inference",
        choices=("auto", "cpu", "cuda", "neuron"),
    )
    nproc_per_node: int = setting(
        1,
        "Training processes, one per NeuronCore or GPU: tensor x pipeline x data parallel.",
        _MODEL,
        least=1,
        most=4096,
    )
    tensor_parallel_size: int = setting(
        1, "Processes that share each layer's weights.", _MODEL, least=1
    )
    pipeline_parallel_size: int = setting(
        1, "Groups of processes that each hold some of the layers (Neuron).", _MODEL, least=1
    )
    instance_price: float = setting(
        0.0,
        "Price of this machine; 0 = the list price of its EC2 type, where known.",
        unit="USD/h",
        least=0,
    )
    budget: float = setting(
        0.0,
        "What a run may cost up to the end of train, over all its starts; 0 = no limit.",
        unit="USD",
        least=0,
    )
    deadline: str = setting(
        "",
        "How long a run may take up to the end of train, over all its starts, such as 2h or 90min; "
        "empty = no limit.",
        check=parse_duration,
    )
    instance: str = setting(
        "",
        "EC2 type that `make plan` plans for, such as trn1.32xlarge; empty for this machine.",
        check=check_machine,
    )
    compare: str = setting(
        "", "EC2 types that `make plan` puts side by side, with spaces.", check=check_machines
    )
    trace: bool = setting(
        False,
        "Let `make plan` trace a step of the real worker for its activations; some ten seconds.",
    )
    verify: bool = setting(
        False,
        "Compare the digest of every published file, not only its size; re-run damaged stages.",
    )
    seed: int = setting(
        42,
        "Seed of the held-out documents, random weights, batch order and sampling.",
        "data train eval",
        least=0,
    )

    # The base model.
    model_id: str = setting(
        "data/demo/model",
        "Base model: Hub id or local folder.",
        "data precompile train eval",
        path=True,
    )
    model_revision: str = setting(
        "main", "Revision of MODEL_ID on the Hub.", "data precompile train eval"
    )
    init_weights: str = setting(
        "pretrained",
        "Start from the model's weights, or from random ones made from its config.json and SEED.",
        "train eval",
        choices=("pretrained", "random"),
    )
    allow_pickle: bool = setting(
        False,
        "Read the weights of a model that has only pickles (.bin); only tensors, never code.",
    )

    # The dataset.
    dataset: str = setting(
        "data/demo/demo.jsonl",
        "Hub id; .jsonl/.json/.csv/.tsv (.gz) or .parquet file, folder of them, or saved by "
        "`datasets`, here or at s3://.",
        "data",
        path=True,
    )
    dataset_revision: str = setting("main", "Revision of DATASET on the Hub.", "data")
    dataset_config: str = setting(
        "", "Configuration of DATASET on the Hub; empty where it has only one.", "data"
    )
    dataset_split: str = setting("train", "Split of DATASET.", "data")
    messages_column: str = setting(
        "auto",
        "Column of conversations; auto: found by its name (messages, conversations).",
        "data",
    )
    instruction_column: str = setting(
        "auto",
        "Column of the instruction; auto: found by its name (instruction, prompt, question); empty "
        "for texts without one.",
        "data",
        may_be_empty=True,
    )
    context_column: str = setting(
        "auto",
        "Column of the context; auto: found by its name (context, input); empty for none.",
        "data",
        may_be_empty=True,
    )
    response_column: str = setting(
        "auto",
        "Column of the response; auto: found by its name (response, output, completion, answer).",
        "data",
    )
    prompt_format: str = setting(
        "auto",
        "How prompts are written: as in the Dolly tutorial, by the model's chat template, or by "
        "the file PROMPT_TEMPLATE; auto: chat for conversations if the model has a template.",
        "data",
        choices=("auto", "dolly", "chat", "file"),
    )
    prompt_template: str = setting(
        "",
        "File with the text of a prompt, which names {instruction}, {context} and {response}.",
        "data",
        path=True,
    )
    chat_template: str = setting(
        "",
        "File with a chat template (Jinja), in place of the model's.",
        "data",
        path=True,
    )
    max_examples: int = setting(
        0,
        "Examples to read of DATASET, from its beginning; 0 = all.",
        "data",
        unit="examples",
        least=0,
    )
    max_length: int = setting(
        2048,
        "Length of a packed sequence.",
        "data precompile train",
        unit="tokens",
        least=2,
        most=2**20,
    )
    packing: str = setting(
        "best_fit",
        "best_fit cuts no document that fits a sequence; concat joins all and cuts at MAX_LENGTH.",
        "data",
        choices=("best_fit", "concat"),
    )
    overlong: str = setting(
        "truncate",
        "What happens to a document longer than MAX_LENGTH (best_fit).",
        "data",
        choices=("truncate", "drop", "error"),
    )
    validation_fraction: float = setting(
        0.02, "Documents held out for validation.", "data", unit="fraction", least=0, below=1
    )
    loss_on: str = setting(
        "all",
        "Tokens that the loss counts: all, or only those of responses.",
        "data",
        choices=("all", "response"),
    )

    push_dataset: str = setting(
        "",
        "Where the packed sequences are saved too: s3://BUCKET/PREFIX, or OWNER/NAME, private on "
        "the Hub; empty for nowhere.",
        check=check_push_target,
    )

    # Training.
    num_train_epochs: float = setting(
        3.0, "Passes over the training sequences.", "train", unit="epochs", above=0, most=1000
    )
    max_steps: int = setting(
        -1, "Optimizer steps; -1 = NUM_TRAIN_EPOCHS decides.", "train", unit="steps", least=-1
    )
    per_device_train_batch_size: int = setting(
        1,
        "Sequences in a micro-batch of one data-parallel rank.",
        _MODEL,
        unit="sequences",
        least=1,
    )
    gradient_accumulation_steps: int = setting(
        1, "Micro-batches per optimizer step.", _MODEL, least=1
    )
    learning_rate: float = setting(5e-5, "Peak learning rate of AdamW.", "train", above=0, most=10)
    lr_scheduler_type: str = setting(
        "cosine",
        "Learning rate after the warm-up: a cosine or a line to zero, or constant.",
        "train",
        choices=("cosine", "linear", "constant"),
    )
    warmup_steps: int = setting(
        0,
        "Steps in which the learning rate rises from zero.",
        "train",
        unit="steps",
        least=0,
        on_or_off="precompile",
    )
    weight_decay: float = setting(
        0.0,
        "AdamW's decoupled weight decay; norms and biases have none.",
        "train",
        least=0,
        below=1,
        on_or_off="precompile",
    )
    adam_beta1: float = setting(
        0.9, "AdamW's decay of the first moment.", "train", least=0, below=1
    )
    adam_beta2: float = setting(
        0.999, "AdamW's decay of the second moment.", "train", least=0, below=1
    )
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon.", "train", above=0)
    max_grad_norm: float = setting(
        1.0,
        "Gradients are clipped to this norm; 0 = never.",
        "train",
        least=0,
        on_or_off="precompile",
    )
    bf16: bool = setting(
        True,
        "Compute in bfloat16 with float32 master weights, and publish bfloat16.",
        f"{_MODEL} consolidate",
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, a third more time.", _MODEL
    )
    zero_1: bool = setting(
        True, "Shard the optimizer over the data-parallel ranks (torch: FSDP2, always on).", _MODEL
    )
    torch_compile: bool = setting(False, "Compile the layers with inductor (torch).", _MODEL)
    logging_steps: int = setting(10, "Steps between lines of metrics.jsonl.", unit="steps", least=1)
    tracker: str = setting(
        "none",
        "Experiment tracker that training's metrics go to as well (docs/tracking.md).",
        choices=("none", "tensorboard", "mlflow", "wandb", "trackio"),
    )
    eval_steps: int = setting(
        100, "Steps between validation losses during training; 0 = never.", unit="steps", least=0
    )
    save_steps: int = setting(
        100, "Steps between checkpoints to resume from; 0 = none.", unit="steps", least=0
    )
    save_total_limit: int = setting(
        2,
        "Checkpoints to keep; with two, a damaged one is no loss.",
        unit="checkpoints",
        least=1,
    )
    resume: str = setting(
        "restart",
        "After an interruption on Neuron: start again, or from the last weights, optimizer reset.",
        choices=("restart", "weights"),
    )

    # LoRA.
    lora_r: int = setting(
        0,
        "Rank of LoRA adapters; 0 = train all weights.",
        _MODEL,
        least=0,
    )
    lora_alpha: int = setting(
        16, "LoRA's updates are scaled by LORA_ALPHA / LORA_R.", _MODEL, least=1
    )
    lora_dropout: float = setting(
        0.05, "Dropout before LoRA's adapters.", _MODEL, unit="fraction", least=0, below=1
    )
    lora_target_modules: str = setting(
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
        "Linear layers that get an adapter, separated by spaces.",
        _MODEL,
    )

    # A rehearsal of the training.
    rehearse: bool = setting(
        False, "Rehearse before train: stop where the first steps deviate from a CPU's."
    )
    rehearsal_steps: int = setting(10, "Steps of a rehearsal.", unit="steps", least=2, most=1000)
    rehearsal_minutes: float = setting(
        10.0, "Time that a rehearsal gives the CPU for its steps.", unit="minutes", above=0
    )
    rehearsal_layers: int = setting(
        2, "Layers of the model that are rehearsed, its first ones.", unit="layers", least=1
    )

    # The compiler's cache (Neuron).
    neuron_compile_cache_url: str = setting(
        "/var/tmp/neuron-compile-cache",
        "Cache of compiled graphs of all runs: an absolute path without dots, or s3:// (Neuron).",
        check=check_cache_url,
    )
    custom_cache_repo: str = setting(
        "",
        "Hub repository of compiled graphs. Stages ask it; `make cache-synchronize` fills it.",
    )

    # Consolidation.
    max_shard_size: str = setting(
        "5GB", "Largest safetensors file.", "consolidate", unit="bytes", check=parse_size
    )
    keep_shards: bool = setting(
        True, "Keep train's shards after the consolidated model is published."
    )

    # The model on the Hub.
    hub_repo: str = setting(
        "",
        "Where `make push` puts the model: OWNER/NAME on the Hub.",
        check=check_hub_repo,
    )
    hub_public: bool = setting(
        False, "Let everyone read HUB_REPO; 0 = make it private, and refuse one that is public."
    )

    # Compiled inference.
    inference_batch_size: int = setting(
        1, "Slots: prompts answered at once.", "compile-inference", least=1
    )
    inference_sequence_length: int = setting(
        2048,
        "Length of a prompt and its answer together.",
        "compile-inference",
        unit="tokens",
        least=2,
    )
    inference_tensor_parallel_size: int = setting(
        1,
        "Cores that share the compiled model (Neuron), or GPUs that share the served one.",
        "compile-inference",
        least=1,
    )
    quantize: str = setting(
        "none",
        "Weights of the compiled model's linear layers; int8: a scale for each row (torch backend "
        "on a CPU or GPU).",
        "compile-inference eval",
        choices=("none", "int8"),
    )
    max_loss_increase: float = setting(
        0.05,
        "Most that QUANTIZE may add to the loss that eval measures, else eval fails.",
        "eval",
        unit="nats",
        least=0,
    )
    instance_type: str = setting(
        "trn1",
        "Machine that answers (Neuron); inf2 is cheaper and runs the same code as trn1.",
        "compile-inference",
        choices=("trn1", "trn1n", "inf2", "trn2"),
    )

    # Answers.
    prompt: str = setting(
        "",
        'One instruction to answer: `make eval PROMPT="..."`; or a conversation as JSON, '
        '`[{"role": "user", "content": "..."}]`.',
    )
    context: str = setting("", "Context of PROMPT.")
    prompts: str = setting(
        "data/demo/prompts.jsonl",
        "File of prompts that eval answers: instructions or conversations, in any format of "
        "DATASET's.",
        "eval",
        path=True,
    )
    max_new_tokens: int = setting(256, "Longest answer.", "eval", unit="tokens", least=1)
    do_sample: bool = setting(
        False, "Sample the answer; 0 = take the likeliest token each time.", "eval"
    )
    temperature: float = setting(
        1.0,
        "Divides the logits before sampling; DO_SAMPLE=0 takes the likeliest token.",
        "eval",
        least=0.001,
    )
    top_k: int = setting(50, "Sample from the k likeliest tokens; 0 = all.", "eval", least=0)
    top_p: float = setting(
        1.0,
        "Sample from the likeliest tokens that together have this probability.",
        "eval",
        above=0,
        most=1,
    )
    eval_set: str = setting(
        "",
        "File of examples, in any format of DATASET's, on which eval measures both models; empty: "
        "those that were held out.",
        "eval",
        path=True,
    )
    compare_answers: int = setting(
        5,
        "Questions of EVAL_SET that the base and the fine-tuned model both answer; 0 = none.",
        "eval",
        unit="questions",
        least=0,
        most=100,
    )
    gates: str = setting(
        "",
        "What eval must reach, else make ends with status 1: `validation_loss<2.0 ended>0.9`.",
        check=parse_gates,
    )
    eval_max_documents: int = setting(
        200,
        "Sequences of EVAL_SET that eval measures the losses on.",
        "eval",
        unit="sequences",
        least=1,
    )

    # lm-evaluation-harness.
    lm_eval: str = setting(
        "",
        "Tasks of lm-evaluation-harness that eval measures the base and the fine-tuned model on, "
        "such as arc_easy,hellaswag; empty for none.",
        "eval",
        check=task_names,
    )
    lm_eval_limit: int = setting(
        0, "Examples of each task of LM_EVAL, the first ones; 0 = all.", "eval", least=0
    )
    lm_eval_include_path: str = setting(
        "", "Folder with YAML files of your own tasks for LM_EVAL.", "eval", path=True
    )

    # Serving.
    serve_host: str = setting(
        "127.0.0.1",
        "Address that `make serve` listens on; servers ask for no password.",
        check=check_host,
    )
    serve_port: int = setting(8000, "Port that `make serve` listens on.", least=1, most=65535)
    watch_port: int = setting(
        8001, "Port of 127.0.0.1 that `make watch` listens on.", least=1, most=65535
    )
    serve_url: str = setting(
        "",
        "Server that `make serve-check` asks, such as http://HOST:8000; empty: SERVE_PORT here.",
        check=check_url,
    )

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Settings from variables by name (default: this process's environment) on top of the
        recipe that RECIPE names, checked.

        Raises InputError with every problem.
        """
        environment = os.environ if environment is None else environment
        given, values = with_recipe(environment), {}
        problems = _random_weights_problem(environment)
        for f in fields(cls):
            text = given.get(variable(f))
            if text is not None:
                try:
                    values[f.name] = parse(f, text)
                except InputError as error:
                    problems += error.problems
        settings = cls(**values)
        problems += settings._contradictions()
        if problems:
            raise InputError(problems)
        return settings

    def _contradictions(self) -> list[str]:
        """Combinations of settings that cannot run."""
        problems = []
        model_parallel = self.tensor_parallel_size * self.pipeline_parallel_size
        if self.nproc_per_node % model_parallel:
            pipeline = (
                f" x PIPELINE_PARALLEL_SIZE={self.pipeline_parallel_size}"
                if self.pipeline_parallel_size > 1
                else ""
            )
            problems.append(
                f"NPROC_PER_NODE={self.nproc_per_node} is not a multiple of "
                f"TENSOR_PARALLEL_SIZE={self.tensor_parallel_size}{pipeline}: world size = tensor "
                f"x pipeline x data parallel. Set NPROC_PER_NODE to a multiple of {model_parallel}."
            )
        if self.max_length % self.tensor_parallel_size:
            problems.append(
                f"MAX_LENGTH={self.max_length} is not a multiple of "
                f"TENSOR_PARALLEL_SIZE={self.tensor_parallel_size}: sequence parallelism gives "
                f"each process an equal slice of a sequence. Set MAX_LENGTH to a multiple."
            )
        if self.backend == "neuron" and self.device != "auto":
            problems.append(
                f"DEVICE={self.device} is for the torch backend, and BACKEND=neuron is "
                "optimum-neuron. Leave one of them out."
            )
        problems += self._overwritten()
        problems += self._column_contradictions()
        problems += unnamed_tasks(self.gates, self.lm_eval)
        problems += unasked_answers(self.gates, self.eval_set, self.compare_answers)
        if self.lm_eval_include_path and not self.lm_eval:
            problems.append(
                f"LM_EVAL_INCLUDE_PATH={self.lm_eval_include_path} has tasks, and LM_EVAL names "
                "none. Name them in LM_EVAL, or leave it out."
            )
        if self.max_steps == 0:
            problems.append(
                "MAX_STEPS=0 trains nothing. Set a number of steps, or -1 for NUM_TRAIN_EPOCHS."
            )
        return problems

    def _column_contradictions(self) -> Iterator[str]:
        """A problem for each two settings of columns that cannot both be meant."""
        if self.messages_column != "auto" and {self.instruction_column, self.response_column} != {
            "auto"
        }:
            yield (
                f"MESSAGES_COLUMN={self.messages_column} holds questions and answers, and "
                f"INSTRUCTION_COLUMN={self.instruction_column} and RESPONSE_COLUMN="
                f"{self.response_column} name them too. Set one or the other."
            )
        if self.instruction_column == "" and self.response_column == "auto":
            yield (
                "INSTRUCTION_COLUMN is empty, for texts without an instruction. Set "
                "RESPONSE_COLUMN to the column of the texts."
            )

    def _overwritten(self) -> Iterator[str]:
        """A problem for each setting that names a place to write over what another names."""
        for target, other in (
            ("push_dataset", "dataset"),
            ("hub_repo", "model_id"),
            ("custom_cache_repo", "hub_repo"),
        ):
            one, two = getattr(self, target), getattr(self, other)
            if one and overwrites(one, two):
                yield (
                    f"{target.upper()}={one} would overwrite {other.upper()}={two}. Name another "
                    "place."
                )

    def environment(self) -> dict[str, str]:
        """The settings as environment variables of a process, from which `read` makes the same."""
        return {name.upper(): as_text(value) for name, value in asdict(self).items()}

    def affecting(self, stage: str) -> dict[str, Any]:
        """The settings that change what `stage` publishes, by variable name.

        Where only 0 or not 0 matters, the value is "off" or "on".
        """
        values = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if stage in f.metadata["stages"]:
                values[variable(f)] = value
            elif stage in f.metadata["on_or_off"]:
                values[variable(f)] = "on" if value else "off"
        return values

    @staticmethod
    def path_settings() -> list[str]:
        """Variable names of the settings whose value may be a local file or folder."""
        return [variable(f) for f in fields(Settings) if f.metadata["path"]]


def with_recipe(environment: Mapping[str, str], recipes: Path = RECIPES) -> dict[str, str]:
    """`environment` on top of the settings of the recipe that it names in RECIPE, if any.

    Raises InputError for a recipe that cannot be read, or sets something else or a wrong value.
    """
    name = environment.get("RECIPE")
    recipe = read_recipe(name, recipes) if name else {}
    known = {variable(f): f for f in fields(Settings)}
    problems = []
    for key, (value, place) in recipe.items():
        problems += [f"{place}: {problem}" for problem in unknown_names([key])]
        if key in known and key not in environment:
            try:
                parse(known[key], value)
            except InputError as error:
                problems += [f"{place}: {problem}" for problem in error.problems]
    if problems:
        raise InputError(problems)
    return {**{key: value for key, (value, _) in recipe.items()}, **environment}


def _random_weights_problem(environment: Mapping[str, str]) -> list[str]:
    """A problem where a recipe would replace the weights of another model than its own by random
    ones."""
    name, model = environment.get("RECIPE"), environment.get("MODEL_ID")
    if not name or not model or "INIT_WEIGHTS" in environment:
        return []
    recipe = {key: value for key, (value, _) in read_recipe(name).items()}
    own = recipe.get("MODEL_ID", model)
    if own == model or recipe.get("INIT_WEIGHTS") != "random":
        return []
    return [
        f"RECIPE={name} starts MODEL_ID={own} from random weights; those of MODEL_ID={model[:60]} "
        "would not be read. Set INIT_WEIGHTS=pretrained to fine-tune them, or "
        "INIT_WEIGHTS=random to replace them."
    ]


def recipe_note(environment: Mapping[str, str], recipes: Path = RECIPES) -> str:
    """What a recipe that was made for another model sets for MODEL_ID, as a line; else empty."""
    name, model = environment.get("RECIPE"), environment.get("MODEL_ID")
    recipe = read_recipe(name, recipes) if name else {}
    own, _ = recipe.get("MODEL_ID", (model, ""))
    acting = [f"{key}={value}" for key, (value, _) in recipe.items() if key not in environment]
    if not model or own == model or not acting:
        return ""
    return f"RECIPE={name}, made for MODEL_ID={own}, also sets {' '.join(acting)}"


def unknown_names(names: list[str], also: tuple[str, ...] = ()) -> list[str]:
    """A problem per name that is neither a setting nor in `also`, with the nearest setting."""
    known = [variable(f) for f in fields(Settings)] + list(also)
    problems = []
    for name in names:
        if name not in known:
            near = [one for one in known if name.upper() in one] if len(name) > 3 else []
            near = near or get_close_matches(name.upper(), known, n=1)
            hint = f"Did you mean {' or '.join(near[:3])}?" if near else "`make help` lists them."
            if SECRET.fullmatch(name):
                hint = "Everyone on this machine can see an argument: export it instead."
            shown = name if name.isidentifier() and len(name) <= 60 else ascii(name[:60])
            problems.append(f"{shown} is not a setting. {hint}")
    return problems
