"""InternVL's pictures stay where the message has them.

SGLang's conversation template moves the pictures of a message before everything else in it. OpenGVLab's own code does
not: `InternVLChatModel.chat` puts each picture where its <image> stands in the question, and the chat template of the
released "-HF" checkpoints writes the parts of a message in their order. SGLang still refuses a system message or an
answer with a picture: no InternVL was trained with one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sglang_mminfer import mends

STOCK, OURS = "internvl-2-5", "mminfer-internvl-2-5"


def apply_template(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND OpenAIServingChat._apply_conversation_template."""
    manager = self.template_manager
    if (
        manager.chat_template_name == STOCK
        and mends.wanted(self.tokenizer_manager.server_args)
        and mends.active("media_order")
    ):
        _register()
        manager._chat_template_name = OURS  # this server's only: the stock template stays as it is
    return original(self, *args, **kwargs)


def _register() -> None:
    from sglang.srt.parser.conversation import chat_templates, register_conv_template

    if OURS not in chat_templates:
        register_conv_template(dataclasses.replace(chat_templates[STOCK], name=OURS, image_token_at_prefix=False))
