"""Answers in a sentence of their own: SmolLM2 reads the evidence and says what it tells."""

from collections.abc import Callable, Sequence

from mmmem_jax.models import weights
from mmmem_jax.models.small_lm import generate, load_small_lm

MAX_NEW_TOKENS = 48
MAX_TEXTS = 3  # a model of this size loses the thread in more
_SYSTEM = "You answer questions about a video from notes, in one short sentence, and add nothing."


def load_word_fn() -> Callable[[str, Sequence[str]], str]:
    """(question, evidence texts) -> a sentence; the weights are fetched the first time (93 MB).

    Raises:
      UserError: if they cannot be fetched or read.
    """
    model, tokenizer = load_small_lm(weights.fetch_smollm2())

    def word(question: str, texts: Sequence[str]) -> str:
        notes = "\n".join(f"- {text}" for text in texts[:MAX_TEXTS])
        prompt = f"Notes:\n{notes}\n\nQuestion: {question}"
        said = generate(model, tokenizer, prompt, max_new_tokens=MAX_NEW_TOKENS, system=_SYSTEM)
        return " ".join(said.split())

    return word
