"""Checks of a config before a job writes anything: one line for every value that cannot be."""

import contextlib
from collections.abc import Collection, Iterator, Sequence

import jax
from ml_collections import ConfigDict

from mmmem_jax.errors import UserError
from mmmem_jax.sib.advantages import STDS
from mmmem_jax.sib.losses import RATIOS
from mmmem_jax.sib.rewards import TASKS
from mmmem_jax.sib.rollout import CREDITS
from mmmem_jax.sib.update import SibConfig
from mmmem_jax.train import distributed, sharding
from mmmem_jax.train.checkpoints import flatten
from mmmem_jax.train.trainer import FitConfig


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """Turns what the classes behind a section say of its values into a UserError that names it."""
    try:
        yield
    except (TypeError, ValueError, UserError) as error:
        raise UserError(f"config.{key}: {error}") from error


def at_least(config: ConfigDict, minimum: int, *keys: str) -> None:
    """Raises UserError unless each of these, where set, is a whole number of at least `minimum`."""
    values = flatten(config.to_dict())
    for key in keys:
        value = values.get(key, minimum)
        if not isinstance(value, int) or value < minimum:
            raise UserError(f"config.{key} is {value!r}; it must be a whole number >= {minimum}")


def one_of(key: str, value: object, known: Collection) -> None:
    """Raises UserError unless the value is known."""
    if value not in known:
        raise UserError(f"config.{key} is {value!r}; it must be {' or '.join(map(str, known))}")


def check_phase(config: ConfigDict, phase: str) -> None:
    """Raises UserError unless the section of a phase can be trained by."""
    section = config[phase]
    with naming(phase):
        FitConfig(section.num_steps, section.log_every, section.save_every)
    at_least(config, 1, f"{phase}.batch_size", f"{phase}.hidden")


def check_manager(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> None:
    """Raises UserError unless the manager can learn by `manager`, `sib`, `mesh`, `seed`.

    The mesh is of `devices`, by default of those that are there.
    """
    check_phase(config, "manager")
    with naming("sib"):
        options = SibConfig(**config.sib)
    for key, known in (("credit", CREDITS), ("task", TASKS), ("std", STDS), ("ratio", RATIOS)):
        one_of(f"sib.{key}", getattr(options, key), known)
    at_least(config, 2, "sib.num_generations")  # one alone has nothing to be compared with
    at_least(config, 1, "sib.block_size", "sib.inner_epochs")
    at_least(config, 0, "seed")
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    if devices is None:
        distributed.check_mesh(mesh)
    sharding.check_divides(
        mesh,
        batch_size=config.manager.batch_size,
        num_generations=options.num_generations,
        hidden=config.manager.hidden,
    )
