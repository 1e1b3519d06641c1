"""Chat templates in the formats of well-known models, each with the same format written in Python.

The templates are our own, made after how these models' conversations look. `segments` says the text and what of it the
assistant writes, so that tests have something to compare the search for turns with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]
Segments = list[tuple[str, bool]]
"""(text, whether the assistant writes it)."""


@dataclass(frozen=True)
class Format:
    """A chat template. `tools`: whether it takes tool calls; `system`: whether it takes system messages."""

    name: str
    template: str
    specials: tuple[str, ...]
    eos: str
    segments: Callable[[Messages], Segments]
    bos: str | None = None
    tools: bool = False
    system: bool = True


# ---- ChatML, as SmolLM2 has it ---------------------------------------------------------------------------------------
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def chatml(messages: Messages) -> Segments:
    said: Segments = []
    if messages[0]["role"] != "system":
        said.append(("<|im_start|>system\nYou are a helpful assistant<|im_end|>\n", False))
    for message in messages:
        said.append((f"<|im_start|>{message['role']}\n", False))
        said.append((message["content"] + "<|im_end|>", message["role"] == "assistant"))
        said.append(("\n", False))
    return said


# ---- Llama 3.1: trims, a system header in any case, tool results as JSON ---------------------------------------------
LLAMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""


def llama(messages: Messages) -> Segments:
    system = ""
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"].strip(), messages[1:]
    intro = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    said: Segments = [
        (f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{intro}{system}<|eot_id|>", False)
    ]
    for message in messages:
        if message.get("tool_calls"):
            call = message["tool_calls"][0]["function"]
            said.append(("<|start_header_id|>assistant<|end_header_id|>\n\n", False))
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            said.append((f'{{"name": "{call["name"]}", "parameters": {arguments}}}<|eot_id|>', True))
        elif message["role"] == "tool":
            result = json.dumps(message["content"], ensure_ascii=False)
            said.append((f"<|start_header_id|>ipython<|end_header_id|>\n\n{result}<|eot_id|>", False))
        else:
            said.append((f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False))
            said.append((message["content"].strip() + "<|eot_id|>", message["role"] == "assistant"))
    return said


# ---- Qwen3: reasoning is kept after the last question only, where even an empty one is written -----------------------
QWEN = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not\
(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + \
content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""


def qwen(messages: Messages) -> Segments:
    said: Segments = []
    last_query = len(messages) - 1
    for at in reversed(range(len(messages))):
        content = messages[at]["content"]
        answer = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if messages[at]["role"] == "user" and not answer:
            last_query = at
            break
    for at, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role in ("user", "system"):
            said.append((f"<|im_start|>{role}\n{content}<|im_end|>\n", False))
        elif role == "tool":
            first = at == 0 or messages[at - 1]["role"] != "tool"
            last = at + 1 == len(messages) or messages[at + 1]["role"] != "tool"
            text = (
                "<|im_start|>user" * first + f"\n<tool_response>\n{content}\n</tool_response>" + "<|im_end|>\n" * last
            )
            said.append((text, False))
        else:
            reasoning = message.get("reasoning_content")
            if reasoning is None:
                reasoning = ""
                if "</think>" in content:
                    reasoning = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
                    content = content.split("</think>")[-1].lstrip("\n")
            text = content
            if at > last_query and (at + 1 == len(messages) or reasoning):
                text = "<think>\n" + reasoning.strip("\n") + "\n</think>\n\n" + content.lstrip("\n")
            for number, call in enumerate(message.get("tool_calls", [])):
                arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                text += "\n" * bool(content or number)
                text += f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": {arguments}}}\n</tool_call>'
            said += [("<|im_start|>assistant\n", False), (text + "<|im_end|>", True), ("\n", False)]
    return said


# ---- Gemma 3: the role is called model, system text goes in front of the first question ------------------------------
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {{ item['text'] | trim }}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}"""


def gemma(messages: Messages) -> Segments:
    prefix = ""
    if messages[0]["role"] == "system":
        prefix, messages = messages[0]["content"] + "\n\n", messages[1:]
    said: Segments = [("<bos>", False)]
    for at, message in enumerate(messages):
        assistant = message["role"] == "assistant"
        said.append((f"<start_of_turn>{'model' if assistant else 'user'}\n" + (prefix if at == 0 else ""), False))
        said.append((message["content"].strip() + "<end_of_turn>", assistant))
        said.append(("\n", False))
    return said


