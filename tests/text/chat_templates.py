"""Short chat templates that behave as those of well-known models do, and tokenizers with their
control tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer

from stages.text.conversation import Conversation, Message


class ChatTemplate(NamedTuple):
    """`controls`: the tokens that it writes, besides `bos` and `eos`. `system`, `tools`: whether it
    has a place for such messages. `ends`: the token that ends an answer. `strips`: whether its
    control tokens take the white space after them."""

    text: str
    ends: str
    controls: tuple[str, ...] = ()
    bos: str | None = None
    eos: str = "</s>"
    system: bool = True
    tools: bool = False
    strips: bool = False
    lead: str = ""


_IM = ("<|im_start|>", "<|im_end|>")
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

# ChatML, as Qwen 2.5 and SmolLM2 have it: a system message where the conversation has none.
CHATML = ChatTemplate(
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + _ASK,
    "<|im_end|>",
    _IM,
    eos="<|im_end|>",
)
# Llama 3: headers, texts without white space around them, the date of the day.
HEADERS = ChatTemplate(
    "{{ bos_token }}<|start|>system<|header|>\n\nToday is {{ strftime_now('%d %b %Y') }}.\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}"
    "{% set messages = messages[1:] %}{% endif %}<|eot|>"
    "{% for m in messages %}<|start|>{{ m.role }}<|header|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|header|>\n\n{% endif %}",
    "<|eot|>",
    ("<|start|>", "<|header|>", "<|eot|>"),
    bos="<s>",
    eos="<|eot|>",
)
# Mistral v3: control tokens around a question, no words that ask for the answer.
INSTRUCTIONS = ChatTemplate(
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only users and assistants.') }}{% endif %}{% endfor %}",
    "</s>",
    ("[INST]", "[/INST]"),
    bos="<s>",
    system=False,
    lead=" ",
)
# Llama 2: the same in plain words, BOS and EOS around each turn, and a space before EOS.
PLAIN_INSTRUCTIONS = ChatTemplate(
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
    "{% elif m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + ns.system + m.content.strip() + ' [/INST]' }}"
    "{% set ns.system = '' %}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "</s>",
    bos="<s>",
    lead=" ",
)
_TURNS = (
    "{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if loop.first %}{{ ns.system }}{% endif %}{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
# Gemma 2: the assistant is called model, and no system message has a place.
TURNS = ChatTemplate(
    "{{ bos_token }}{% set ns = namespace(system='') %}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('No system message.') }}{% endif %}" + _TURNS,
    "<end>",
    ("<turn>", "<end>"),
    bos="<s>",
    system=False,
)
# Gemma 3: a system message is part of the user's first.
MERGED_TURNS = TURNS._replace(
    text="{{ bos_token }}{% set ns = namespace(system='') %}{% if messages[0].role == 'system' %}"
    "{% set ns.system = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}"
    "{% endif %}" + _TURNS,
    system=True,
)
# Qwen 3: thinking in the last turn alone, and an empty thought where there is none.
THINKING = ChatTemplate(
    "{% set ns = namespace(asked=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set thought, said = m.reasoning_content or '', m.content %}"
    "{% if m.role == 'assistant' and '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.asked and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ said.lstrip('\n') }}"
    "{% else %}{{ said }}{% endif %}<|im_end|>\n{% endfor %}" + _ASK,
    "<|im_end|>",
    _IM,
    eos="<|im_end|>",
    lead="<think>\n\n</think>\n\n",
)
# Phi-3: the control tokens take the white space after them, and EOS follows the last answer.
STRIPPING = ChatTemplate(
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    "<|end|>",
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    strips=True,
)
# Qwen 2.5 and Hermes: calls as JSON, and what the tools answer.
TOOLS = ChatTemplate(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}\n<call>{{ call.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}" + _ASK,
    "<|im_end|>",
    _IM,
    eos="<|im_end|>",
    tools=True,
)
# gpt-oss: the last answer ends with another token than those before it.
CHANNELS = ChatTemplate(
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final"
    "{% endif %}<|message|>{{ m.content }}{% if m.role == 'assistant' and loop.last %}"
    "{{ eos_token }}{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    "<|return|>",
    ("<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
    eos="<|return|>",
    lead="final",
)
TEMPLATES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "instructions": INSTRUCTIONS,
    "plain_instructions": PLAIN_INSTRUCTIONS,
    "turns": TURNS,
    "merged_turns": MERGED_TURNS,
    "thinking": THINKING,
    "stripping": STRIPPING,
    "tools": TOOLS,
    "channels": CHANNELS,
}


def write_chat_tokenizer(folder: Path, source: Path, template: ChatTemplate) -> Path:
    """The tokenizer of `source` with the template and its control tokens, as AutoTokenizer reads
    it."""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    for token in (template.bos, template.eos, *template.controls):
        if token:
            strips = template.strips and token in template.controls
            added = AddedToken(token, special=True, normalized=False, rstrip=strips)
            tokenizer.add_special_tokens([added])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": template.eos}
    if template.bos:
        config["bos_token"] = template.bos
    if tokenizer.token_to_id("<unk>") is not None:
        config["unk_token"] = "<unk>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template.text, encoding="utf-8")
    return folder


_TEXTS = (
    *("Why?", "so, it answers", "\u00dcber die Br\u00fccke", "\u65e5\u672c\u8a9e \U0001f642"),
    *("def f(x):\n    return x\n", "a\n\n\nb", "{{ x }} {% if %} {# #}", "### Answer\n", "1 < 2"),
    *("  two spaces before", "and after  ", "\n\nlines around\n\n", "\ttab", '"quoted" \\n'),
)


def conversations(template: ChatTemplate, number: int, seed: int) -> list[Conversation]:
    """Conversations of one to four turns, with all that the template has a place for."""
    rng = random.Random(seed)
    return [_conversation(template, rng) for _ in range(number)]


def _conversation(template: ChatTemplate, rng: random.Random) -> Conversation:
    def text() -> str:
        return " ".join(rng.choices(_TEXTS, k=rng.randint(1, 3)))

    messages = []
    if template.system and rng.random() < 0.4:
        messages.append(Message("system", text()))
    for _ in range(rng.randint(1, 4)):
        messages.append(Message("user", text()))
        if template.tools and rng.random() < 0.5:
            call = {"function": {"name": "look", "arguments": {"at": text(), "times": 3}}}
            said = rng.choice(["", text()])
            messages += [
                Message("assistant", said, "", {"tool_calls": [call]}),
                Message("tool", text()),
            ]
        if template is THINKING and rng.random() < 0.5:
            thought = text().strip()
            if rng.random() < 0.5:
                said = f"<think>\n{thought}\n</think>\n\n{text().lstrip()}"
                messages.append(Message("assistant", said))
            else:
                messages.append(Message("assistant", text(), "", {"reasoning_content": thought}))
        else:
            messages.append(Message("assistant", text()))
    return tuple(messages)
