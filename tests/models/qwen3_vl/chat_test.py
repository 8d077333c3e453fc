"""The toy tokenizer and template, and refusals of folders that do not fit."""

import json
from dataclasses import replace

import pytest

from mmmem_jax.errors import UserError
from mmmem_jax.models.qwen3_vl.chat import load_chat, render, shorten
from mmmem_jax.testing.qwen3_vl import SPECIAL_TOKENS, toy_tokenizer, write_tokenizer
from tests.models.qwen3_vl.tiny_tokenizer import tiny_config

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "image"},
            {"type": "text", "text": "What is <this>?"},
            {"type": "video"},
        ],
    },
    {"role": "assistant", "content": "A man."},
]
RENDERED = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is <this>?"
    "<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n"
    "<|im_start|>assistant\nA man.<|im_end|>\n"
)


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path)
    return tmp_path


class TestTokenizer:
    def test_size_and_special_tokens(self):
        tokenizer = toy_tokenizer()
        assert tokenizer.get_vocab_size() <= 512
        for token in SPECIAL_TOKENS:
            assert tokenizer.encode(f"a{token}b").tokens == ["a", token, "b"]

    @pytest.mark.parametrize("text", ["What is the red man?", "  naïve 空\n\n\tx", "it's 1234"])
    def test_text_comes_back(self, text):
        tokenizer = toy_tokenizer()
        assert tokenizer.decode(tokenizer.encode(text).ids) == text

    def test_common_words_are_one_token(self):
        assert toy_tokenizer().encode(" the man is red").tokens == ["Ġthe", "Ġman", "Ġis", "Ġred"]


@pytest.mark.parametrize("text", ["What is the red man?", "  naïve 空空空\n\n\tx", "it's 1234", ""])
def test_shortened_it_is_the_longest_beginning_of_so_many_tokens(folder, text):
    chat = load_chat(folder, tiny_config())
    count = len(chat.tokenizer.encode(text).ids)
    lengths = []
    for most in range(-1, count + 2):
        short = shorten(chat, text, most)
        assert text.startswith(short)
        assert len(chat.tokenizer.encode(short).ids) <= max(most, 0)
        lengths.append(len(short))
    assert lengths == sorted(lengths)
    assert lengths[-1] == lengths[-2] == len(text)


class TestRender:
    def test_golden(self, folder):
        chat = load_chat(folder, tiny_config())
        assert render(chat, MESSAGES, add_generation_prompt=False) == RENDERED
        opened = render(chat, MESSAGES, add_generation_prompt=True)
        assert opened == RENDERED + "<|im_start|>assistant\n"

    def test_refused_part(self, folder):
        chat = load_chat(folder, tiny_config())
        messages = [{"role": "user", "content": [{"type": "sound"}]}]
        with pytest.raises(UserError, match="cannot write these messages .a part of type sound"):
            render(chat, messages, add_generation_prompt=False)

    def test_templates_cannot_reach_python(self, folder):
        (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
        with pytest.raises(UserError, match="cannot write"):
            render(load_chat(folder, tiny_config()), MESSAGES, add_generation_prompt=False)

    def test_json_is_not_written_for_html(self, folder):
        (folder / "chat_template.jinja").write_text("{{ messages[1].content[1] | tojson }}")
        text = render(load_chat(folder, tiny_config()), MESSAGES, add_generation_prompt=False)
        assert text == '{"type": "text", "text": "What is <this>?"}'


class TestLoadChat:
    def test_ids(self, folder):
        chat = load_chat(folder, tiny_config())
        names = [chat.tokenizer.id_to_token(number) for number in (chat.image_id, chat.video_id)]
        assert names == ["<|image_pad|>", "<|video_pad|>"]
        stops = [chat.tokenizer.id_to_token(number) for number in chat.stop_ids]
        assert stops == ["<|im_end|>", "<|endoftext|>"]

    @pytest.mark.parametrize("name", ["chat_template.json", "tokenizer_config.json"])
    def test_template_in_json(self, folder, name):
        source = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").unlink()
        (folder / name).write_text(json.dumps({"chat_template": source}))
        text = render(load_chat(folder, tiny_config()), MESSAGES, add_generation_prompt=False)
        assert text == RENDERED

    @pytest.mark.parametrize("token", ["image_token_id", "vision_end_token_id"])
    def test_ids_of_another_folder(self, folder, token):
        config = replace(tiny_config(), **{token: 9})
        with pytest.raises(UserError, match=r"as 36\d, config\.json as 9; take both"):
            load_chat(folder, config)

    def test_too_many_tokens(self, folder):
        config = tiny_config()
        config = replace(config, text=replace(config.text, vocab_size=300))
        with pytest.raises(UserError, match=r"has 365 tokens, config\.json 300"):
            load_chat(folder, config)

    def test_another_tokenizer(self, folder):
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace("<|im_end|>", "<|im_fin|>"))
        with pytest.raises(UserError, match=r"has no <\|im_end\|>; a Qwen3-VL tokenizer"):
            load_chat(folder, tiny_config())

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("tokenizer.json", None, r"has no tokenizer\.json"),
            ("tokenizer.json", "{}", "is not a tokenizer"),
            ("chat_template.jinja", None, "has no chat template"),
            ("chat_template.jinja", "{% if %}", "is not a Jinja template"),
        ],
    )
    def test_bad_files(self, folder, name, text, message):
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text)
        with pytest.raises(UserError, match=message):
            load_chat(folder, tiny_config())
