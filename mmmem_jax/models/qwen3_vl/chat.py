"""The tokenizer and the chat template of a Qwen3-VL folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from mmmem_jax.errors import UserError
from mmmem_jax.models.json_object import read_object
from mmmem_jax.models.qwen3_vl.config import Qwen3VLConfig

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
TURN_START, TURN_END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Chat:
    """Turns messages into text and text into token ids."""

    tokenizer: Tokenizer
    template: jinja2.Template
    image_id: int  # stands for a picture's tokens
    video_id: int  # stands for a video's tokens
    turn_end_id: int
    text_end_id: int  # also pads
    merge_size: int  # patches along an edge of a token

    @property
    def stop_ids(self) -> tuple[int, int]:
        """The ids that end an answer."""
        return self.turn_end_id, self.text_end_id


def load_chat(folder: str | Path, config: Qwen3VLConfig) -> Chat:
    """Loads tokenizer.json and the chat template of a model folder.

    The template is chat_template.jinja, or else the one in chat_template.json, or else the one in
    tokenizer_config.json.

    Raises:
      UserError: if a file is missing or broken, or the tokenizer's special tokens are not those of
        config.json.
    """
    folder = Path(folder)
    tokenizer = _load_tokenizer(folder)
    wanted = {
        IMAGE: config.image_token_id,
        VIDEO: config.video_token_id,
        VISION_START: config.vision_start_token_id,
        VISION_END: config.vision_end_token_id,
    }
    path = folder / "tokenizer.json"
    for token in (*wanted, TURN_START, TURN_END, TEXT_END):
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{path} has no {token}; a Qwen3-VL tokenizer is needed")
    for token, number in wanted.items():
        if tokenizer.token_to_id(token) != number:
            raise UserError(
                f"{path} has {token} as {tokenizer.token_to_id(token)}, config.json as {number};"
                " take both from the same folder"
            )
    if tokenizer.get_vocab_size() > config.text.vocab_size:
        raise UserError(
            f"{path} has {tokenizer.get_vocab_size()} tokens, config.json"
            f" {config.text.vocab_size}; take both from the same folder"
        )
    return Chat(
        tokenizer,
        _load_template(folder),
        image_id=config.image_token_id,
        video_id=config.video_token_id,
        turn_end_id=tokenizer.token_to_id(TURN_END),
        text_end_id=tokenizer.token_to_id(TEXT_END),
        merge_size=config.vision.spatial_merge_size,
    )


def shorten(chat: Chat, text: str, most: int) -> str:
    """The beginning of a text that is at most so many tokens."""
    encode = partial(chat.tokenizer.encode, add_special_tokens=False)
    encoding = encode(text)
    if len(encoding.ids) <= most:
        return text
    for keep in range(most, 0, -1):  # cut off, the last word may be more tokens than it was
        short = text[: encoding.offsets[keep - 1][1]]
        if len(encode(short).ids) <= most:
            return short
    return ""


def render(chat: Chat, messages: Messages, *, add_generation_prompt: bool) -> str:
    """Writes a conversation as the model's text, one placeholder for each picture or video.

    Args:
      chat: from load_chat.
      messages: of keys role (system, user or assistant) and content, which is text or a list of
        parts {"type": "text", "text": ...}, {"type": "image", ...} and {"type": "video", ...}.
      add_generation_prompt: whether to open the assistant's turn at the end.

    Raises:
      UserError: if the template refuses the messages.
    """
    try:
        return chat.template.render(messages=messages, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template cannot write these messages ({error})") from error


def _load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json; take it from the model's folder")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises no narrower class
        raise UserError(f"{path} is not a tokenizer ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _load_template(folder: Path) -> jinja2.Template:
    path = folder / "chat_template.jinja"
    if path.is_file():
        source = path.read_text(encoding="utf-8")
    else:
        path = folder / "chat_template.json"
        if not path.is_file():
            path = folder / "tokenizer_config.json"
        source = read_object(path).get("chat_template")
    if not isinstance(source, str):
        raise UserError(
            f"{folder} has no chat template in chat_template.jinja, chat_template.json or"
            " tokenizer_config.json; take one from the model's folder"
        )
    # The published templates count on these options. A template is a file from elsewhere: the
    # sandbox keeps it from Python's inside and from changing the messages.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{path} is not a Jinja template ({error}); fetch it again") from error


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any) -> str:
    # Jinja's own filter writes for HTML: it would turn < and ' into escapes.
    return json.dumps(value, ensure_ascii=False)
