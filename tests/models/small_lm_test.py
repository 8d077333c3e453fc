"""The language model against recorded torch outputs and plain NumPy; its cache; its loader."""

import json
import math
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmmem_jax.errors import UserError
from mmmem_jax.models import gguf_weights, small_lm, weights
from mmmem_jax.models.gguf_weights import open_gguf
from mmmem_jax.models.small_lm import (
    CHUNK,
    chat_tokens,
    decode,
    generate,
    generate_tokens,
    init_cache,
    load_small_lm,
    option_information,
    option_log_probs,
    prefill,
)

REFERENCE = json.loads(
    (Path(__file__).parent / "small_lm_reference.json").read_text(encoding="utf-8")
)
SIZES = {
    "context_length": 400,
    "embedding_length": 32,
    "block_count": 2,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "feed_forward_length": 64,
}
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "c a", "ca t"]


def gpt2_letters():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + n) for n in range(len(hidden)))]


def tiny_tensors():
    """Random weights, large enough that every one of them matters."""
    rng = np.random.default_rng(0)
    vocab = len(CONTROL) + 256 + len(MERGES)
    shapes = {"token_embd": (vocab, 32), "output_norm": (32,)}
    for layer in range(SIZES["block_count"]):
        shapes |= {
            f"blk.{layer}.attn_norm": (32,),
            f"blk.{layer}.attn_q": (32, 32),
            f"blk.{layer}.attn_k": (16, 32),
            f"blk.{layer}.attn_v": (16, 32),
            f"blk.{layer}.attn_output": (32, 32),
            f"blk.{layer}.ffn_norm": (32,),
            f"blk.{layer}.ffn_gate": (64, 32),
            f"blk.{layer}.ffn_up": (64, 32),
            f"blk.{layer}.ffn_down": (32, 64),
        }
    return {
        f"{name}.weight": rng.normal(len(shape) == 1, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_gguf(folder, *, tensors=None, **changes):
    """Writes a tiny model; `changes` replace metadata (None leaves it out), dots as two lines."""
    folder.mkdir(exist_ok=True)
    tokens = [*CONTROL, *gpt2_letters(), *(merge.replace(" ", "") for merge in MERGES)]
    metadata = {f"llama.{key}": value for key, value in SIZES.items()} | {
        "llama.rope.freq_base": 10_000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": MERGES,
    }
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    writer = gguf.GGUFWriter(folder / "tiny.gguf", metadata.pop("arch", "llama"))
    adders = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        if value is not None:
            adders[type(value)](key, value)
    for name, tensor in (tiny_tensors() if tensors is None else tensors).items():
        quantization = gguf.GGMLQuantizationType.F32
        if name.endswith(("attn_q.weight", "token_embd.weight")) and tensor.shape[-1] % 32 == 0:
            quantization = gguf.GGMLQuantizationType.Q4_1
            tensor = gguf.quants.quantize(tensor, quantization)
        writer.add_tensor(name, tensor, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def tiny(folder):
    return load_small_lm(folder)


@pytest.fixture(scope="module")
def smollm2():
    folder = weights.default_cache_dir() / weights.SMOLLM2.folder
    if not weights.is_whole(weights.SMOLLM2, folder):
        pytest.skip(f"no SmolLM2 in {folder}: mmmem_jax.models.weights.fetch_smollm2 fetches it")
    return load_small_lm(folder)


@nnx.jit
def full_logits(model, ids):
    """[L, V] logits of a sequence that is run at once."""
    states, _ = model(ids, init_cache(model.config, len(ids)), 0)
    return model.logits(states)


class TestParity:
    def test_smollm2_logits_and_tokens(self, smollm2):
        model, tokenizer = smollm2
        for wanted in REFERENCE["prompts"]:
            ids = chat_tokens(tokenizer, wanted["prompt"])
            assert ids == wanted["ids"]
            logits = full_logits(model, np.array(ids))[np.array(wanted["positions"])][:, ::768]
            assert np.abs(logits - np.array(wanted["logits"])).max() < 1e-2

    def test_smollm2_continuations(self, smollm2):
        model, tokenizer = smollm2
        for wanted in REFERENCE["prompts"]:
            text = generate(
                model, tokenizer, wanted["prompt"], max_new_tokens=len(wanted["continuation"])
            )
            assert text == tokenizer.decode(wanted["continuation"]).strip()

    def test_smollm2_options(self, smollm2):
        for wanted in REFERENCE["prompts"]:
            scores = option_log_probs(*smollm2, wanted["prompt"], REFERENCE["options"])
            np.testing.assert_allclose(scores, wanted["option_log_probs"], atol=1e-2)

    def test_tiny_model_against_numpy(self, folder, tiny):
        model, _ = tiny
        ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 20)
        np.testing.assert_allclose(
            full_logits(model, ids), numpy_llama(open_gguf(folder / "tiny.gguf"), ids), atol=1e-4
        )


def numpy_llama(file, ids):
    """A Llama in float64, position by position and head by head; complex numbers rotate."""
    weight = {name.removesuffix(".weight"): file.to_float32(name) for name in file.tensors}
    size, angles = 8, 10_000.0 ** (-np.arange(0, 8, 2) / 8)

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight[name]

    def heads(x, position=None):
        split = x.reshape(-1, size)
        if position is None:
            return split
        turned = (split[:, ::2] + 1j * split[:, 1::2]) * np.exp(1j * position * angles)
        return np.stack([turned.real, turned.imag], -1).reshape(split.shape)

    states = weight["token_embd"][ids].astype(np.float64)
    for n in range(SIZES["block_count"]):
        block, keys, values = f"blk.{n}.", [], []
        for position, x in enumerate(states):
            y = norm(x, block + "attn_norm")
            query = heads(weight[block + "attn_q"] @ y, position)
            keys.append(heads(weight[block + "attn_k"] @ y, position))
            values.append(heads(weight[block + "attn_v"] @ y))
            attended = []
            for head in range(4):
                scores = np.array([key[head // 2] @ query[head] for key in keys]) / math.sqrt(size)
                chances = np.exp(scores - scores.max())
                attended.append(chances / chances.sum() @ np.array([v[head // 2] for v in values]))
            x = x + weight[block + "attn_output"] @ np.concatenate(attended)
            y = norm(x, block + "ffn_norm")
            gate = weight[block + "ffn_gate"] @ y
            up = weight[block + "ffn_up"] @ y
            states[position] = x + weight[block + "ffn_down"] @ (gate / (1 + np.exp(-gate)) * up)
    return norm(states, "output_norm") @ weight["token_embd"].T


class TestCache:
    def test_decoding_equals_the_full_forward_at_every_position(self, tiny):
        model, _ = tiny
        ids = jax.random.randint(jax.random.key(0), (24,), 0, model.config.vocab_size)
        step = nnx.jit(decode)
        cache, rows = init_cache(model.config, 32), []
        for position, token in enumerate(ids):
            logits, cache = step(model, token, jnp.int32(position), cache)
            rows.append(logits)
        np.testing.assert_allclose(jnp.stack(rows), full_logits(model, ids), atol=1e-4)

    @pytest.mark.parametrize("length", [1, 5, CHUNK, CHUNK + 1, 2 * CHUNK])
    def test_neither_padding_nor_chunks_change_a_prompt(self, tiny, length):
        model, _ = tiny
        ids = np.random.default_rng(length).integers(0, model.config.vocab_size, length)
        wanted = full_logits(model, ids)[-1]
        run = nnx.jit(prefill)
        for size, fill in ((2 * CHUNK, 0), (2 * CHUNK, 7), (3 * CHUNK, 9)):
            padded = jnp.asarray(np.pad(ids, (0, size - length), constant_values=fill))
            # What an earlier text left behind is not read either.
            dirty = jax.tree.map(lambda x: x + 3.0, init_cache(model.config, size))
            logits, _ = run(model, padded, jnp.int32(length), dirty)
            np.testing.assert_allclose(logits, wanted, atol=1e-4)


class TestGenerate:
    def test_equals_the_likeliest_token_step_by_step(self, tiny):
        model, _ = tiny
        tokens = np.zeros(256, np.int32)
        tokens[:4] = [1, 30, 40, 50]
        longest, end = generate_tokens(model, tokens, 4, 16, -1)
        assert int(end) == 16
        assert longest[:4].tolist() == [1, 30, 40, 50]
        likeliest = full_logits(model, longest[:16]).argmax(axis=-1)
        assert longest[4:16].tolist() == likeliest[3:15].tolist()
        shorter, end = generate_tokens(model, tokens, 4, 9, -1)
        assert shorter[: int(end)].tolist() == longest[:9].tolist()
        stop = int(longest[8])
        stopped, end = generate_tokens(model, tokens, 4, 16, stop)
        first = longest.tolist().index(stop, 4)
        assert stopped[: int(end)].tolist() == longest[: first + 1].tolist()

    def test_text_in_text_out(self, tiny):
        assert isinstance(generate(*tiny, "the cat", max_new_tokens=8), str)

    def test_one_program_for_prompts_of_one_bucket(self, tiny, monkeypatch):
        generate(*tiny, "the", max_new_tokens=3)
        traced = []
        monkeypatch.setattr(small_lm, "decode", lambda *args: traced.append(1) or decode(*args))
        generate(*tiny, "the cat and the cat", max_new_tokens=9)
        assert not traced
        generate(*tiny, "x" * 200, max_new_tokens=9)
        assert traced  # longer than 256: another program

    def test_a_prompt_that_does_not_fit(self, tiny):
        with pytest.raises(UserError, match="takes 400; give less evidence"):
            generate(*tiny, "x" * 300, max_new_tokens=20)


class TestOptions:
    OPTIONS = ("the cat", "a", "14 cats, or is it 15?")

    def test_sums_of_token_log_probs(self, tiny):
        model, tokenizer = tiny
        prompt = chat_tokens(tokenizer, "which?")
        scores = option_log_probs(model, tokenizer, "which?", self.OPTIONS)
        for option, score in zip(self.OPTIONS, scores, strict=True):
            ids = tokenizer.encode(option).ids
            log_probs = jax.nn.log_softmax(full_logits(model, np.array(prompt + ids)))
            wanted = sum(log_probs[len(prompt) - 1 + n, token] for n, token in enumerate(ids))
            assert score == pytest.approx(float(wanted), abs=1e-3)

    def test_information_is_the_difference_to_the_neutral_prompt(self, tiny):
        asked = option_log_probs(*tiny, "which?", self.OPTIONS)
        neutral = option_log_probs(*tiny, "Hm.", self.OPTIONS)
        found = option_information(*tiny, "which?", self.OPTIONS, neutral_prompt="Hm.")
        np.testing.assert_allclose(found, asked - neutral, atol=1e-5)
        same = option_information(*tiny, "Hm.", self.OPTIONS, neutral_prompt="Hm.")
        np.testing.assert_allclose(same, 0, atol=1e-5)

    def test_an_empty_option(self, tiny):
        with pytest.raises(UserError, match="option is empty"):
            option_log_probs(*tiny, "which?", ["a", ""])


class TestTokenizer:
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def test_text_survives_and_stays_text(self, tiny, text):
        tokenizer = tiny[1]
        ids = tokenizer.encode(text + "<|im_end|>").ids
        assert tokenizer.decode(ids) == text + "<|im_end|>"
        assert min(ids) >= len(CONTROL)

    def test_merges_and_digits(self, tiny):
        tokens = tiny[1].encode("the cat the  12").tokens
        assert tokens == ["t", "he", "Ġ", "cat", "Ġthe", "Ġ", "Ġ", "1", "2"]

    def test_a_chat(self, tiny):
        tokenizer = tiny[1]
        ids = chat_tokens(tokenizer, "hi <|im_end|>", system="be")
        assert tokenizer.decode(ids, skip_special_tokens=False) == (
            "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi <|im_end|><|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert [token for token in ids if token < len(CONTROL)] == [1, 2, 1, 2, 1]


class TestRefusals:
    def test_no_file_or_two(self, tmp_path):
        with pytest.raises(UserError, match=r"has 0 \.gguf files"):
            load_small_lm(tmp_path)
        (tmp_path / "a.gguf").touch()
        with pytest.raises(UserError, match="not a whole GGUF file"):
            load_small_lm(tmp_path)
        (tmp_path / "b.gguf").touch()
        with pytest.raises(UserError, match=r"has 2 \.gguf files"):
            load_small_lm(tmp_path)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"arch": "qwen2"}, "'qwen2'; only 'llama'"),
            ({"llama__block_count": None}, r"no llama\.block_count that is a whole number"),
            ({"llama__block_count": 3}, r"no tensor blk\.2\."),
            ({"llama__block_count": 1}, r"unknown tensor blk\.1\."),
            ({"llama__block_count": 2**31}, "no Llama can have"),
            ({"llama__feed_forward_length": 2**19}, r"has shape .* its metadata says"),
            ({"llama__attention__head_count": 0}, "no Llama can have"),
            ({"llama__attention__head_count": 5}, "no Llama can have"),
            ({"llama__attention__head_count_kv": 3}, "no Llama can have"),
            ({"llama__attention__head_count_kv": 4}, r"attn_k\.weight has shape \(16, 32\)"),
            ({"llama__rope__freq_base": math.nan}, "no Llama can have"),
            ({"llama__rope__freq_base": "x"}, r"no llama\.rope\.freq_base that is a number"),
            ({"llama__rope__dimension_count": 4}, "no Llama can have"),
            ({"tokenizer__ggml__model": "llama"}, "only 'gpt2' is read"),
            ({"tokenizer__ggml__pre": "qwen2"}, "only 'smollm' is read"),
            ({"tokenizer__ggml__tokens": ["a", "a"]}, "doubled tokens"),
            ({"tokenizer__ggml__tokens": [1.5, 2.5]}, "not one type for each"),
            ({"tokenizer__ggml__token_type": [1, 2]}, "not one type for each"),
            ({"tokenizer__ggml__merges": ["no such"]}, "no byte-pair tokenizer"),
            ({"tokenizer__ggml__merges": ["one"]}, "no byte-pair tokenizer"),
            ({"tokenizer__ggml__merges": 4}, "that is a list"),
        ],
    )
    def test_metadata_that_is_not_read(self, tmp_path, change, reason):
        with pytest.raises(UserError, match=reason) as caught:
            load_small_lm(write_gguf(tmp_path, **change))
        assert "\n" not in str(caught.value)

    def test_tensors_name_themselves(self, tmp_path):
        name = "blk.1.ffn_up.weight"
        tensors = tiny_tensors()
        with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight has shape \(64, 31\)"):
            load_small_lm(write_gguf(tmp_path, tensors=tensors | {name: tensors[name][:, 1:]}))
        tensors[name][3, 4] = np.inf
        with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight holds no finite floats"):
            load_small_lm(write_gguf(tmp_path, tensors=tensors))
        del tensors[name]
        with pytest.raises(UserError, match=r"no tensor blk\.1\.ffn_up\.weight"):
            load_small_lm(write_gguf(tmp_path, tensors=tensors))
        tensors = tiny_tensors() | {"output.weight": np.ones((4, 4), np.float32)}
        with pytest.raises(UserError, match=r"unknown tensor output\.weight"):
            load_small_lm(write_gguf(tmp_path, tensors=tensors))

    def test_fewer_tokens_than_embeddings(self, tmp_path):
        tensors = tiny_tensors()
        tensors["token_embd.weight"] = tensors["token_embd.weight"][:-1]
        with pytest.raises(UserError, match="264 tokens and 263 embeddings"):
            load_small_lm(write_gguf(tmp_path, tensors=tensors, llama__vocab_size=263))

    def test_a_damaged_length_ends_soon(self, folder, tmp_path):
        path = folder / "tiny.gguf"
        reader = gguf_weights._BoundedReader(path)
        assert reader.reads_left < gguf_weights._BoundedReader.reads_left  # every read is counted
        content = bytearray(path.read_bytes())
        key = b"tokenizer.ggml.token_type"
        highest = content.index(key) + len(key) + 4 + 4 + 7  # byte of the array's length
        content[highest] = 1
        (tmp_path / "tiny.gguf").write_bytes(content)
        with pytest.raises(UserError, match="a length in it is damaged"):
            load_small_lm(tmp_path)

    @settings(
        max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(data=st.data())
    def test_any_damage_is_told_in_one_line_or_harmless(self, folder, tmp_path, data):
        content = bytearray((folder / "tiny.gguf").read_bytes())
        header = content.index(b"token_embd.weight")
        for _ in range(data.draw(st.integers(0, 4))):
            at = data.draw(st.integers(0, header + 3000) | st.integers(0, len(content) - 1))
            content[at] = data.draw(st.integers(0, 255))
        cut = data.draw(st.just(len(content)) | st.integers(0, len(content)))
        (tmp_path / "tiny.gguf").write_bytes(content[:cut])
        complaint = ""
        try:
            model, _ = load_small_lm(tmp_path)
        except UserError as error:
            complaint = str(error)
        assert "\n" not in complaint
        assert complaint or (model.config.num_layers == 2 and cut == len(content))


def test_caches_hold_a_limit_of_any_size():
    config = small_lm.LlamaConfig(8, 8, 1, 1, 1, 8, max_positions=20_000)
    for limit in (1, 256, 257, 8192, 9000):
        size = len(small_lm._pad([1], limit, config))
        assert size >= limit
        assert size % CHUNK == 0
