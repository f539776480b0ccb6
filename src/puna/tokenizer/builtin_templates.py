"""The published plain prompts, as Jinja templates, for checkpoints that carry no chat template.

They are Jinja so that a chosen one is saved into the checkpoint and its exports like any other. Which one a model was
trained with cannot be seen from its weights, so the choice is always the user's.
"""

from __future__ import annotations

from pathlib import Path

from puna.errors import UserError, nearest
from puna.tokenizer.spec import read_bytes

# A system message is split off; a turn out of order is an error, not a silent guess.
SYSTEM = """\
{%- if messages[0]['role'] == 'system' %}
  {%- set system = messages[0]['content'] %}
  {%- set turns = messages[1:] %}
{%- else %}
  {%- set system = none %}
  {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
  {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
    {{- raise_exception('after an optional system message, user and assistant must alternate') }}
  {%- endif %}
{%- endfor %}
"""

# Stanford Alpaca, train.py, PROMPT_DICT. A user message may carry "input" beside its "content".
ALPACA = """\
{%- set task = 'Below is an instruction that describes a task' %}
{%- set context = ', paired with an input that provides further context' %}
{%- set request = '. Write a response that appropriately completes the request.' %}
{%- for message in turns %}
  {%- if message['role'] == 'user' %}
    {%- if loop.first %}
      {{- system if system is not none else task + (context if message['input'] else '') + request }}
    {%- endif %}
    {{- '\\n\\n### Instruction:\\n' + message['content'] }}
    {%- if message['input'] %}
      {{- '\\n\\n### Input:\\n' + message['input'] }}
    {%- endif %}
  {%- else %}
    {{- '\\n\\n### Response:' + message['content'] + eos_token }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '\\n\\n### Response:' }}
{%- endif %}
"""

# Meta's llama repository, generation.py, chat_completion: each pair of turns is a text with its own BOS and EOS.
LLAMA2 = """\
{%- for message in turns %}
  {%- if message['role'] == 'user' %}
    {%- set content = message['content'] %}
    {%- if loop.first and system is not none %}
      {%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content %}
    {%- endif %}
    {{- bos_token + '[INST] ' + content | trim + ' [/INST]' }}
  {%- else %}
    {{- ' ' + message['content'] | trim + ' ' + eos_token }}
  {%- endif %}
{%- endfor %}
"""

# FastChat, conversation.py, vicuna_v1.1.
VICUNA = """\
{%- set persona = 'A chat between a curious user and an artificial intelligence assistant. ' %}
{%- set manner = "The assistant gives helpful, detailed, and polite answers to the user's questions." %}
{{- (system if system is not none else persona + manner) + ' ' }}
{%- for message in turns %}
  {%- if message['role'] == 'user' %}
    {{- 'USER: ' + message['content'] + ' ' }}
  {%- else %}
    {{- 'ASSISTANT: ' + message['content'] + eos_token }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- 'ASSISTANT:' }}
{%- endif %}
"""

# OpenAI's chat markup, as SmolLM2 and others write it, without a default system message.
CHATML = """\
{%- for message in messages %}
  {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Meta's llama3 repository, tokenizer.py, ChatFormat.
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
  {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
BUILTIN = {
    "alpaca": SYSTEM + ALPACA,
    "chatml": CHATML,
    "llama2": SYSTEM + LLAMA2,
    "llama3": LLAMA3,
    "vicuna": SYSTEM + VICUNA,
}
WITH_BOS = {"llama2", "llama3"}


def choose(name: str, *, add_bos: bool) -> str:
    """The Jinja source of a built-in template, or of a file whose name ends in .jinja.

    A conversation is encoded as rendered, so a built-in without a BOS of its own gets one where the checkpoint adds it.
    """
    if name.endswith(".jinja"):
        try:
            return read_bytes(Path(name)).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not UTF-8 text.") from error
    if name not in BUILTIN:
        raise UserError(
            f"There is no chat template called {name!r}{nearest(name, BUILTIN)}; "
            f"known are {', '.join(BUILTIN)}, or give the path of a .jinja file."
        )
    return ("{{- bos_token }}" if add_bos and name not in WITH_BOS else "") + BUILTIN[name]
