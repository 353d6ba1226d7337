"""Chat templates by name, as the Jinja text that a Hugging Face directory would hold.

    chatml    <|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n...<|im_end|>\\n      (Qwen and many others)
    llama3    <|start_header_id|>user<|end_header_id|>\\n\\n...<|eot_id|>...
    llama2    <s>[INST] <<SYS>>\\n...\\n<</SYS>>\\n\\n... [/INST] ... </s>
    mistral   <s>[INST] ... [/INST] ...</s>[INST] ... [/INST] ...</s>
    zephyr    <|user|>\\n...</s>\\n<|assistant|>\\n...</s>\\n
    alpaca    Below is an instruction ... ### Instruction:\\n...\\n\\n### Response:\\n...</s>
    plain     the messages one after the other and nothing between, each answer ended by the end mark

`{% generation %}` marks what the model is to write: the answer and the mark that ends the turn. The first characters of
an answer are those that follow the generation prompt, so that training and generation cut the text at one place.
"""

from __future__ import annotations

from collections.abc import Mapping

_CHATML = r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

_LLAMA3 = r"""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content | trim + '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

_LLAMA2 = r"""
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- bos_token }}
        {{- '[INST] ' }}
        {%- if loop.first and messages[0].role == 'system' %}
            {{- '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' + message.content | trim + ' [/INST]' }}
        {%- else %}
            {{- message.content | trim + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {%- generation %}
            {{- ' ' + message.content | trim + ' ' + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""

_MISTRAL = r"""
{{- bos_token }}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {%- if loop.first and messages[0].role == 'system' %}
            {{- '[INST] ' + messages[0].content + '\n\n' + message.content + ' [/INST]' }}
        {%- else %}
            {{- '[INST] ' + message.content + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {%- generation %}
            {{- ' ' + message.content | trim + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""

_ZEPHYR = r"""
{%- for message in messages %}
    {{- '<|' + message.role + '|>\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content + eos_token }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- message.content + eos_token + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}
"""

_ALPACA = r"""
{{- bos_token }}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- if messages[0].role == 'system' %}
    {{- messages[0].content }}
{%- elif '\n\n### Input:\n' in turns[0].content %}
    {{- 'Below is an instruction that describes a task, paired with an input that provides further context. ' }}
    {{- 'Write a response that appropriately completes the request.' }}
{%- else %}
    {{- 'Below is an instruction that describes a task. ' }}
    {{- 'Write a response that appropriately completes the request.' }}
{%- endif %}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- '\n\n### Instruction:\n' + message.content }}
    {%- else %}
        {{- '\n\n### Response:\n' }}
        {%- generation %}
            {{- message.content + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\n\n### Response:\n' }}
{%- endif %}
"""

_PLAIN = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
{%- endfor %}
"""

TEMPLATES: Mapping[str, str] = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "plain": _PLAIN,
    "zephyr": _ZEPHYR,
}
"""Name: text. Line ends at the start and the end of a text are not rendered."""

MARKS: Mapping[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""The texts of a template that published tokenizers hold as one id each. A tokenizer without them spells them out,
which works but costs tokens: see `Tokenizer.with_control_tokens`."""


def get_template(name: str) -> str:
    """The text of a template. ValueError lists the names."""
    if name not in TEMPLATES:
        raise ValueError(f"no chat template is called {name!r}: use one of {', '.join(TEMPLATES)}, or text for none")
    return TEMPLATES[name]
