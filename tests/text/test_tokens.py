from __future__ import annotations

import json
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from stages.run.provenance import TOKENIZER_FILES
from stages.text.documents import ANSWER, encode
from stages.text.prompt import TextFormat
from stages.text.tokens import TextTokenizer
from tests.text.conftest import KINDS
from tests.text.conversations import ANSWER_HEADER, dolly, example, prompt_ids, text_ids
from tests.torture.plugin import examples

# Text with the pieces that go wrong: control tokens' spellings, white space at the border, the
# space mark, marks and emoji.
texts = st.lists(
    st.sampled_from(
        [
            "the cat",
            " ",
            "  ",
            "\n",
            "\r\n",
            "</s>",
            "<s>",
            "<|end|>",
            "<unk>",
            "[INST]",
            "▁",
            "<0x0A>",
            "é",
            "🦆",
            "\0",
        ]
    )
    | st.text(max_size=8),
    min_size=1,
    max_size=6,
).map("".join)


def document(tokenizer: TextTokenizer, instruction: str, context: str, response: str) -> list[int]:
    row = example("row 1", instruction, context, response)
    return (encode([row], tokenizer, TextFormat(tokenizer)).ids & ~ANSWER).tolist()


@pytest.mark.torture("fuzz")
@pytest.mark.parametrize("kind", KINDS)
@examples(150, 300)
@given(instruction=texts, context=texts, response=texts)
def test_what_eval_gives_the_model_is_a_prefix_of_what_it_was_trained_on(
    tokenizers, kind, instruction, context, response
):
    prompt = prompt_ids(tokenizers[kind], instruction, context)
    assert document(tokenizers[kind], instruction, context, response)[: len(prompt)] == prompt


@pytest.mark.torture("fuzz")
@pytest.mark.parametrize("kind", KINDS)
@examples(150, 300)
@given(instruction=texts, response=texts)
def test_a_document_has_one_bos_and_one_eos_and_no_other_control_token(
    tokenizers, kind, instruction, response
):
    tokenizer = tokenizers[kind]
    ids = document(tokenizer, instruction, "", response)
    assert ids[: len(tokenizer.bos)] == list(tokenizer.bos)
    assert ids[-1] == tokenizer.eos
    assert tokenizer.controls.isdisjoint(ids[len(tokenizer.bos) : -1])


def as_tokenized(kind: str, text: str) -> str:
    """What is left of a text in a tokenizer's own form of it."""
    if kind in ("llama", "mistral", "gemma", "metaspace"):
        return text.replace("▁", " ")  # SentencePiece has no other sign for a space
    return unicodedata.normalize("NFC", text) if kind == "qwen" else text


@pytest.mark.torture("fuzz")
@pytest.mark.parametrize("kind", ["byte_level", "llama"])
@examples(150, 300)
@given(instruction=texts, response=texts)
def test_a_document_decodes_to_its_text(tokenizers, kind, instruction, response):
    text = as_tokenized(kind, dolly(instruction, "", response))
    assert tokenizers[kind].decode(document(tokenizers[kind], instruction, "", response)) == text


@pytest.mark.torture("fuzz")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unigram"])
@examples(100, 300)
@given(response=texts)
def test_an_answer_decodes_to_the_response_that_it_was_trained_on(tokenizers, kind, response):
    """Whatever it begins with: white space, line ends, a space mark, the spelling of a control
    token."""
    tokenizer = tokenizers[kind]
    [(ids, _)] = tokenizer.encode_after([ANSWER_HEADER], [response])
    assert ids is not None
    assert tokenizer.decode_answer(ids) == as_tokenized(kind, response)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("response", ["    return y", "\ttab", "\n\n1. A chip", " a", "It is."])
def test_an_answer_keeps_the_white_space_that_it_begins_with(tokenizers, kind, response):
    [(ids, _)] = tokenizers[kind].encode_after([ANSWER_HEADER], [response])
    assert ids is not None
    answer = tokenizers[kind].decode_answer(ids)
    assert answer == response or kind == "unigram"  # which has no letter for a line end


@pytest.mark.parametrize(
    "kind, roles",
    [
        ("gpt2", "BOS EOS UNK"),
        ("smollm2", "BOS EOS UNK PAD"),
        ("gpt2_without_special", "BOS EOS UNK"),
    ],
)
def test_one_token_may_have_several_roles(tokenizers, kind, roles):
    tokenizer = tokenizers[kind]
    ids = document(tokenizer, "Why?", "", "Because of <|endoftext|>.")
    assert ids.count(tokenizer.eos) == 1 and ids[-1] == tokenizer.eos
    assert tokenizer.eos in tokenizer.controls and tokenizer.pad == tokenizer.eos


