"""A manager learns what to keep of any timed text, without labels.

    python -m mmmem_jax.main --config=configs/timed_text.py --config.data_dir=DIR --workdir=RUN
    python -m mmmem_jax.eval_main --workdir=RUN

DIR holds events.jsonl and qa.jsonl (mmmem_jax/data/timed_text.py has the format). Splits by video
where there are three or more, else by time. Everything else is as in configs/egolife.py, whose cost
(about 2 minutes of training on 2 cores) and scores it shares on that data.
"""

import runpy
from pathlib import Path

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The default configuration, or its toy version for `arg` = "smoke"."""
    egolife = runpy.run_path(str(Path(__file__).with_name("egolife.py")))
    config = egolife["get_config"](arg)
    config.source = "timed_text"
    config.skip_bad_rows = False
    config.wearer = ""  # name of the person who wears the camera, if there is one
    return config
