"""Speed of Qwen3-VL: ours and that of `transformers`, in turn, on the same device and shapes.

    python benchmarks/qwen3_vl.py [--sizes=tiny,small,2b,8b] [--seconds=S] [--full]

Weights are random, bfloat16, float32 on a CPU; medians after warm-up; batch 1. Measured are:
vision, frames of a clip through the tower; prefill, a text into a cache; decode, token by token
after it; lora_step, loss, gradient (activations computed again) and AdamW. Also, of ours alone:

- a decision: a clip of 16 frames and its caption after an episode of 64, then the distribution over
  three answers. With reuse only the clip is read, after what is kept; its frames were encoded for
  its caption. Without, all 80 frames are encoded and the whole prompt is read.
  `decision_speedup` is the time without over that with reuse; `decision_prefix_speedup` leaves the
  encoding out, so it is what keeping the read prefix saves alone, and `decision_prefix_limit` what
  that would save if time went as operations do.
- a minute of video in six clips: for each, frames are encoded; a caption and entities written, four
  clips side by side; the decision taken after an episode of 64 frames and its trace written; and
  the clip read once more, as it is where it begins an episode. Every answer has all the tokens that
  it may have, which is the most it can take. Not in it: decoding and resizing video, embedding
  texts, the memory itself.

prefill_share is of the measured matrix rate (`prefill_flops`), decode_share of the measured copy
bandwidth (`decode_bytes`). vs_transformers is their time over ours: above 1 ours is faster; on a
CPU with one thread or all, whichever takes PyTorch less. On a GPU attention is cuDNN's here, and
there what PyTorch chooses. peak_gb is of our arrays and programs, without what
PyTorch holds; on a CPU of the process after each of our stages ran once, before PyTorch is loaded.
parity_max_rel is the largest difference of logits of text with an image, over the largest logit, in
float32, the same weights in both. Headline keys are of the last of --sizes, `rows` has all. What
was not measured is null: others where they are not installed, and what --seconds left no time for.
"""

import argparse
import dataclasses
import gc
import importlib.util
import json
import os
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs its share
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import kernel
from mmmem_jax import provenance
from mmmem_jax.models.qwen3_vl import chat, config, generate, images, inputs, params, vision
from mmmem_jax.models.qwen3_vl.attention import best_implementation
from mmmem_jax.models.qwen3_vl.config import Qwen3VLConfig, TextConfig
from mmmem_jax.models.qwen3_vl.lora import add_lora, join, split_lora
from mmmem_jax.models.qwen3_vl.modeling import Qwen3VL, Tokens, init_cache
from mmmem_jax.models.qwen3_vl.vision import VisualInputs, VisualTokens
from mmmem_jax.perception.qwen3_vl import (
    CAPTION_TOKENS,
    CLIPS_AT_ONCE,
    EXTRACTION_TOKENS,
    MAX_FRAMES,
)
from mmmem_jax.policies.qwen3_vl import DECISION_TOKENS, MAX_EPISODE_FRAMES
from mmmem_jax.testing.qwen3_vl import TINY, write_checkpoint