@pytest.mark.parametrize("kind", ["byte_level", "llama", "metaspace"])
@pytest.mark.parametrize(
    "response", ["It is an accelerator.", "they all went home", "1. A chip\n2. two cores", "é"]
)
def test_a_response_is_encoded_as_when_prompt_and_response_are_one_text(
    folders, tokenizers, kind, response
):
    whole = (
        Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
        .encode(dolly("Why?", "", response))
        .ids
    )
    assert document(tokenizers[kind], "Why?", "", response) == [*whole, tokenizers[kind].eos]


def test_a_response_whose_first_token_would_reach_into_the_prompt_is_split_there_and_counted(
    folders, tmp_path
):
    parts = json.loads((folders["byte_level"] / "tokenizer.json").read_text())
    parts["model"]["vocab"]["ĊĊ"] = len(parts["model"]["vocab"])  # two line ends as one token
    parts["model"]["merges"].append(["Ċ", "Ċ"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    tokenizer = TextTokenizer.load(tmp_path)
    rows = [example("row 1", "Why?", "", "\n\nBecause."), example("row 2", "Why?", "", "Because.")]
    encoded = encode(rows, tokenizer, TextFormat(tokenizer))
    prompt = prompt_ids(tokenizer, "Why?")
    assert encoded.split_again == 1
    assert encoded.ids[: len(prompt)].tolist() == prompt
    assert tokenizer.decode(encoded.ids[: encoded.lengths[0]] & ~ANSWER) == dolly(
        "Why?", "", "\n\nBecause."
    )


@pytest.mark.torture("fuzz")
@examples(300, 600)
@given(text=texts)
def test_marking_spaces_here_gives_the_ids_of_the_tokenizers_own_normaliser(
    folders, tokenizers, text
):
    own = Tokenizer.from_file(str(folders["llama"] / "tokenizer.json"))
    own.encode_special_tokens = True
    assert text_ids(tokenizers["llama"], text) == own.encode(text).ids


def test_truncation_and_padding_kept_in_a_tokenizers_file_are_not_applied(folders, tmp_path):
    tokenizer = Tokenizer.from_file(str(folders["llama"] / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    (tmp_path / "tokenizer_config.json").write_text(
        (folders["llama"] / "tokenizer_config.json").read_text()
    )
    assert (
        len(
            text_ids(
                TextTokenizer.load(tmp_path), "the cat sat on the mat and the dog sat on the log"
            )
        )
        > 4
    )


@pytest.mark.parametrize(
    "kind, bos", [("byte_level", ()), ("llama", (1,)), ("metaspace", (1,)), ("unigram", (1,))]
)
def test_bos_is_put_first_where_the_tokenizer_does_so(tokenizers, kind, bos):
    assert tokenizers[kind].bos == bos


def test_a_tokenizer_without_a_padding_token_pads_with_eos(tokenizers):
    assert tokenizers["llama"].pad == tokenizers["llama"].eos
    assert tokenizers["byte_level"].pad != tokenizers["byte_level"].eos


def test_the_least_vocabulary_covers_every_id(tokenizers):
    assert tokenizers["llama"].vocab_size > max(text_ids(tokenizers["llama"], "\n\xff"))


def test_saved_files_are_those_that_were_loaded(folders, tokenizers, tmp_path):
    tokenizers["llama"].save(tmp_path / "saved")
    names = sorted(file.name for file in (tmp_path / "saved").iterdir())
    assert names == sorted(name for name in TOKENIZER_FILES if (folders["llama"] / name).exists())
    assert all(
        (tmp_path / "saved" / name).read_bytes() == (folders["llama"] / name).read_bytes()
        for name in names
    )


def test_encoding_a_prompt_needs_no_heavy_library(folders):
    code = f"""
import sys, pathlib
from stages.text.answer import encode_questions
from stages.text.prompt import TextFormat
from stages.text.questions import question_of
from stages.text.tokens import TextTokenizer
tokenizer = TextTokenizer.load(pathlib.Path({str(folders["llama"])!r}))
[ids] = encode_questions([question_of("Why?")], tokenizer, TextFormat(tokenizer), 100)
tokenizer.decode(ids)
heavy = {{"numpy", "torch", "transformers", "datasets", "pyarrow", "huggingface_hub"}}
print(sorted(heavy & set(sys.modules)))
"""
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
