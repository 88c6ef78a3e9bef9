"""`make serve-check`: a server's answers against eval's, on a small server of the test's own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stages import serve_check
from stages.run.digests import file_digest
from stages.run.errors import InputError, StageFailure
from stages.run.manifest import with_checksum
from stages.run.settings import Settings
from stages.text import answer as evals
from stages.text.chat_client import ChatClient
from stages.text.prompt import TextFormat
from stages.text.questions import read_questions
from stages.text.served_answers import first_difference
from stages.text.tokens import TextTokenizer
from tests.conftest import ROOT

ANSWERS = {"What is a shard?": "A part of the weights.", "And NEFF?": "A compiled graph."}
CONTEXT = "It is about Trainium."
TOKENIZER = TextTokenizer.load(ROOT / "data/demo/model")


def publish(folder: Path, settings: dict[str, Any], inputs: dict[str, str]) -> None:
    outputs = {
        path.name: {"sha256": file_digest(path), "bytes": path.stat().st_size}
        for path in folder.iterdir()
    }
    provenance = {"settings": settings, "versions": {}, "code": {}, "inputs": inputs}
    seen = {"code": {}, "files": {}, "backend": "torch"}
    manifest = {"outputs": outputs, "provenance": provenance, "seen": seen, "content": "model-1"}
    (folder / "manifest.json").write_text(json.dumps(with_checksum(manifest)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with what the check reads of it, and PROMPTS beside its stages."""
    model, answers = tmp_path / "consolidate", tmp_path / "eval"
    model.mkdir()
    answers.mkdir()
    TOKENIZER.save(model)
    TextFormat(TOKENIZER).save(model)
    publish(model, {}, {})
    asked = [
        {"instruction": question, "context": context}
        for question, context in zip(ANSWERS, ["", CONTEXT], strict=True)
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    write_answers(tmp_path, list(ANSWERS.values()))
    return tmp_path


def write_answers(run: Path, texts: list[str], ended: bool = True, **settings: Any) -> None:
    questions = read_questions(Settings(prompts=str(run / "p.jsonl"))).questions
    answers = [
        evals.Answer(question, text, len(ids(text)), ended, -1.0)
        for question, text in zip(questions, texts, strict=True)
    ]
    (run / "eval/manifest.json").unlink(missing_ok=True)
    evals.write_answers(run / "eval/answers.jsonl", answers)
    facts = {"MAX_NEW_TOKENS": 64, "DO_SAMPLE": False, **settings}
    publish(run / "eval", facts, {"consolidate": "model-1"})


def ids(text: str) -> list[int]:
    [encoded] = TOKENIZER.encode_after(["\n"], [text])
    return encoded.ids or []


def prompt_of(messages: list[dict[str, str]], template: str = "") -> list[int]:
    """What a server with the published template makes of messages, as ids."""
    import jinja2

    text = jinja2.Template(template or TextFormat(TOKENIZER).chat_template()).render(
        messages=messages
    )
    return [*TOKENIZER.bos, *ids(text.removeprefix("<s>"))]


def right(request: dict[str, Any]) -> dict[str, Any]:
    text = ANSWERS[request["messages"][-1]["content"]]
    return {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": len(prompt_of(request["messages"]))},
    }


Answer = Callable[[dict[str, Any]], Any]


class Served:
    """A server: `answer` makes a JSON value, bytes, or (status, bytes) of a request; events where
    `stream`. `asked` keeps the requests."""

    def __init__(self) -> None:
        self.answer: Answer = right
        self.stream = False
        self.asked: list[dict[str, Any]] = []
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                served.asked.append(request)
                made = served.answer(request)
                status, body = made if isinstance(made, tuple) else (200, made)
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header(
                    "Content-Type", "text/event-stream" if served.stream else "application/json"
                )
                self.send_header("Content-Length", str(len(body)))
                with suppress(ConnectionError):  # a client that waited no longer
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # must not be asked
    one = Served()
    yield one
    one.http.shutdown()
    one.http.server_close()


@pytest.fixture(autouse=True)
def no_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no weights here: no tie explains an answer."""
    monkeypatch.setattr("stages.backends.next_token.near_tie", lambda _: lambda *_: "")


def check(run: Path, url: str) -> None:
    settings = Settings(prompts=str(run / "p.jsonl"), serve_url=url)
    serve_check.check(settings, run / "consolidate", run / "eval")


def test_the_right_answers_pass(run: Path, served: Served, capsys) -> None:
    check(run, f"{served.url}/v1/")
    assert "2 of 2 answers are eval's; the prompts have as many tokens" in capsys.readouterr().out
    assert served.asked[0]["temperature"] == 0 and served.asked[0]["model"] == run.name


def test_a_context_is_sent_as_the_system_message(run: Path, served: Served) -> None:
    check(run, served.url)
    assert served.asked[-1]["messages"] == [
        {"role": "system", "content": CONTEXT},
        {"role": "user", "content": "And NEFF?"},
    ]


def events(request: dict[str, Any]) -> bytes:
    """As transformers 4 answers: a stream, no usage, and no extra fields in a request."""
    if "return_token_ids" in request:
        return (422, b'{"detail": "Unexpected keys"}')  # type: ignore[return-value]
    text = ANSWERS[request["messages"][-1]["content"]]
    deltas = [{"role": "assistant"}, *({"content": word} for word in text.split(" ", 1))]
    if " " in text:
        deltas[2]["content"] = " " + deltas[2]["content"]
    made = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    made.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    return b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in made)


def test_a_stream_without_the_tokens_of_prompts_passes_and_says_so(
    run: Path, served: Served, capsys
) -> None:
    served.answer, served.stream = events, True
    check(run, served.url)
    assert "the server does not show the prompts' tokens" in capsys.readouterr().out


def test_another_answer_fails_with_the_place_where_it_begins(
    run: Path, served: Served, capsys
) -> None:
    write_answers(run, ["A part of the model.", *list(ANSWERS.values())[1:]])
    with pytest.raises(StageFailure, match=r"1 of 2 answers differ\. The prompts have as many"):
        check(run, served.url)
    row = capsys.readouterr().out.splitlines()[1]
    assert "line 1" in row and "15" in row and "model" in row and "weights" in row


def test_an_answer_that_parts_at_a_tie_passes_and_says_so(
    run: Path, served: Served, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_answers(run, ["A part of the model.", *list(ANSWERS.values())[1:]])
    asked: list[tuple[list[int], int, int]] = []

    def near_tie(*arguments: Any) -> str:
        asked.append(arguments)
        return "22.875 and 23 in bfloat16"

    monkeypatch.setattr("stages.backends.next_token.near_tie", lambda _: near_tie)
    check(run, served.url)
    assert "1 of 2 answers are eval's, 1 more up to a tie" in capsys.readouterr().out
    [(context, ours, theirs)] = asked
    assert TOKENIZER.decode(context).endswith("### Answer\nA part of the")
    assert [TOKENIZER.decode([id]).strip()[:1] for id in (ours, theirs)] == ["m", "w"]


def test_more_ties_than_answers_are_suspicious_where_prompts_are_not_shown(
    run: Path, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_answers(run, ["A part of the model.", "Any graph."])
    monkeypatch.setattr("stages.backends.next_token.near_tie", lambda _: lambda *_: "1 and 1")
    check(run, served.url)
    served.answer, served.stream = events, True
    with pytest.raises(StageFailure, match=r"2 of 2 answers differ\..* chat template"):
        check(run, served.url)


def test_another_template_is_named_as_the_reason_though_the_answers_are_right(
    run: Path, served: Served
) -> None:
    def other(request: dict[str, Any]) -> dict[str, Any]:
        return {**right(request), "usage": {"prompt_tokens": 99}}

    served.answer = other
    with pytest.raises(
        StageFailure, match=r"2 of 2 prompts have other tokens .*99 tokens, trained"
    ):
        check(run, served.url)


def test_a_word_of_the_template_is_found_by_the_ids_of_the_prompt(
    run: Path, served: Served
) -> None:
    template = TextFormat(TOKENIZER).chat_template().replace("Answer", "Reply")

    def other(request: dict[str, Any]) -> dict[str, Any]:
        prompt = prompt_of(request["messages"], template)
        return {**right(request), "prompt_token_ids": prompt}

    served.answer = other
    with pytest.raises(StageFailure, match=r"from token \d+ on .*Reply.* for .*Answer"):
        check(run, served.url)


def test_answers_that_evals_limit_cut_are_compared_up_to_the_cut(run: Path, served: Served) -> None:
    write_answers(run, ["A part of", "A comp"], ended=False, MAX_NEW_TOKENS=4)
    check(run, served.url)
    assert served.asked[0]["max_tokens"] == len(ids("A part of"))


@pytest.mark.parametrize(
    ("expected", "got", "cut", "server_cut", "at"),
    [
        ("abc", "abc", False, False, None),
        ("abc", "abd", False, False, 2),
        ("abc", "abcd", False, False, 3),
        ("abc\ufffd", "abcd", True, False, None),
        ("abcd", "ab", False, True, None),
        ("abcd", "", False, True, 0),
        ("abcd", "ab", False, False, 2),
    ],
)
def test_the_first_difference_is_up_to_a_cut(expected, got, cut, server_cut, at) -> None:
    assert first_difference(expected, got, cut, server_cut) == at


def test_without_a_server_it_says_how_to_start_one(run: Path) -> None:
    with pytest.raises(InputError, match=r"No server answers at .*refused\)\. Start one with"):
        check(run, "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        ((500, b"out of memory"), StageFailure, r"HTTP 500: 'out of memory'"),
        ((404, b"no such model"), InputError, r"HTTP 404.*--served-model-name"),
        ((401, b""), InputError, r"HTTP 401.*VLLM_API_KEY"),
        (b"<html>Hello</html>", StageFailure, r"no chat completion: '<html>Hello"),
        ([1], StageFailure, "no chat completion"),
        ({"choices": []}, StageFailure, "no chat completion"),
        ({"choices": [{"message": {"content": 7}}]}, StageFailure, "no chat completion"),
    ],
)
def test_what_is_no_answer_is_said_in_a_sentence(
    run: Path, served: Served, answer: Any, kind: type[Exception], said: str
) -> None:
    served.answer = lambda _: answer
    with pytest.raises(kind, match=said) as failed:
        check(run, served.url)
    assert "\n" not in str(failed.value)


def test_a_stream_that_breaks_off_is_no_answer(run: Path, served: Served) -> None:
    served.stream = True
    served.answer = lambda _: b'data: {"choices": [{"delta": {"content": "A part"}}]}\n\n'
    with pytest.raises(StageFailure, match="no chat completion"):
        check(run, served.url)


def test_a_server_that_never_answers_is_left_after_a_limit(served: Served) -> None:
    release = threading.Event()
    served.answer = lambda _: release.wait(5) and b""
    with pytest.raises(StageFailure, match=r"has not answered within 0\.2 s"):
        ChatClient(served.url, "m", limit=0.2).ask([{"role": "user", "content": "x"}], 4)
    release.set()


def test_sampled_answers_cannot_be_compared(run: Path) -> None:
    write_answers(run, list(ANSWERS.values()), DO_SAMPLE=True)
    with pytest.raises(InputError, match="DO_SAMPLE=1"):
        check(run, "http://127.0.0.1:1")


def test_answers_of_another_model_or_to_other_questions_are_refused(run: Path) -> None:
    prompts = run / "p.jsonl"
    prompts.write_text(prompts.read_text().replace("NEFF", "HLO"))
    with pytest.raises(InputError, match="does not answer the questions of PROMPTS"):
        check(run, "http://127.0.0.1:1")
    publish(run / "eval", {}, {"consolidate": "model-0"})
    with pytest.raises(InputError, match="are those of another model"):
        check(run, "http://127.0.0.1:1")


def test_without_answers_it_says_to_run_eval(run: Path) -> None:
    (run / "eval/manifest.json").unlink()
    with pytest.raises(InputError, match=r"nothing published yet\. Run `make eval`"):
        check(run, "http://127.0.0.1:1")


def test_a_template_that_was_edited_where_it_is_served_from_is_refused(run: Path) -> None:
    path = run / "consolidate/tokenizer_config.json"
    path.write_text(path.read_text().replace("</s>", "<s>"))
    with pytest.raises(StageFailure, match="is not as it was published"):
        check(run, "http://127.0.0.1:1")
