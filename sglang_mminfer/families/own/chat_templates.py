"""Chat templates of these families: ChatML and Llama 3, with `<image>` and `<video>` where media stand."""

from __future__ import annotations

_CONTENT = """\
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content or [] -%}
{%- if part.type in ('image', 'image_url') -%}
{{- '<image>AFTER_IMAGE' -}}
{%- elif part.type in ('video', 'video_url') -%}
{{- '<video>AFTER_VIDEO' -}}
{%- elif part.text is defined -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
"""

_CHATML = """\
{%- if not messages or messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nSYSTEM<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
CONTENT
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_LLAMA_3 = """\
{{- '<|begin_of_text|>' -}}
{%- if SYSTEM_GIVEN and (not messages or messages[0].role != 'system') -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nSYSTEM<|eot_id|>' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
CONTENT
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""


def _filled(template: str, system: str, after_image: str, after_video: str) -> str:
    content = _CONTENT.replace("AFTER_IMAGE", after_image).replace("AFTER_VIDEO", after_video)
    template = template.replace("CONTENT\n", content).replace("SYSTEM_GIVEN", "true" if system else "false")
    return template.replace("SYSTEM", system)


def chatml(system: str, after_image: str = "", after_video: str = "") -> str:
    """Qwen's template: `<|im_start|>role`, a newline, the content, `<|im_end|>`.

    Args:
        system: the system prompt of a conversation that brings none.
        after_image, after_video: the text behind a placeholder, escaped as in a Jinja string.
    """
    return _filled(_CHATML, system, after_image, after_video)


def llama_3(system: str = "", after_image: str = "", after_video: str = "") -> str:
    """Llama 3's template: `<|start_header_id|>role<|end_header_id|>`, an empty line, the content, `<|eot_id|>`.

    Args: as `chatml`.
    """
    return _filled(_LLAMA_3, system, after_image, after_video)
