"""A chat template is a program that comes with a model: what it cannot do, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer  # noqa: F401 (as a process that trains imports it)

from stages.run.errors import InputError
from stages.text import render_process
from stages.text.chat_format import ChatFormat
from stages.text.chat_parts import Renderer
from stages.text.conversation import Message
from stages.text.render import answer
from stages.text.render_process import RenderProcess
from stages.text.tokens import TextTokenizer
from tests.text.chat_templates import CHATML, TEMPLATES, write_chat_tokenizer
from tests.torture.plugin import examples

MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A template's process, with limits that a test can reach."""
    monkeypatch.setattr(render_process, "MOST_SECONDS", 1)
    monkeypatch.setattr(render_process, "MOST_BYTES", 2**28)
    started: list[RenderProcess] = []

    def start(template: str) -> RenderProcess:
        started.append(RenderProcess(template, {}))
        return started[-1]

    yield start
    for one in started:
        one.close()


def ask(process: RenderProcess, *conversations: list[dict[str, Any]]) -> list[Any]:
    requests = [(messages, [1]) for messages in conversations or [MESSAGES]]
    return process.ask(requests, ask=False, alone=False)


def children() -> set[str]:
    own = Path(f"/proc/self/task/{os.getpid()}/children")
    return set(own.read_text().split())


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ lipsum(n=10**6) }}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(process, text: str) -> None:
    before, started = children(), time.monotonic()
    endless = process(text)
    with pytest.raises(InputError, match=r"was stopped \(status -\d+\): it may take 1 s"):
        ask(endless)
    assert time.monotonic() - started < 30
    assert children() == before


def test_after_it_was_stopped_the_process_begins_again(process) -> None:
    text = "{% for i in range(99999 if messages[0].content == 'x' else 1) %}"
    again = process(text + "{% for j in range(99999) %}{% endfor %}{% endfor %}" + CHATML.text)
    with pytest.raises(InputError, match="was stopped"):
        ask(again, [{**MESSAGES[0], "content": "x"}, MESSAGES[1]])
    [[document]] = ask(again)
    assert document["answers"]


# Each of them would take gigabytes, or a stack without an end.
BOMBS = {
    "times": "{{ 'a' * 10**10 }}",
    "list": "{{ [0] * 10**9 }}",
    "range": "{{ range(10**9) | list }}",
    "center": "{{ 'a'.center(10**9) }}",
    "format": "{{ '%1000000000d' % 1 }}",
    "str.format": "{{ '{:>1000000000}'.format(1) }}",
    "doubled": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "output": "{% for i in range(90000) %}abcdefghij{% endfor %}" + CHATML.text,
    "raises": "{{ raise_exception('Never.') }}",
    "syntax": "{% if %}",
    "file": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.environ }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr": "{{ (''|attr('__class__')).__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__.os.environ }}",
    "function": "{{ raise_exception.__globals__['__builtins__'] }}",
    "date": "{{ strftime_now.__globals__['os'] }}",
    "self": "{{ self.__init__.__globals__.x }}",
    "lipsum": "{{ lipsum.__globals__['os'].environ }}",
    "str.format class": "{{ '{0.__class__.__mro__}'.format(1).x.y }}",
    "change": "{{ messages.append(1) }}",
    "date of no format": "{{ strftime_now(1) }}",
}


