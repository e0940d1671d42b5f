"""The tokenizer of tiny checkpoints: Qwen2's own with a vocabulary of a few hundred words, and a chat template."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Qwen2.5-VL's special tokens in their order. Their ids follow the byte-level vocabulary, as in the real tokenizer.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# The words of an answer. Single words, because each becomes one token, together with the space before it.
WORDS = """
a above across after again air all along always an and animal another any apple are arm around arrow as ask at
autumn away back bag ball bank bar bare basket be bear beat bed bell below bend beside between big bird bitter
black blue board boat body bone book boot bottle box branch brave bread break breath brick bridge bright broad
brown brush bucket build bulb burn bus button by cake call calm camera candle cap car card care carry cart cat
chain chair chalk change cheese child circle city clay clean clear climb clock cloth cloud coal coat coin cold
colour come cook copper copy cord cork corner cotton count country cover cow crack crane cross crowd cry cup
curtain curve cut dance dark day deep desk dish dog door down drain draw dress drink drop dry duck dust ear early
earth east edge egg eight empty end evening every eye face fair fall family far farm fast feather field fight fire
first fish five flag flame flat flight floor flower fly fold foot fork four frame free fresh friend frog from
front fruit full garden gate girl give glass glove go goat gold grain grass green grey ground group hair half hall
hammer hand happy harbour hard hat he head heart heavy help high hill hold hole home hook horn horse hot hour
house ice in ink iron island it jar jelly join juice jump keep key kind king kite knee knife knot lake lamp land
large last late laugh leaf learn left leg lemon letter light line lion lip list little lock long look loud low
machine man many map mark market match meal meat meet metal middle milk mirror moon more morning mountain mouth
move mud music nail name narrow near neck needle nest net new night nine noise north nose not nut oak ocean of
office oil old on one open orange other oven over owl page paint pan paper park part past path peace pen pencil
people picture pig pin pipe plane plant plate play pocket point pond pot press price print pull pump purple push
quick quiet rabbit rail rain raise range read red rest rice ring river road rock rod roll roof room root rope
rose round row run sail salt sand say school sea seat second see seed seven shade shake shape sharp sheep shelf
ship shirt shoe shop short shore side sign silk silver simple sing sister six skin sky sleep slope slow small
smile smoke smooth snail snake snow soap sock soft some song south space spade spoon spring square stage stamp
star start station steam stem step stick still stone stop store storm story straight street strong summer sun
sweet swim table tail take tall tea tell ten tent that the then there they thick thin three throat thumb ticket
tiger time tin to toe together tongue tooth top town toy track train tree triangle trumpet turn two umbrella
under up valley very view violin voice wait walk wall want warm wash watch water wave we wet wheel where while
whistle white wide wind window wing winter wire with wolf woman wood word work world worm write yard year yellow
yes you young zebra
"""

# Further words of the vocabulary, so that a prompt does not fall apart into letters.
PROMPT_WORDS = """
You are a helpful assistant. user system assistant What is this? What do you see in the video? How many? Describe
the picture. Is that so? And now? Which one came first? Compare both. Where did it go? Tell me more. Why? Who?
Please answer in one word. Thank you. I The A In It There
"""

CHAT_TEMPLATE = """\
{%- if not messages or messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type in ('video', 'video_url') -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part.text is defined -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

PLACEHOLDERS = ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
"""What the chat template writes for a picture and for a video."""


def _train_tokenizer() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE merges in which every word of the lists is one token (Qwen2's own pre-tokenizer)."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1 << 16,  # no limit: the merges end when every word is one token
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    spaced = [f" {word}" for word in WORDS.split()]
    # A word of a prompt may also stand at the start of a line, without a space. Prompt words weigh more, so that
    # their merges come before those of other words with the same letters.
    prompt = [form for word in PROMPT_WORDS.split() for form in (word, f" {word}") for _ in range(100)]
    tokenizer.train_from_iterator([*spaced, *prompt], trainer)
    state = json.loads(tokenizer.to_str())["model"]
    # Newer `tokenizers` write a merge as a pair, older ones as "left right".
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in state["merges"]]
    return state["vocab"], [(left, right) for left, right in pairs]


def make_tokenizer(
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    chat_template: str = CHAT_TEMPLATE,
    named: Mapping[str, str] | None = None,
) -> Any:
    """Qwen2's tokenizer with a small vocabulary, then the special tokens in their order, the padding token first.

    An empty `chat_template` means none. `named` are attributes that hold some of the special tokens.
    """
    import transformers

    vocab, merges = _train_tokenizer()
    vocab = {**vocab, **{token: len(vocab) + i for i, token in enumerate(special_tokens)}}
    return transformers.Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(special_tokens[1:]),
        chat_template=chat_template or None,
        model_max_length=131072,
        clean_up_tokenization_spaces=False,
        model_specific_special_tokens=dict(named or {}),
    )


def vocabulary_rows(tokenizer: Any) -> int:
    """Rows of an embedding for all tokens: a multiple of 64, as in released checkpoints."""
    return -(-len(tokenizer) // 64) * 64


def spoken_tokens(tokenizer: Any, rows: int) -> torch.Tensor:
    """bool [rows]: True for the tokens that are a word of WORDS with the space before it."""
    spoken = torch.zeros(rows, dtype=torch.bool)
    for word in WORDS.split():
        (token,) = tokenizer.encode(f" {word}", add_special_tokens=False)
        spoken[token] = True
    return spoken