RESULTS = Path(__file__).resolve().parent / "results"
CLIPS_A_MINUTE = 6
INSTRUCTION_TOKENS, QUESTION_TOKENS = 256, 16  # about those of mmmem_jax/prompts
ANSWER_IDS = (5, 6, 7)
KEYS = (
    "prefill_share", "decode_share", "vs_transformers", "decision_speedup",
    "decision_prefix_speedup", "decision_prefix_limit", "build_s_per_video_minute", "peak_gb",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, and what it is given."""

    config: Qwen3VLConfig
    grid: tuple[int, int]  # patches of a frame, which fill a bucket of the tower
    prompt_tokens: int  # of prefill; decoding begins after them
    new_tokens: int
    lora_tokens: int
    lora_rank: int

    @property
    def frame_tokens(self) -> int:
        """Tokens of a pair of frames."""
        return self.grid[0] * self.grid[1] // self.config.vision.merge_unit


def _small() -> Qwen3VLConfig:
    """For CPUs: times mean something, and seconds are enough."""
    text = dataclasses.replace(
        TINY.text, vocab_size=8192, hidden_size=256, num_layers=8, num_heads=4, num_kv_heads=2,
        head_dim=64, intermediate_size=768, mrope_section=(12, 10, 10), max_positions=4096,
    )  # fmt: skip
    tower = dataclasses.replace(
        TINY.vision, depth=6, hidden_size=256, num_heads=4, intermediate_size=1024,
        out_hidden_size=256, deepstack_layers=(1, 3, 5), num_position_embeddings=2304,
    )  # fmt: skip
    return dataclasses.replace(TINY, text=text, vision=tower)


SIZES = {
    "tiny": Size(TINY, (8, 8), 64, 4, 32, 4),
    "small": Size(_small(), (8, 8), 1024, 32, 256, 16),
    "2b": Size(config.SIZES["2b"], (24, 32), 8192, 128, 2048, 64),
    "8b": Size(config.SIZES["8b"], (24, 32), 8192, 128, 2048, 64),
}


def layer_numbers(text: TextConfig) -> int:
    """Numbers in the matrices of all layers."""
    heads = 2 * (text.num_heads + text.num_kv_heads) * text.head_dim  # q and o, k and v
    return text.num_layers * text.hidden_size * (heads + 3 * text.intermediate_size)


def prefill_flops(text: TextConfig, length: int) -> int:
    """Operations that reading `length` tokens needs, with the logits of the one that follows.

    Two for each number of a matrix and token; of attention, products with the keys and with the
    values, half of both, as it is causal.
    """
    attention = 2 * text.num_layers * text.num_heads * text.head_dim * length * (length + 1)
    return 2 * (length * layer_numbers(text) + text.vocab_size * text.hidden_size) + attention


def decode_bytes(text: TextConfig, context: float, itemsize: int) -> float:
    """Bytes that writing one token needs: all matrices once, keys and values of its context."""
    kept = 2 * text.num_layers * text.num_kv_heads * text.head_dim * context
    return itemsize * (layer_numbers(text) + text.vocab_size * text.hidden_size + kept)


def prefix_limit(size: Size) -> float:
    """Operations of reading a decision's whole prompt over those of its last clip alone."""
    text, pairs = size.config.text, MAX_FRAMES // 2
    clip = pairs * size.frame_tokens + CAPTION_TOKENS
    kept = INSTRUCTION_TOKENS + MAX_EPISODE_FRAMES // MAX_FRAMES * clip
    whole = prefill_flops(text, kept + clip + QUESTION_TOKENS)
    logits = 2 * text.vocab_size * text.hidden_size
    return whole / (whole - prefill_flops(text, kept) + logits)


def make_dtype():
    """Of the parameters."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def random_model(shape: Qwen3VLConfig, *, seed: int = 0) -> tuple[nnx.GraphDef, nnx.State]:
    """A model made on the device."""
    how = {"dtype": make_dtype(), "attention": best_implementation(jax.default_backend())}
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Qwen3VL(shape, rngs=nnx.Rngs(0), **how)))
    make = jax.jit(lambda: nnx.state(Qwen3VL(shape, rngs=nnx.Rngs(seed), **how)))
    return graphdef, make()


def make_tokens(size: Size, *, frames: int = 0, first: int = 0, text: int = 0) -> Tokens:
    """The tokens of pairs of frames from number `first` on, and as many of text after them.

    Positions count on from 0 wherever the piece stands: they change no time.
    """
    rng = np.random.default_rng(frames + text)
    seen = frames * size.frame_tokens
    length = seen + text
    index = np.full((1, length), -1, np.int32)
    index[0, :seen] = first * size.frame_tokens + np.arange(seen)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32)[None, :, None], (1, length, 3))
    ids = rng.integers(0, TINY.image_token_id, (1, length), np.int32)
    return jax.device_put(Tokens(ids, positions, np.ones((1, length), bool), index))


def make_frames(size: Size, pairs: int) -> VisualInputs:
    """Pairs of random frames."""
    tower = size.config.vision
    patches = np.random.default_rng(pairs).normal(
        size=(pairs * size.grid[0] * size.grid[1], tower.patch_dim)
    )
    pixels = (patches.astype(np.float32), (pairs, *size.grid))
    return jax.device_put(vision.visual_inputs([pixels], tower))


def side_by_side(tokens: Tokens, rows: int, seen: int = 0) -> Tokens:
    """The same piece `rows` times, each looking at `seen` visual tokens of its own."""
    many = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), tokens)
    own = many.visual_index + seen * jnp.arange(rows)[:, None]
    return many.replace(visual_index=jnp.where(many.visual_index < 0, -1, own))


class Reading:
    """A cache, with places in it to go back to."""

    def __init__(self, ours: "Ours", slots: int, rows: int = 1):
        self.ours = ours
        self.cache = init_cache(ours.size.config.text, rows, slots, make_dtype())
        self.places = {}
        self.mark("start")

    def mark(self, name: str) -> None:
        self.places[name] = generate.marked(self.cache)

    def back(self, name: str) -> None:
        self.cache = generate.rewind(self.cache, self.places[name])

    def read(self, tokens: Tokens, visual: VisualTokens | None = None) -> None:
        self.cache = generate.prefill(*self.ours.model, tokens, visual, self.cache)

    def write(self, count: int) -> jax.Array:
        out, self.cache = generate.decode(
            *self.ours.model, jax.random.key(0), self.cache, max_new_tokens=count, stop_ids=()
        )
        return out.ids

    def answer(self) -> jax.Array:
        return generate.next_log_probs(*self.ours.model, self.cache, ids=ANSWER_IDS)


@jax.jit
def together(seen: list[VisualTokens]) -> VisualTokens:
    """Visual tokens one after the other."""
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=-2), *seen)


class Ours:
    """What is timed of ours: a method without arguments for each stage."""

    def __init__(self, size: Size):
        self.size, self.model = size, random_model(size.config)
        self.pairs, self.kept = MAX_FRAMES // 2, MAX_EPISODE_FRAMES // 2
        self.frames = make_frames(size, self.pairs)
        self.seen = self.vision()
        # Frames of an episode are the same ones again, as is each clip.
        clips = self.kept // self.pairs
        self.all_frames = jax.tree.map(lambda x: jnp.concatenate([x] * (clips + 1)), self.frames)
        clip = partial(make_tokens, size, frames=self.pairs)
        self.clip = clip(text=CAPTION_TOKENS + QUESTION_TOKENS)
        instructions = make_tokens(size, text=INSTRUCTION_TOKENS)
        pieces = [instructions, *[clip(text=CAPTION_TOKENS)] * clips]
        self.prefix = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *pieces)
        whole = [self.prefix, self.clip]
        self.whole = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *whole)
        self.prompt = make_tokens(size, text=size.prompt_tokens)
        self.text = Reading(self, size.prompt_tokens + size.new_tokens)
        self.text.read(self.prompt)
        self.text.mark("prompt")
        self.episode = Reading(self, self.whole.ids.shape[1] + DECISION_TOKENS)
        self.episode.read(self.prefix, self.seen)
        self.episode.mark("episode")
        many = partial(side_by_side, rows=CLIPS_AT_ONCE)
        self.shown = many(clip(text=QUESTION_TOKENS), seen=self.pairs * size.frame_tokens)
        self.retold = many(make_tokens(size, text=CAPTION_TOKENS + QUESTION_TOKENS))
        slots = INSTRUCTION_TOKENS + self.shown.ids.shape[1] + self.retold.ids.shape[1]
        self.notes = Reading(self, slots + EXTRACTION_TOKENS, CLIPS_AT_ONCE)
        self.notes.read(many(instructions))
        self.notes.mark("instructions")
        self._start_lora()

    def _start_lora(self) -> None:
        model = nnx.merge(*self.model)
        model.remat = True
        rank = self.size.lora_rank
        graphdef, lora, self.base = split_lora(
            add_lora(model, rank=rank, alpha=2.0 * rank, rngs=nnx.Rngs(0))
        )
        optimizer = optax.adamw(1e-4)
        self.lora = lora, optimizer.init(lora)
        self.lora_tokens = make_tokens(self.size, text=self.size.lora_tokens)

        @partial(jax.jit, donate_argnums=0)
        def step(trained, base, tokens):
            def loss(lora):
                model = nnx.merge(graphdef, join(lora, base))
                found, _ = generate.completion_log_probs(
                    model, tokens, None, num_new=tokens.ids.shape[1] // 2
                )
                return -jnp.mean(found)

            lora, opt_state = trained
            value, gradient = jax.value_and_grad(loss)(lora)
            updates, opt_state = optimizer.update(gradient, opt_state, lora)
            return (optax.apply_updates(lora, updates), opt_state), value

        self._step = step

    def vision(self) -> VisualTokens:
        return generate.encode_visual(*self.model, self.frames)

    def prefill(self) -> jax.Array:
        self.text.back("start")
        self.text.read(self.prompt)
        return self.text.answer()

    def decode(self) -> jax.Array:
        self.text.back("prompt")
        return self.text.write(self.size.new_tokens)

    def lora_step(self) -> jax.Array:
        self.lora, loss = self._step(self.lora, self.base, self.lora_tokens)
        return loss

    def decision(self) -> jax.Array:
        """After what is kept."""
        self.episode.back("episode")
        self.episode.read(self.clip, self.seen)
        return self.episode.answer()

    def decision_anew(self) -> jax.Array:
        """All frames encoded again."""
        return self._decide_anew(generate.encode_visual(*self.model, self.all_frames))

    def decision_prefix_anew(self) -> jax.Array:
        """All frames encoded before."""
        return self._decide_anew(self.seen)

    def _decide_anew(self, seen: VisualTokens) -> jax.Array:
        """From the whole prompt; what is written over is the same again."""
        self.episode.back("start")
        self.episode.read(self.whole, seen)
        return self.episode.answer()

    def minute(self) -> list[jax.Array]:
        """What the model does for a minute of video."""
        out = []
        for first in range(0, CLIPS_A_MINUTE, CLIPS_AT_ONCE):
            seen = [self.vision() for _ in range(min(CLIPS_AT_ONCE, CLIPS_A_MINUTE - first))]
            self.notes.back("instructions")
            self.notes.read(self.shown, together(seen + seen[-1:] * (CLIPS_AT_ONCE - len(seen))))
            self.notes.mark("clips")
            self.notes.write(CAPTION_TOKENS)
            self.notes.back("clips")
            self.notes.read(self.retold)
            out.append(self.notes.write(EXTRACTION_TOKENS))
            for one in seen:
                for place in ("episode", "episode"):  # again, as where the clip begins an episode
                    self.episode.back(place)
                    self.episode.read(self.clip, one)
                out += [self.episode.answer(), self.episode.write(DECISION_TOKENS)]
        return out


class Theirs:
    """The same stages in PyTorch, of a random model of the same size."""

    def __init__(self, size: Size, torch):
        import transformers

        self.size, self.torch = size, torch
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self.cache = transformers.DynamicCache
        with torch.device(self.device):
            self.model = transformers.Qwen3VLForConditionalGeneration._from_config(
                transformers.Qwen3VLConfig(**config.to_json(size.config)),
                dtype=getattr(torch, jnp.dtype(make_dtype()).name),
                attn_implementation="sdpa",
            ).eval()
        frames = make_frames(size, MAX_FRAMES // 2).patches
        self.patches = self._tensor(frames.reshape(-1, frames.shape[-1]))
        self.grid = torch.tensor([[MAX_FRAMES // 2, *size.grid]], device=self.device)
        self.prompt = self._tensor(make_tokens(size, text=size.prompt_tokens).ids).long()
        self.lora_ids = self._tensor(make_tokens(size, text=size.lora_tokens).ids).long()
        self.past = self.optimizer = None

    def _tensor(self, x):
        return self.torch.tensor(np.asarray(x), device=self.device)

    def _read(self, ids, past):
        with self.torch.inference_mode():
            return self.model(input_ids=ids, cache=past, logits_to_keep=1)

    def vision(self):
        with self.torch.inference_mode():
            return self.model.model.visual(
                self.patches.to(self.model.dtype), grid_thw=self.grid
            ).pooler_output

    def prefill(self):
        return self._read(self.prompt, self.cache(config=self.model.config)).logits

    def decode(self):
        if self.past is None:
            self.past = self.cache(config=self.model.config)
            self.next = self._read(self.prompt, self.past).logits.argmax(-1)
        ids = self.next
        for _ in range(self.size.new_tokens - 1):  # the first came with the prompt, as in ours
            ids = self._read(ids, self.past).logits.argmax(-1)
        self.past.crop(1 - self.size.new_tokens)
        return ids

    def lora_step(self):
        """From the first call on the model has an adapter."""
        if self.optimizer is None:
            self._start_lora()
        new = self.lora_ids.shape[1] // 2
        logits = self.model(input_ids=self.lora_ids, logits_to_keep=new + 1, use_cache=False).logits
        loss = self.torch.nn.functional.cross_entropy(
            logits[0, :-1].float(), self.lora_ids[0, -new:]
        )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _start_lora(self) -> None:
        import peft

        rank = self.size.lora_rank
        names = "|".join(("q_proj", "k_proj", "v_proj", "o_proj"))
        adapter = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=rf".*language_model.*\.({names})"
        )
        self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.model = peft.get_peft_model(self.model, adapter).train()
        self.optimizer = self.torch.optim.AdamW(
            [x for x in self.model.parameters() if x.requires_grad], lr=1e-4, weight_decay=1e-4
        )

    def calls(self, stage: str) -> dict:
        """By name; on a CPU with one thread and with all: on a busy machine one may be faster."""
        call = getattr(self, stage)
        if self.device != "cpu":
            return {"theirs": call}

        def threaded(threads):
            self.torch.set_num_threads(threads)
            return call()

        return {f"theirs_{n}": partial(threaded, n) for n in {1, os.cpu_count()}}


STAGES = {
    "vision": "transformers", "prefill": "transformers", "decode": "transformers",
    "decision": None, "decision_anew": None, "decision_prefix_anew": None, "minute": None,
    "lora_step": "peft",
}  # fmt: skip


def make_theirs(size: Size) -> Theirs | None:
    """None where PyTorch or transformers is not installed, or PyTorch lacks the device."""
    torch = kernel.import_torch()
    found = torch is not None and importlib.util.find_spec("transformers") is not None
    return Theirs(size, torch) if found else None


def wait(out) -> None:
    """Until the results of any call are there."""
    jax.block_until_ready(out)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Gives back what nothing refers to."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_gb() -> float:
    """The most memory so far: of JAX on an accelerator, of this process on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return stats["peak_bytes_in_use"] / 1e9


def time_stages(size: Size, deadline: float) -> tuple[dict, dict, float | None]:
    """Seconds of each of our stages and of theirs, null past the deadline; our peak memory."""
    ours, theirs = dict.fromkeys(STAGES), dict.fromkeys(STAGES)
    if time.perf_counter() > deadline:
        return ours, theirs, None
    mine = Ours(size)
    for stage in STAGES:
        wait(getattr(mine, stage)())
    peak = peak_gb()
    others = make_theirs(size)
    for stage, needs in STAGES.items():
        if time.perf_counter() > deadline:
            break
        calls = {"ours": getattr(mine, stage)}
        if others is not None and needs is not None and importlib.util.find_spec(needs):
            calls |= others.calls(stage)
        us = kernel.medians_us(calls, wait)
        print(json.dumps({"stage": stage} | us), file=sys.stderr, flush=True)
        ours[stage] = us.pop("ours") / 1e6
        theirs[stage] = min(us.values()) / 1e6 if us else None
    return ours, theirs, peak


def over(a: float | None, b: float | None) -> float | None:
    """a / b, null where one is."""
    return None if a is None or b is None else a / b


def make_row(name: str, ours: dict, theirs: dict, peak: float | None, limit: dict) -> dict:
    """A row of the result, from what `time_stages` and `kernel.limits` gave."""
    size = SIZES[name]
    text, new = size.config.text, size.new_tokens - 1
    context = size.prompt_tokens + new / 2
    flops = prefill_flops(text, size.prompt_tokens)
    needed = new * decode_bytes(text, context, jnp.dtype(make_dtype()).itemsize)
    return {
        "size": name,
        "dtype": jnp.dtype(make_dtype()).name,
        "seconds": ours,
        "transformers_seconds": theirs,
        "vision_frames_s": over(MAX_FRAMES, ours["vision"]),
        "prefill_tokens_s": over(size.prompt_tokens, ours["prefill"]),
        "decode_tokens_s": over(new, ours["decode"]),
        "lora_tokens_s": over(size.lora_tokens, ours["lora_step"]),
        "prefill_share": over(over(flops / 1e12, ours["prefill"]), limit["matmul_tflops"]),
        "decode_share": over(over(needed / 1e9, ours["decode"]), limit["copy_gb_s"]),
        "vs_transformers": {
            stage: over(theirs[stage], ours[stage]) for stage, needs in STAGES.items() if needs
        },
        "decision_speedup": over(ours["decision_anew"], ours["decision"]),
        "decision_prefix_speedup": over(ours["decision_prefix_anew"], ours["decision"]),
        "decision_prefix_limit": prefix_limit(size),
        "build_s_per_video_minute": ours["minute"],
        "peak_gb": peak,
    }


def parity(size: Size) -> float | None:
    """The largest difference of logits of an image and text in float32, over the largest logit."""
    torch = kernel.import_torch()
    if torch is None or importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    messages = [
        {"role": "user", "content": [
            {"type": "image", "image": np.arange(64 * 96 * 3, dtype=np.uint8).reshape(64, 96, 3)},
            {"type": "text", "text": "what is red and yellow?"},
        ]}
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, size.config)
        model = params.load_model(folder, dtype=jnp.float32)
        (seen,) = inputs.message_visuals(messages, images.read_image_config(Path(folder)), None)
        read = chat.load_chat(Path(folder), size.config)
        prompt = inputs.encode_messages(read, messages, [seen])
        reference = transformers.Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()
    frames = vision.visual_inputs([(seen.pixels.patches, seen.pixels.grid)], size.config.vision)
    frame_tokens = frames.patches.shape[1] // size.config.vision.merge_unit
    tokens = inputs.batch([prompt], pad_id=0, frame_tokens=frame_tokens)
    with jax.default_matmul_precision("highest"):
        hidden, _ = model(tokens, model.vision(frames))
        found = np.asarray(model.logits(hidden))[tokens.valid]
    ids = torch.tensor(prompt.ids[None]).long()
    with torch.inference_mode():
        wanted = reference(
            input_ids=ids,
            mm_token_type_ids=1 * (ids == size.config.image_token_id),
            pixel_values=torch.tensor(seen.pixels.patches),
            image_grid_thw=torch.tensor([seen.pixels.grid]),
        ).logits[0]
    return float(np.abs(found - wanted.numpy()).max() / np.abs(wanted.numpy()).max())


def measure(sizes: list[str], seconds: float) -> dict:
    """All of it."""
    begun = time.perf_counter()
    load = os.getloadavg()[0]  # a busy machine's times say little
    timed = {}
    for name in sizes:
        timed[name] = time_stages(SIZES[name], begun + seconds)
        free()
    limit = kernel.limits(make_dtype())  # now, as it takes memory, and loads PyTorch
    rows = [make_row(name, *found, limit) for name, found in timed.items()]
    compared = {name: kernel.version(name) for name in ("torch", "transformers", "peft")}
    return {
        "load_average": load,
        "compared_with": compared,
        "parity_max_rel": parity(SIZES["tiny" if sizes == ["tiny"] else "small"]),
        **{key: rows[-1][key] for key in KEYS},
        "size": rows[-1]["size"],
        **limit,
        "rows": rows,
    }


def sizes_of(text: str) -> list[str]:
    """The names of a list such as 2b,8b."""
    names = text.split(",")
    if not set(names) <= SIZES.keys():
        raise argparse.ArgumentTypeError(f"{text!r} is no list of some of {', '.join(SIZES)}")
    return names


def main() -> None:
    gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=sizes_of, default=["2b", "8b"] if gpu else ["small"])
    parser.add_argument("--seconds", type=float, default=1200, help="begin no stage after this")
    parser.add_argument("--full", action="store_true", help="save to results/qwen3_vl_BACKEND.json")
    args = parser.parse_args()
    result = measure(args.sizes, args.seconds) | provenance.provenance()
    if args.full:
        provenance.write_json(RESULTS / f"qwen3_vl_{jax.default_backend()}.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
