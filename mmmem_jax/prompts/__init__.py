"""What the language model is told, word for word: a file for each prompt, its version in its name.

Another wording is another file, never an edit: memories name the prompts that they were made with.
"""

import re
from pathlib import Path

from mmmem_jax.models.qwen3_vl.chat import TURN_END, TURN_START

ANSWER = f"{TURN_START}assistant\n"  # what the model writes next is its own
# What begins a token of its own in Qwen's tokenizers.
_MARK = re.compile(r"<(?=\||/?(?:think|tool_call|tool_response)>)")


def read(name: str) -> str:
    """The text of a prompt, such as "caption_v1", without the line break at its end."""
    return Path(__file__).with_name(f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")


def turn(role: str, text: str) -> str:
    """What one side says, whole."""
    return f"{TURN_START}{role}\n{text}{TURN_END}\n"


def plain(text: str) -> str:
    """Text from elsewhere in one line, with nothing in it that the model would take for a token."""
    return _MARK.sub("< ", " ".join(text.split()))