def test_a_template_that_goes_too_far_gives_a_reason_and_its_process_goes_on(
    process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process for all of them: the template that it renders is chosen by its first request."""
    code = (
        "import json, sys\n"
        "from stages.text import render\n"
        "from stages.text.chat_parts import Renderer\n"
        "render._limit_memory(2**28)\n"
        "for name, text in json.load(sys.stdin).items():\n"
        "    render._limit_time(5)\n"
        f"    request = {{'conversations': [({MESSAGES!r}, [1])], 'ask': False, 'alone': False}}\n"
        "    print(json.dumps([name, *render.answer(Renderer(text, {}), request)]), flush=True)\n"
    )
    monkeypatch.setenv("USE_TORCH", "0")
    run = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(BOMBS), capture_output=True, text=True
    )
    reasons = dict(map(json.loads, run.stdout.splitlines()))
    assert reasons.keys() == BOMBS.keys(), run.stderr[-2000:]
    assert all(reason.startswith("the chat template ") for reason in reasons.values()), reasons
    for name in ("times", "list", "center", "format", "str.format", "doubled"):
        assert "too much memory" in reasons[name]
    assert "nested too deeply" in reasons["recursion"]
    assert "characters" in reasons["output"]
    for name in ("class", "attr", "globals", "function", "date", "self", "lipsum", "change"):
        assert "unsafe" in reasons[name] or "undefined" in reasons[name], reasons[name]


def test_the_process_knows_no_secret(process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    renders = process(CHATML.text)
    ask(renders)
    environment = Path(f"/proc/{renders._process.pid}/environ").read_bytes()
    assert b"secret" not in environment and b"PATH=" in environment


def test_the_process_ends_with_its_parent(process) -> None:
    renders = process(CHATML.text)
    ask(renders)
    child = str(renders._process.pid)
    assert child in children() and renders.close() == 0 and child not in children()


def test_a_batch_goes_through_the_process_as_one_conversation_does(
    process, folders: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = TextTokenizer.load(write_chat_tokenizer(tmp_path / "qwen", folders["qwen"], CHATML))
    format = ChatFormat(tokenizer)
    conversation = (Message("user", "\u00fc\u2028\n\x00\x85"), Message("assistant", "\U0001f642"))
    [one] = format.documents([conversation])
    assert format.documents([conversation] * 1000) == [one] * 1000
    format._process.close()


ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
MESSAGE = st.fixed_dictionaries(
    {"role": ROLES, "content": st.text(max_size=20)},
    optional={
        "reasoning_content": st.text(min_size=1, max_size=9),
        "tool_calls": st.just([{"function": {"name": "f", "arguments": {"x": 1}}}]),
    },
)


def rendered(renderer: Renderer, messages: list[dict[str, Any]], ask: bool = False) -> Any:
    answers = [n for n, one in enumerate(messages) if n and one["role"] == "assistant"]
    request = {"conversations": [(messages, answers)], "ask": ask, "alone": False}
    [made] = answer(renderer, json.loads(json.dumps(request)))
    return made


def text_of(document: dict[str, Any], parts: int | None = None) -> str:
    return "".join(text for text, _ in document["parts"][:parts])


@pytest.mark.torture("fuzz")
@pytest.mark.parametrize("name", TEMPLATES)
@examples(30, 1_000)
@given(messages=st.lists(MESSAGE, min_size=2, max_size=7))
def test_any_messages_give_documents_that_begin_with_their_prompts_or_a_reason(
    name: str, messages: list[dict[str, Any]]
) -> None:
    template = TEMPLATES[name]
    renderer = Renderer(template.text, {"bos_token": template.bos or "", "eos_token": template.eos})
    if not any(n and one["role"] == "assistant" for n, one in enumerate(messages)):
        messages = [*messages, {"role": "assistant", "content": "So."}]
    made = rendered(renderer, messages)
    if isinstance(made, str):
        assert made.startswith("the chat template ")
        return
    for document in made:
        for start, number in zip(document["answers"], document["numbers"], strict=True):
            [prompt] = rendered(renderer, messages[:number], ask=True)
            assert text_of(document, start) == text_of(prompt)
        numbers = {number for _, number in document["parts"]}
        written = {n for n, one in enumerate(messages) if one["content"]}
        assert written <= numbers or len(made) > 1
        for text, number in document["parts"]:
            values = messages[number].values() if number >= 0 else [text]
            assert any(
                text in str(value) or text in json.dumps(value, ensure_ascii=False)
                for value in values
            )


RUBBISH = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *("{{", "}}", "{%", "%}", "{#", "#}", "{% for m in messages %}", "{% endfor %}"),
                *("{{ m.content }}", "{{ m['role'] }}", "{% if loop.last %}", "{% endif %}"),
                *("{{ messages }}", "{{ 1/0 }}", "{{ x.y.z }}", "{% set messages = 1 %}", "m"),
                *("{{ messages[0].content * 9 }}", "{{ strftime_now('%Y') }}", "\ue0000\ue001"),
                *("{% generation %}", "{% endgeneration %}", "{% break %}", "{{ m.content | e }}"),
            ]
        ),
        st.text(max_size=5),
    ),
    max_size=12,
).map("".join)


@pytest.mark.torture("fuzz")
@examples(150, 3_000)
@given(text=RUBBISH)
def test_any_template_gives_documents_or_a_reason(text: str) -> None:
    made = rendered(Renderer(text, {}), MESSAGES)
    if isinstance(made, str):
        assert made.startswith("the chat template ")
    else:
        assert json.dumps(made).encode()
