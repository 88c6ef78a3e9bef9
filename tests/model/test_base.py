"""Model folders that are not what they should be: each is refused, with the fault and the remedy,
before a training's processes start."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.model.weights import INDEX_FILE, SINGLE_FILE
from stages.run.errors import InputError
from tests.conftest import Project
from tests.model.model_damage import (
    DIFFERS,
    NORM,
    PICKLE,
    SOMETHING,
    TABLE,
    Damage,
    and_then,
    config,
    cut,
    entry,
    file,
    header,
    in_parts,
    in_place_of_weights,
    in_two_parts,
    index,
    placed_at,
    tensors,
    train,
    twice,
)

pytestmark = pytest.mark.torture("models")

DAMAGED = r"model\.safetensors is damaged: "
REFUSED: dict[str, tuple[Damage, str]] = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        r"has no config\.json.*Name a folder in the Hugging Face layout",
    ),
    "a config that is not JSON": (file("config.json", SOMETHING), r"config\.json cannot be used"),
    "a config that is not text": (
        file("config.json", b"\xff\xfe\x00"),
        r"config\.json cannot be used",
    ),
    "a config that is empty": (file("config.json", b""), r"config\.json cannot be used"),
    "a config that is a list": (file("config.json", b"[1, 2]"), r"config\.json cannot be used"),
    "a config without end": (
        file("config.json", b"[" * 200_000),
        r"config\.json cannot be used: RecursionError",
    ),
    "a config of no model": (
        config(model_type=None),
        r"config\.json cannot be used: KeyError\('model_type'\)",
    ),
    "an unknown model": (config(model_type="llama9"), r"config\.json cannot be used: .*llama9"),
    "a model type that is no text": (config(model_type=["llama"]), r"config\.json cannot be used"),
    "a model that is not trained here": (
        config(model_type="opt"),
        r"is a opt, which the torch backend does not train or compile\. The backends know neuron: ",
    ),
    "a model that answers nothing": (
        config(model_type="vit"),
        r"is a vit, which the torch backend does not train",
    ),
    "code of its own": (
        config(model_type="evil", auto_map={"AutoConfig": "evil.Config"}),
        r"code of its own \(auto_map\), which is never run",
    ),
    "sizes below zero": (
        config(hidden_size=-32),
        r"hidden_size is -32, not a whole number above 0",
    ),
    "a size in words": (config(vocab_size="many"), r"vocab_size is 'many', not a whole number"),
    "a size with a point": (
        config(intermediate_size=48.5),
        r"intermediate_size is 48\.5, not a whole number",
    ),
    "no heads": (
        config(num_attention_heads=0, head_dim=8),
        r"num_attention_heads is 0, not a whole number",
    ),
    "heads that do not divide": (config(num_attention_heads=5, head_dim=None), r"config\.json"),
    "layers without end": (
        config(num_hidden_layers=10**9),
        r"num_hidden_layers is 1,000,000,000, above 1,000",
    ),
    "a dtype of no tensor": (config(dtype="evil"), r"config\.json"),
    "a function as dtype": (config(dtype="load"), r"config\.json"),
    "an activation that is none": (config(hidden_act="evil"), r"config\.json"),
    "a size that no memory has": (
        config(vocab_size=2**62),
        r"config\.json does not describe a causal language model",
    ),
    "quantised weights": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"says that the weights are quantised",
    ),
    "an adapter": (
        file("adapter_config.json", b"{}"),
        r"has an adapter_config\.json.*Merge it, or remove the file",
    ),
    "more layers than weights": (
        config(num_hidden_layers=3),
        DIFFERS + r"missing \(9\): model\.layers\.2\..*, and 4 more",
    ),
    "fewer layers than weights": (
        config(num_hidden_layers=1),
        DIFFERS + r"unexpected \(9\): model\.layers\.1\..*, and 4 more",
    ),
    "another vocabulary": (
        config(vocab_size=70),
        DIFFERS + r"of the wrong shape \(2\): lm_head\.weight \[67, 32\], not \[70, 32\], model",
    ),
    "another width": (
        config(intermediate_size=64),
        DIFFERS + r"of the wrong shape \(6\): .*, and 1 more",
    ),
    "a tensor less": (
        tensors(lambda found: found.pop(NORM)),
        DIFFERS + r"missing \(1\): model\.norm\.weight",
    ),
    "a tensor more": (
        tensors(lambda found: found.update(more=torch.ones(2))),
        DIFFERS + r"unexpected \(1\): more",
    ),
    "a tensor of another shape": (
        tensors(lambda found: found.update({NORM: torch.ones(31)})),
        r"model\.norm\.weight \[31\], not \[32\]",
    ),
    "whole numbers": (
        tensors(lambda found: found.update({NORM: torch.ones(32, dtype=torch.int8)})),
        r"not of a floating dtype \(1\): model\.norm\.weight int8",
    ),
    "a dtype of eight bits": (
        tensors(lambda found: found.update({NORM: torch.ones(32).to(torch.float8_e4m3fn)})),
        r"of a dtype that is not supported \(1\): model\.norm\.weight F8_E4M3",
    ),
    "an index that names a missing file": (
        placed_at("model-00001-of-00099.safetensors"),
        r"misplaced \(1\): model\.norm\.weight \(index",
    ),
    "an index that leaves the folder": (
        placed_at("../x.safetensors"),
        r"names files outside its folder.*\nfiles \(1\): \.\./x",
    ),
    "an index with an absolute path": (
        placed_at("/etc/passwd"),
        r"names files outside its folder.*\nfiles \(1\): /etc/passwd",
    ),
    "an index with a folder": (
        placed_at("sub/x.safetensors"),
        r"names files outside its folder",
    ),
    "an index with the wrong file": (
        index(
            lambda content: content["weight_map"].update(
                {NORM: sorted(content["weight_map"].values())[0]}
            )
        ),
        r"misplaced \(1\): model\.norm\.weight",
    ),
    "an index without a tensor": (
        index(lambda content: content["weight_map"].pop(NORM)),
        r"misplaced \(1\): .*index: nowhere",
    ),
    "an index of a list": (
        index(lambda content: content.update(weight_map=[1])),
        r"is not an index of weights",
    ),
    "an index of nothing": (
        index(lambda content: content.pop("weight_map")),
        r"is not an index of weights: KeyError",
    ),
    "an index that is not JSON": (
        and_then(in_parts, file(INDEX_FILE, SOMETHING)),
        r"is not an index of weights",
    ),
    "an index without end": (
        and_then(in_parts, file(INDEX_FILE, b'{"weight_map":' + b"[" * 200_000)),
        r"is not an index of weights",
    ),
    "parts without index": (
        and_then(in_parts, lambda folder: (folder / INDEX_FILE).unlink()),
        rf"and no {INDEX_FILE}",
    ),
    "a part that is missing": (
        and_then(in_parts, lambda folder: next(folder.glob("*-00002-*")).unlink()),
        r"misplaced \(\d+\)",
    ),
    "a tensor twice": (
        and_then(in_parts, in_two_parts),
        r"model\.norm\.weight is in model-0000\d-of-0000\d\.safetensors and in model-",
    ),
    "an empty file": (cut(0), DAMAGED),
    "a file of four bytes": (cut(4), DAMAGED),
    "a header that is cut short": (cut(100), DAMAGED),
    "data that are cut short": (cut(20_000), DAMAGED),
    "bytes behind the data": (
        lambda folder: (folder / SINGLE_FILE).open("ab").write(b"more"),
        DAMAGED,
    ),
    "zeros": (file(SINGLE_FILE, bytes(4096)), DAMAGED),
    "a header longer than the file": (header("{}", length=10**6), DAMAGED),
    "a header without end": (header("{}", length=2**64 - 1), DAMAGED),
    "a header that is not JSON": (header(SOMETHING.decode()), DAMAGED),
    "a header that is a list": (header("[1]"), DAMAGED),
    "a header nested without end": (header("[" * 200_000), DAMAGED),
    "tensors that overlap": (
        header({"a": entry(), "b": entry(data_offsets=[4, 12])}, data=12),
        DAMAGED,
    ),
    "a hole between tensors": (
        header({"a": entry(), "b": entry(data_offsets=[12, 20])}, data=20),
        DAMAGED,
    ),
    "offsets that run backwards": (header({"a": entry(data_offsets=[8, 0])}), DAMAGED),
    "offsets that do not fit the shape": (header({"a": entry(shape=[3])}), DAMAGED),
    "a name twice": (header(twice(entry(), entry())), r"damaged|not those of the model"),
    "a name twice, at two places": (
        header(twice(entry(), entry(data_offsets=[8, 16])), data=16),
        DAMAGED,
    ),
    "a negative shape": (header({"a": entry(shape=[-2])}), DAMAGED),
    "a shape with a point": (header({"a": entry(shape=[2.0])}), DAMAGED),
    "a shape beyond all numbers": (header({"a": entry(shape=[2**40, 2**40])}), DAMAGED),
    "a shape that no file fills": (
        header({"a": entry(shape=[2**40], data_offsets=[0, 2**42])}),
        DAMAGED,
    ),
    "an unknown dtype": (header({"a": entry(dtype="EVIL")}), DAMAGED),
    "parts of tensors": (
        lambda folder: save_file(
            load_file(folder / SINGLE_FILE),
            folder / SINGLE_FILE,
            metadata={"DCP_SHARDING_INFO": "{}"},
        ),
        r"holds parts of tensors",
    ),
    "a pipe": (in_place_of_weights(os.mkfifo), r"model\.safetensors is not a file"),
    "a folder as weights": (in_place_of_weights(Path.mkdir), r"model\.safetensors is not a file"),
    "a link that leads nowhere": (
        in_place_of_weights(lambda path: path.symlink_to("nowhere")),
        r"is a broken link",
    ),
    "a link to itself": (
        in_place_of_weights(lambda path: path.symlink_to(path.name)),
        r"is a broken link",
    ),
    "no weights": (
        lambda folder: (folder / SINGLE_FILE).unlink(),
        r"holds no weights \(\.safetensors\)\. Name another model",
    ),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_a_damaged_model_is_refused_before_a_process_starts(
    folder: Path, no_rank: None, damage: Damage, message: str
) -> None:
    damage(folder)
    with pytest.raises(InputError, match=f"(?s){message}") as refused:
        train(folder)
    assert all(problem.startswith("MODEL_ID=") for problem in refused.value.problems)


def test_a_vocabulary_below_the_tokenizers_is_refused(folder: Path, no_rank: None) -> None:
    with pytest.raises(
        InputError, match="the tokenizer gives ids up to 67, the model has 67 embeddings"
    ):
        train(folder, vocabulary=68)


@pytest.mark.parametrize("kind", ["a file", "a loop", "a link to nowhere", "nothing"])
def test_a_model_id_that_is_a_path_to_no_folder_is_not_asked_of_the_hub(
    tmp_path: Path, no_rank: None, kind: str
) -> None:
    path = tmp_path / "model"
    if kind == "a file":
        path.write_bytes(b"")
    elif kind != "nothing":
        path.symlink_to("model" if kind == "a loop" else "nowhere")
    with pytest.raises(
        InputError, match="Name a folder in the Hugging Face layout, or OWNER/NAME on the Hub"
    ):
        train(path)


def test_a_folder_without_anything_is_refused(tmp_path: Path, no_rank: None) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match=r"has no config\.json"):
        train(tmp_path / "model")


def same_in_bfloat16(folder: Path) -> None:
    tensors(
        lambda found: found.update({name: tensor.bfloat16() for name, tensor in found.items()})
    )(folder)


ACCEPTED: dict[str, Damage] = {
    "as it was saved": lambda folder: None,
    "in parts": in_parts,
    "in another dtype than its config says": same_in_bfloat16,
    "with an index that was left behind": lambda folder: (folder / INDEX_FILE).write_text(
        json.dumps({"weight_map": {NORM: "model-00001-of-00002.safetensors"}})
    ),
    "with the same weights for another tool": lambda folder: shutil.copyfile(
        folder / SINGLE_FILE, folder / "consolidated.safetensors"
    ),
    "in parts, with the same weights in one file": lambda folder: (
        shutil.copyfile(folder / SINGLE_FILE, folder.parent / "kept"),
        in_parts(folder),
        (folder.parent / "kept").rename(folder / SINGLE_FILE),
    ),
    "with a damaged file that nobody reads": file("model.fp16.safetensors", SOMETHING),
    "with a table that no model reads": tensors(lambda found: found.update({TABLE: torch.ones(4)})),
    "tied, with its head written twice": config(tie_word_embeddings=True),
    "behind links, as the Hub's cache has it": lambda folder: (
        (folder / SINGLE_FILE).rename(folder.parent / "blob"),
        (folder / SINGLE_FILE).symlink_to("../blob"),
    ),
    "with pickles beside": file(PICKLE, SOMETHING),
    "with code that it does not need": config(
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    ),
}


@pytest.mark.parametrize("change", ACCEPTED.values(), ids=ACCEPTED)
def test_what_published_models_look_like_is_accepted(
    folder: Path, no_rank: None, change: Damage
) -> None:
    change(folder)
    with pytest.raises(AssertionError, match="a process of the training was started"):
        train(folder)


def test_make_refuses_a_damaged_model_and_a_pickle_with_exit_2_and_takes_an_allowed_one(
    built: Project, torture, tmp_path: Path
) -> None:
    tiny = built.folder / "data" / "tiny"
    [made] = (
        path for path in (built.folder / "outputs" / ".cache" / "models").iterdir() if path.is_dir()
    )
    state = load_file(made / SINGLE_FILE)
    given = ("RECIPE=tiny", "INIT_WEIGHTS=pretrained", "RUN=given")
    save_file({**state, NORM: torch.ones(7)}, tiny / SINGLE_FILE)
    done = built.make("train", *given, check=False)
    assert (
        done.returncode == 2
        and "of the wrong shape (1): model.norm.weight [7], not [32]" in done.stderr
    )
    assert "Traceback" not in done.stderr
    (tiny / SINGLE_FILE).unlink()
    torch.save(state, tiny / PICKLE)
    done = built.make("train", *given, check=False)
    assert done.returncode == 2 and "Set ALLOW_PICKLE=1" in done.stderr
    torture.count(2)
    if not torture.long:
        return
    built.make("train", *given, "ALLOW_PICKLE=1")
    runs = (built.folder / "outputs" / "tiny", built.folder / "outputs" / "given")
    shards = [next((run / "train" / "shards").glob("*.safetensors")) for run in runs]
    assert shards[0].read_bytes() == shards[1].read_bytes()
    assert built.stages_to_run("train", *given, "ALLOW_PICKLE=1") == []
    torch.save({**state, NORM: state[NORM] + 1}, tiny / PICKLE)
    assert built.stages_to_run("train", *given, "ALLOW_PICKLE=1") == ["train"]
    torture.count(2)


def test_a_compiled_package_that_was_changed_is_not_loaded(built: Project) -> None:
    package = built.folder / "outputs" / "tiny" / "compile-inference" / "prefill.pt2"
    data = bytearray(package.read_bytes())
    data[len(data) // 2] ^= 1
    package.write_bytes(data)
    done = built.make("eval", "RECIPE=tiny", "PROMPT=What is the KV cache?", check=False)
    assert done.returncode == 2
    assert "prefill.pt2 is not what was published" in done.stderr
