"""Records what torch and transformers make of a few sentences; text_encoder_test.py compares.

Run it in an environment of its own, since the package needs neither:

    pip install torch==2.13.0 transformers==5.23.0
    python tests/models/record_text_encoder_reference.py MINILM_FOLDER

MINILM_FOLDER is what `mmmem_jax.models.weights.fetch_minilm` returns. Also makes, with seed 0, the
tiny BERT folder tests/models/tiny_bert whose reference needs no download.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

HERE = Path(__file__).parent
SENTENCES = [
    "Hello.",
    "I put the two red cups on the table.",
    "Tasha: Did you bring the charger at 9:30?",
    "Ünïcode, 中文 and emoji 🙂 in one line!",
    "",
    "The cat sat on the mat, and then " + "walked and " * 40 + "slept.",
]
TINY_WORDS = """
    hello i put the two red cup ##s on table did you bring at cat sat mat and then walk ##ed . , ? !
"""


def main(minilm: Path) -> None:
    """Writes tests/models/tiny_bert and tests/models/text_encoder_reference.json."""
    tiny = HERE / "tiny_bert"
    make_tiny_bert(tiny)
    reference = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sentences": SENTENCES,
        "minilm": encode(minilm, "mean", max_tokens=256),
        "tiny_mean": encode(tiny, "mean", max_tokens=64),
        "tiny_cls": encode(tiny, "cls", max_tokens=64),
    }
    text = json.dumps(reference, ensure_ascii=False)
    (HERE / "text_encoder_reference.json").write_text(text + "\n", encoding="utf-8")


def encode(folder: Path, pooling: str, max_tokens: int) -> list[list[float]]:
    """Embeds each sentence alone, in float32, with no padding."""
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).float().eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    rows = []
    for sentence in SENTENCES:
        ids = torch.tensor([tokenizer.encode(sentence).ids])
        with torch.no_grad():
            states = model(input_ids=ids).last_hidden_state[0]
        pooled = states.mean(dim=0) if pooling == "mean" else states[0]
        rows.append([float(f"{x:.9g}") for x in pooled / pooled.norm()])
    return rows


def make_tiny_bert(folder: Path) -> None:
    """Makes a 2-layer BERT with weights large enough that every one of them matters."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TINY_WORDS.split()]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=True)
    with torch.no_grad():  # norms and biases start at 1 and 0, where a mix-up would not show
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.3)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
