from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.run.errors import InputError
from stages.text.prompt import PromptTemplate
from tests.torture.plugin import examples


@pytest.mark.torture("fuzz")
@examples(100, 1_000)
@given(st.text(), st.text(), st.text())
def test_a_document_is_formatted_as_in_the_tutorial(instruction, context, response):
    parts = [
        f"### Instruction\n{instruction}",
        f"### Context\n{context}" if context.strip() else None,
        f"### Answer\n{response}",
    ]
    assert PromptTemplate().text(instruction, context, response) == "\n\n".join(
        part for part in parts if part is not None
    )


@pytest.mark.torture("fuzz")
@examples(100, 1_000)
@given(st.text(), st.text(), st.text())
def test_a_prompt_is_what_stands_before_the_response(instruction, context, response):
    template = PromptTemplate()
    assert (
        template.text(instruction, context, response)
        == template.prompt(instruction, context) + response
    )


@pytest.mark.parametrize("context", ["", " ", "\n\t"])
def test_a_blank_context_is_left_out(context):
    assert PromptTemplate().prompt("Why?", context) == "### Instruction\nWhy?\n\n### Answer\n"


def test_a_saved_template_is_read_back_from_its_file_or_its_folder(tmp_path):
    template = PromptTemplate(instruction="Frage: ", separator="\n")
    template.save(tmp_path)
    assert (
        PromptTemplate.load(tmp_path) == PromptTemplate.load(tmp_path / "prompt.json") == template
    )


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[]",
        '{"instruction": "x"}',
        '{"instruction": 1, "context": "", "response": "", "separator": ""}',
    ],
)
def test_a_file_that_is_no_template_is_refused_by_name(tmp_path, content):
    if content is not None:
        (tmp_path / "prompt.json").write_text(content)
    with pytest.raises(InputError, match=r"prompt\.json"):
        PromptTemplate.load(tmp_path / "prompt.json")