# ---- gpt-oss: channels, and other end-of-turn tokens in the last turn and after calls --------------------------------
GPT_OSS = """{{- '<|start|>system<|message|>You are a large language model.\n\n' }}
{{- '# Valid channels: analysis, commentary, final.<|end|>' }}
{%- if messages[0].role in ['system', 'developer'] %}
    {{- '<|start|>developer<|message|># Instructions\n\n' + messages[0].content + '\n\n<|end|>' }}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set last = namespace(call=none) %}
{%- for message in loop_messages %}
    {%- if message.role == 'assistant' %}
        {%- if message.tool_calls %}
            {%- set call = message.tool_calls[0].function %}
            {%- set last.call = call.name %}
            {%- if message.content %}
                {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.content + '<|end|>' }}
            {%- endif %}
            {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
            {{- call.arguments | tojson }}
            {{- '<|call|>' }}
        {%- elif loop.last and not add_generation_prompt %}
            {%- if message.thinking %}
                {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
            {%- endif %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
        {%- else %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
        {%- endif %}
    {%- elif message.role == 'tool' %}
        {{- '<|start|>functions.' + (last.call or 'f') }}
        {{- ' to=assistant<|channel|>commentary<|message|>' + message.content | tojson + '<|end|>' }}
    {%- else %}
        {{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant' }}
{%- endif %}"""


def gpt_oss(messages: Messages) -> Segments:
    said: Segments = [
        (
            "<|start|>system<|message|>You are a large language model.\n\n"
            "# Valid channels: analysis, commentary, final.<|end|>",
            False,
        )
    ]
    if messages[0]["role"] == "system":
        said.append((f"<|start|>developer<|message|># Instructions\n\n{messages[0]['content']}\n\n<|end|>", False))
        messages = messages[1:]
    name = "f"
    for at, message in enumerate(messages):
        content, start = message["content"], ("<|start|>assistant", False)
        if message["role"] == "user":
            said.append((f"<|start|>user<|message|>{content}<|end|>", False))
        elif message["role"] == "tool":
            result = json.dumps(content, ensure_ascii=False)
            said.append(
                (f"<|start|>functions.{name} to=assistant<|channel|>commentary<|message|>{result}<|end|>", False)
            )
        elif message.get("tool_calls"):
            call = message["tool_calls"][0]["function"]
            name = call["name"]
            before = f"<|channel|>analysis<|message|>{content}<|end|><|start|>assistant" if content else ""
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            said += [
                start,
                (f"{before} to=functions.{name}<|channel|>commentary json<|message|>{arguments}<|call|>", True),
            ]
        elif at + 1 == len(messages):
            thinking = message.get("thinking") or message.get("reasoning_content")
            before = f"<|channel|>analysis<|message|>{thinking}<|end|><|start|>assistant" if thinking else ""
            said += [start, (f"{before}<|channel|>final<|message|>{content}<|return|>", True)]
        else:
            said += [start, (f"<|channel|>final<|message|>{content}<|end|>", True)]
    return said


# ---- Mistral: nothing announces the assistant's turn -----------------------------------------------------------------
MISTRAL = """{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""


def mistral(messages: Messages) -> Segments:
    said: Segments = [("<s>", False)]
    for message in messages:
        if message["role"] == "user":
            said.append((f"[INST] {message['content']} [/INST]", False))
        else:
            said.append((f" {message['content']}</s>", True))
    return said


# ---- Zephyr: headers that are no special tokens ----------------------------------------------------------------------
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""


def zephyr(messages: Messages) -> Segments:
    said: Segments = []
    for message in messages:
        said.append((f"<|{message['role']}|>\n", False))
        said.append((message["content"] + "</s>", message["role"] == "assistant"))
        said.append(("\n", False))
    return said


# ---- DeepSeek R1: the prompt opens reasoning that finished conversations do not have ---------------------------------
DEEPSEEK = """{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}\
{% elif message.role == 'user' %}{{ '<|User|>' + message.content }}{% else %}\
{% set content = message.content %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}\
{% endif %}{{ '<|Assistant|>' + content + eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""


def deepseek(messages: Messages) -> Segments:
    said: Segments = [("<s>", False)]
    for message in messages:
        if message["role"] == "assistant":
            said += [("<|Assistant|>", False), (message["content"].split("</think>")[-1] + "</s>", True)]
        else:
            said.append(("<|User|>" * (message["role"] == "user") + message["content"], False))
    return said


FORMATS = [
    Format("chatml", CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", chatml),
    Format(
        "llama-3.1",
        LLAMA,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        "<|eot_id|>",
        llama,
        bos="<|begin_of_text|>",
        tools=True,
    ),
    Format("qwen3", QWEN, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), "<|im_end|>", qwen, tools=True),
    Format(
        "gemma-3", GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", gemma, bos="<bos>"
    ),
    Format(
        "gpt-oss",
        GPT_OSS,
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
        "<|return|>",
        gpt_oss,
        tools=True,
    ),
    Format("mistral", MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", mistral, bos="<s>", system=False),
    Format("zephyr", ZEPHYR, ("<s>", "</s>"), "</s>", zephyr),
    Format("deepseek-r1", DEEPSEEK, ("<s>", "</s>", "<|User|>", "<|Assistant|>"), "</s>", deepseek, bos="<s>"),
]
BY_NAME = {form.name: form for form in FORMATS}
