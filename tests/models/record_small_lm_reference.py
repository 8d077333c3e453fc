"""Records what torch and transformers make of SmolLM2; small_lm_test.py compares.

Run it in an environment of its own, since the package needs neither:

    pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
    python tests/models/record_small_lm_reference.py SMOLLM2_FOLDER

SMOLLM2_FOLDER is what `mmmem_jax.models.weights.fetch_smollm2` returns. transformers dequantizes
the same file and runs its own Llama without a cache. Token ids come from the few lines below, not
from the tokenizers library: transformers does not let digits of a GGUF's tokenizer stand alone.
"""

import json
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import gguf
import regex
import torch
import transformers

HERE = Path(__file__).parent
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
COLOURS = ["red", "blue", "grey"]
PROMPTS = [
    "What is the capital of France?",
    "At  12:05 I'd seen 3 naïve café owners\n\n\tplay 象棋 🙂; what's <|im_end|> 1st?",
    "Answer from these captions.\n"
    + "\n".join(f"{n} s: a man in a {COLOURS[n % 3]} coat walks a dog." for n in range(12))
    + "\nWhat colour is the coat at 7 s?",
]
OPTIONS = ["Red.", "A dark blue one", "The man's coat is green, at 3 s."]
WORD = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
NUM_NEW = 24


def main(folder: Path) -> None:
    """Writes tests/models/small_lm_reference.json."""
    (path,) = folder.glob("*.gguf")
    tokenizer = ByteLevelBpe(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    reference = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "options": OPTIONS,
        "prompts": [record(model, tokenizer, prompt) for prompt in PROMPTS],
    }
    text = json.dumps(reference, ensure_ascii=False)
    (HERE / "small_lm_reference.json").write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def record(model, tokenizer, prompt: str) -> dict:
    """Records ids, every 768th logit at three positions, a continuation and options' scores."""
    ids = tokenizer.chat(prompt)
    positions = [0, len(ids) // 2, len(ids) - 1]
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    continuation: list[int] = []
    while len(continuation) < NUM_NEW and tokenizer.end not in continuation:
        output = model(torch.tensor([ids + continuation]), use_cache=False)
        continuation.append(int(output.logits[0, -1].argmax()))
    return {
        "prompt": prompt,
        "ids": ids,
        "positions": positions,
        "logits": [[float(f"{x:.7g}") for x in logits[p, ::768]] for p in positions],
        "continuation": continuation,
        "option_log_probs": [score(model, ids, tokenizer.encode(o)) for o in OPTIONS],
    }


def score(model, ids: list[int], option: list[int]) -> float:
    """Returns the log-probability of `option` after `ids`."""
    logits = model(torch.tensor([ids + option]), use_cache=False).logits[0, len(ids) - 1 : -1]
    chosen = torch.log_softmax(logits, dim=-1)[range(len(option)), option]
    return float(f"{chosen.sum():.7g}")


class ByteLevelBpe:
    """Byte-level byte-pair encoding, written for clearness; source: the GPT-2 paper."""

    def __init__(self, path: Path):
        fields = gguf.GGUFReader(path).fields
        tokens = fields["tokenizer.ggml.tokens"].contents()
        merges = fields["tokenizer.ggml.merges"].contents()
        self.ids = {token: index for index, token in enumerate(tokens)}
        self.start, self.end = self.ids["<|im_start|>"], self.ids["<|im_end|>"]
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}

    def chat(self, prompt: str) -> list[int]:
        turns = [f"system\n{SYSTEM}", f"user\n{prompt}"]
        ids: list[int] = []
        for turn in turns:
            ids += [self.start, *self.encode(turn), self.end, *self.encode("\n")]
        return [*ids, self.start, *self.encode("assistant\n")]

    def encode(self, text: str) -> list[int]:
        pieces = [p for part in regex.split(r"(\p{N})", text) for p in regex.findall(WORD, part)]
        return [self.ids[token] for piece in pieces for token in self.merge(piece)]

    def merge(self, piece: str) -> list[str]:
        parts = [byte_letters()[byte] for byte in piece.encode()]
        while pairs := [pair for pair in pairwise(parts) if pair in self.ranks]:
            at = [*pairwise(parts)].index(min(pairs, key=self.ranks.get))
            parts[at : at + 2] = ["".join(parts[at : at + 2])]
        return parts


@cache
def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(hidden)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
