"""Conversation templates once more, in Jinja: what servers (vLLM, transformers) read from an
exported folder.

    jinja("vicuna_v1")      # takes messages, add_generation_prompt, bos_token, eos_token

The text is what `data.chat.encode` tokenises, pictures at the front of their turn.
"""
from data.chat import SYSTEM

# A message's content is a text, or a list of texts and pictures.
SAY = """{%- macro say(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content if part.type != 'text' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endif -%}{%- endmacro -%}
{%- if messages[0].role == 'system' -%}
{%- set system = say(messages[0].content) -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = SYSTEM -%}{%- set turns = messages -%}
{%- endif -%}
"""
TURNS = {
    "vicuna_v1": """{{- (bos_token or '') + system + ' ' -}}
{%- for turn in turns -%}
{{- 'USER: ' + say(turn.content) + ' ' if turn.role == 'user' else 'ASSISTANT: ' + say(turn.content) + eos_token -}}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt -}}""",
    "llama_2": """{%- set front = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if system else '' -%}
{%- for turn in turns -%}
{{- (bos_token or '') + '[INST] ' + (front if loop.first else '') + say(turn.content) + ' [/INST]'
    if turn.role == 'user' else ' ' + say(turn.content) + ' ' + eos_token -}}
{%- endfor -%}""",
    "chatml": """{{- (bos_token or '') + ('<|im_start|>system\\n' + system + '<|im_end|>\\n' if system else '') -}}
{%- for turn in turns -%}
{{- '<|im_start|>' + turn.role + '\\n' + say(turn.content) + '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}""",
}


def jinja(name):
    """Template of data.chat -> its Jinja text, "" for one that no server knows (brief)."""
    if name not in TURNS:
        return ""
    return SAY.replace("SYSTEM", repr(SYSTEM[name]), 1) + TURNS[name]
